"""Runs the server as a process: socket, signals, shutdown."""

import asyncio
import gc
import logging
import signal
import socket
import warnings
from pathlib import Path

import uvicorn

from nugget2d.errors import ContextWarning, InputError
from nugget2d.model import Nugget2D
from nugget2d.server.app import make_app
from nugget2d.server.connections import IDLE_SECONDS, FailureLog, GuardedProtocol, max_connections
from nugget2d.server.context import log
from nugget2d.server.metrics import Metrics
from nugget2d.server.service import Service
from nugget2d.server.settings import Keys, Settings
from nugget2d.store import MemoryStore

# Seconds after the grace in which requests are told that the server ends; then their connections are cut.
FAREWELL = 5


def serve(model: Nugget2D, store: MemoryStore, settings: Settings, keys: Keys, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then requests that were begun are finished, for `settings.grace` seconds at most.

    Args:
        model: used by the server only, from now on.
        store: where memories are.
        settings: limits.
        keys: who may ask.
        listener: from `listen`.
    """
    service = Service(model, store, settings, Metrics(), several_keys=keys.several)
    warnings.simplefilter("ignore", ContextWarning)  # the client is told, in its usage
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises a signal once more when it is through with it: by then it means nothing
        signal.signal(number, lambda *_: None)
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())
    # modules and the model stay: a collection that visits all of them holds up every request for up to a second
    gc.collect()
    gc.freeze()
    log("listening", url=f"http://{address(*listener.getsockname()[:2])}", model=settings.name)
    try:
        Server(service, keys).run(sockets=[listener])
    finally:
        service.close()
    log("stopped")


class Server(uvicorn.Server):
    """uvicorn, serving a service within its limits.

    It tells requests when the grace is over, where uvicorn would only cut them off.
    """

    def __init__(self, service: Service, keys: Keys) -> None:
        """See `serve`."""
        self._app, self._grace = make_app(service, keys), service.settings.grace
        config = uvicorn.Config(
            self._app,
            http=GuardedProtocol,
            log_config=None,  # context.py logs
            access_log=False,
            server_header=False,
            lifespan="off",
            backlog=128,  # asyncio tries as often before it waits, where there are no file descriptors left
            limit_concurrency=max_connections(),
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=round(self._grace) + FAREWELL,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; failures of the event loop go to the log, each kind now and then."""
        asyncio.get_running_loop().set_exception_handler(FailureLog())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, when requests have ended."""
        asyncio.get_running_loop().call_later(self._grace, self._app.end)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; port 0 takes any that is free.

    Raises:
        InputError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError, TypeError, UnicodeError) as error:  # of a name that cannot be encoded, too
        listener.close()
        raise InputError(f"cannot listen on {address(host, port)}: {error}; choose another --host or --port") from error
    return listener


def address(host: str, port: int) -> str:
    """As in a URL, where an address of version 6 stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def served_name(model: str) -> str:
    """How clients call a model that was loaded from a folder, a hub id, or by its name: the last part of it."""
    return Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
