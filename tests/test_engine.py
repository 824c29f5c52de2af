"""Continuous batching: every answer is what it would be alone."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, OverloadError, ShutdownError, TimeLimitError
from nugget2d.segmentation import split, tokenize, tokenize_after
from nugget2d.server import jobs
from nugget2d.server.engine import Engine
from nugget2d.server.jobs import Compression, Context, Event, Failed, Finished, Generation, Made, Text
from nugget2d.server.sampling import Sampler
from nugget2d.server.transcript import Transcript

PROMPTS = ["The keeper", "Seven, he would say to the dog", " and", "In winter the road to the village was closed " * 3]


class Client:
    """Sends one job and collects what comes."""

    def __init__(self, model: Nugget2D, prompt: str = "The keeper", memory: Memory | None = None, **options: Any):
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.prompt, self.memory = prompt, memory
        ids = model.ids(prompt) if memory is None else model.ids_after(prompt)
        ids = ids[0].tolist()
        if memory is None and model.start_token is not None:
            ids = [model.start_token, *ids]
        sampling = {name: options.pop(name) for name in ("temperature", "top_p", "seed") if name in options}
        transcript = Transcript(model.tokenizer, options.pop("stop", ()))
        options = {"max_new_tokens": 12, "seconds": 60, "emit": self.events.put} | options
        self.job = Generation(ids, memory=memory, sampler=Sampler(**sampling), transcript=transcript, **options)

    def result(self) -> list[Event]:
        """All events, up to the last."""
        got = [self.events.get(timeout=60)]
        while not isinstance(got[-1], (Finished, Failed, Made)):
            got.append(self.events.get(timeout=60))
        return got

    def text(self) -> str:
        """The whole answer."""
        got = self.result()
        assert isinstance(got[-1], Finished), got[-1]
        return "".join(event.text for event in got if isinstance(event, Text))


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(model: Nugget2D, slots: int = 8, queue: int = 64, **options: Any) -> Engine:
        engines.append(Engine(model, slots=slots, queue=queue, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def expected(model: Nugget2D, client: Client, count: int = 12) -> str:
    return model.generate(client.prompt, memory=client.memory, max_new_tokens=count)


def test_answers_side_by_side_are_those_of_generate(model: Nugget2D, start: Callable[..., Engine]) -> None:
    """Of every architecture: memories of several lengths and plain prompts, joining at different steps."""
    texts = [tiny.TEXT[:400], tiny.TEXT[300:450], "Beans.", tiny.TEXT[:90]]
    memories = [model.compress(text, ratio=ratio) for text, ratio in zip(texts, (4, 2, 1, 8), strict=True)]
    clients = [Client(model, prompt, memory) for prompt, memory in zip(PROMPTS, memories, strict=True)]
    clients += [Client(model, prompt) for prompt in PROMPTS]
    clients += [Client(model, PROMPTS[1], memories[0], max_new_tokens=count) for count in (1, 5, 30)]
    wanted = [expected(model, client, client.job.max_new_tokens) for client in clients]
    engine = start(model, slots=4)
    for client in clients:
        engine.submit(client.job)
    assert [client.text() for client in clients] == wanted
