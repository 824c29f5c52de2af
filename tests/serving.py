"""A server over a tiny model, on a loopback port, in a thread of the tests' own process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from nugget2d import Nugget2D
from nugget2d.server.metrics import Metrics
from nugget2d.server.run import Server, listen
from nugget2d.server.service import Service
from nugget2d.server.settings import Keys, Settings
from nugget2d.store import MemoryStore


class Running:
    """A server that answers."""

    def __init__(self, url: str, service: Service, server: Server) -> None:
        self.url, self.service, self._server = url, service, server

    def end(self) -> None:
        """As SIGTERM does."""
        self._server.should_exit = True

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str = "none") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


@contextmanager
def serving(model: Nugget2D, folder: Path, keys: tuple[str, ...] = (), **limits: Any) -> Iterator[Running]:
    settings = Settings(**({"name": "tiny", "max_context": model.config.context, "ratio": 4} | limits))
    with MemoryStore(folder) as store:
        service = Service(model, store, settings, Metrics(), several_keys=len(keys) > 1)
        listener = listen("127.0.0.1", 0)
        server = Server(service, Keys(keys))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
        thread.start()
        try:
            yield running
        finally:
            running.end()
            thread.join()
            service.close()
            listener.close()


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes to hold: what the server does after its answer, a client does not wait for."""
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False
