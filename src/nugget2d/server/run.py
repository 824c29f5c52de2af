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
from nugget2d.server.context import log
from nugget2d.server.metrics import Metrics
from nugget2d.server.middleware import Middleware
from nugget2d.server.service import Service
from nugget2d.server.settings import Keys, Settings
from nugget2d.store import MemoryStore

# Seconds after the grace in which requests are told that the server ends; then their connections are cut.
FAREWELL = 5


class Server(uvicorn.Server):
    """Tells requests when the grace is over; uvicorn would only cut their connections."""

    def __init__(self, app: Middleware, grace: float) -> None:
        """Run `app`."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,  # context.py logs
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=round(grace) + FAREWELL,
            )
        )
        self._app, self._grace = app, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        asyncio.get_running_loop().call_later(self._grace, self._app.end)
        await super().shutdown(sockets)


def serve(model: Nugget2D, store: MemoryStore, settings: Settings, keys: Keys, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then requests that were begun are finished, for `settings.grace` seconds at most.

    Args:
        model: used by the server only, from now on.
        store: where memories are.
        settings: limits.
        keys: who may ask.
        listener: from `listen`.
    """
    metrics = Metrics()
    service = Service(model, store, settings, metrics)
    server = Server(make_app(service, keys), settings.grace)
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
        server.run(sockets=[listener])
    finally:
        service.close()
    log("stopped")


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
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen on {address(host, port)}: {error}; choose another --host or --port") from error
    return listener


def address(host: str, port: int) -> str:
    """As in a URL, where an address of version 6 stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def served_name(model: str) -> str:
    """How clients call a model that was loaded from a folder, a hub id, or by its name: the last part of it."""
    return Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
