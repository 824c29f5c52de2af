"""Continuous batching: every answer is what it would be alone, and nobody waits for another."""

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, OverloadError, ShutdownError, TimeLimitError
from nugget2d.inference.prefix import text_nuggets
from nugget2d.inference.sampling import Sampler
from nugget2d.modeling.cache import Nuggets
from nugget2d.server import batch, engine, jobs
from nugget2d.server.engine import Engine
from nugget2d.server.jobs import Compression, Event, Failed, Finished, Generation, Made, Text
from nugget2d.server.slots import Slots
from nugget2d.text.detokenizer import Transcript
from nugget2d.text.segmentation import REPLACEMENT, split

PROMPTS = ["The keeper", "Seven, he would say to the dog", " and", "In winter the road was closed " * 3]
# what differs for a padded batch: two weight sets on one base, sliding windows, learned positions, part of a head
KINDS = [("llama", "lora"), ("gemma3", "copies"), ("gpt2", "lora"), ("neox", "lora")]

Start = Callable[..., Engine]


class Client:
    """Sends one job and collects what comes."""

    def __init__(self, model: Nugget2D, prompt: str = "The keeper", memory: Memory | None = None, **options: Any):
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.prompt, self.memory = prompt, memory
        ids = (model.ids(prompt) if memory is None else model.ids_after(prompt))[0].tolist()
        if memory is None and model.start_token is not None and not options.get("head"):
            ids = [model.start_token, *ids]
        sampler = Sampler(
            *(options.pop(name, default) for name, default in [("temperature", 0), ("top_p", 1), ("seed", 0)])
        )
        transcript = Transcript(model.tokenizer, options.pop("stop", ()))
        options = {"max_new_tokens": 12, "seconds": 60, "emit": self.events.put} | options
        self.job = Generation(ids, memory=memory, sampler=sampler, transcript=transcript, **options)

    def result(self) -> list[Event]:
        """All events, up to the last."""
        got = [self.events.get(timeout=60)]
        while not isinstance(got[-1], (Finished, Failed)):
            got.append(self.events.get(timeout=60))
        return got

    def text(self) -> str:
        """The whole answer."""
        got = self.result()
        assert isinstance(got[-1], Finished), got[-1]
        return "".join(event.text for event in got if isinstance(event, Text))

    def error(self) -> Exception:
        """Why there is no whole answer."""
        got = self.result()[-1]
        assert isinstance(got, Failed), got
        return got.error

    def wait_for_text(self) -> None:
        """Until it is being written."""
        while not isinstance(self.events.get(timeout=60), Text):
            pass


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []

    def make(model: Nugget2D, slots: int = 8, queue: int = 64, **options: Any) -> Engine:
        engines.append(Engine(model, slots=slots, queue=queue, **options))
        return engines[-1]

    yield make
    for made in engines:
        made.close()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends an answer before its last, however fast the machine is."""
    monkeypatch.setattr(jobs, "end_tokens", lambda model: frozenset())


@pytest.mark.parametrize(("kind", "adapters"), KINDS)
def test_answers_side_by_side_are_those_of_generate(kind: str, adapters: str, start: Start) -> None:
    """Memories of several lengths and plain prompts, that join and leave at different steps."""
    model = tiny.trained(kind, adapters)
    texts = [tiny.TEXT[:400], "Beans.", tiny.TEXT[:90]]
    memories = [model.compress(text, ratio=ratio) for text, ratio in zip(texts, (4, 1, 8), strict=True)]
    clients = [Client(model, prompt, memory) for prompt, memory in zip(PROMPTS, memories, strict=False)]
    clients += [
        Client(model, prompt, max_new_tokens=count) for prompt, count in zip(PROMPTS[1:], (1, 8, 20), strict=True)
    ]
    clients.append(Client(model, PROMPTS[1], memories[0], max_new_tokens=3))
    wanted = [
        model.generate(client.prompt, memory=client.memory, max_new_tokens=client.job.max_new_tokens)
        for client in clients
    ]
    assert len(set(wanted)) == len(wanted)
    made = start(model, slots=5)
    for client in clients:
        made.submit(client.job)
    assert [client.text() for client in clients] == wanted


def test_answers_share_steps(llama: Nugget2D, start: Start) -> None:
    steps: list[int] = []
    clients = [Client(llama, stop=(), max_new_tokens=20) for _ in range(6)]
    alone = len(llama.ids(llama.generate(clients[0].prompt, max_new_tokens=20))[0])
    made = start(llama, on_step=steps.append)
    for client in clients:
        made.submit(client.job)
    for client in clients:
        client.text()
    assert max(steps) == 6
    assert len(steps) < 2 * alone + 6


def test_a_seed_gives_the_same_answer_whoever_is_beside_it(llama: Nugget2D, start: Start) -> None:
    made = start(llama)

    def ask(seed: int | None, **options: Any) -> Client:
        client = Client(llama, temperature=1.5, seed=seed, max_new_tokens=20, **options)
        made.submit(client.job)
        return client

    alone = ask(7).text()
    crowd = [ask(seed) for seed in (1, 7, 2**63 - 1, -5, 7)]
    texts = [client.text() for client in crowd]
    assert texts[1] == texts[4] == alone
    assert len(set(texts)) == 4
    assert ask(None).text() != ask(None).text()
    assert ask(3, top_p=1e-6).text() == llama.generate("The keeper", max_new_tokens=20)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def shares(temperature: float, top_p: float) -> list[float]:
        sampler = Sampler(temperature, top_p, seed=1)
        counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(1200)]), minlength=4)
        return (counts / 1200).tolist()

    assert shares(1, 1) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.05)
    assert shares(1, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert shares(1, 0.5)[0] == 1
    assert shares(0.5, 1) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.05)
    assert shares(1e-40, 1)[0] == 1


@given(
    st.text(alphabet="ab €😀\n", max_size=30), st.lists(st.text(alphabet="ab €😀", min_size=1, max_size=3), max_size=2)
)
def test_text_comes_whole_and_ends_before_a_stop_string(text: str, stops: list[str]) -> None:
    """However tokens cut it; a byte-level tokenizer cuts within characters."""
    transcript = Transcript(tiny.tokenizer(), stops)
    pieces = []
    for byte in tiny.tokenizer()(text)["input_ids"] if text else []:
        pieces.append(transcript.push(byte))
        if transcript.stopped:
            break
    assert not any(REPLACEMENT in piece for piece in pieces)
    shown = "".join(pieces) + transcript.finish()
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
    else:
        assert transcript.stopped
        # of two stop strings the one that is complete first counts, unless one token completes both
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_an_unfinished_character_at_the_end_is_shown() -> None:
    transcript = Transcript(tiny.tokenizer())
    first = tiny.tokenizer()("😀")["input_ids"][0]
    assert (transcript.push(first), transcript.finish()) == ("", REPLACEMENT)


def test_stop_strings_end_answers(llama: Nugget2D, start: Start) -> None:
    whole = llama.generate("The keeper", max_new_tokens=12)
    made = start(llama)
    client = Client(llama, stop=["\x01", whole[3:6]])
    made.submit(client.job)
    got = client.result()
    assert "".join(event.text for event in got if isinstance(event, Text)) == whole[: whole.index(whole[3:6])]
    assert isinstance(got[-1], Finished) and got[-1].reason == "stop" and got[-1].tokens < 12


@pytest.mark.usefixtures("endless")
def test_long_work_does_not_hold_up_answers(llama: Nugget2D, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TURN", 16)
    monkeypatch.setattr(engine, "WORK_SECONDS", 0)
    events: list[str] = []
    made = start(llama, on_step=lambda answers: events.append("step"))
    made.submit(Client(llama, max_new_tokens=3000).job)
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def late(event: Event) -> None:
        if isinstance(event, (Finished, Made, Failed)):
            events.append("late")
            ended.put(event)

    pieces = split(llama.tokenizer, tiny.TEXT, llama.config.window)
    work = [
        Client(llama, tiny.TEXT[:900], max_new_tokens=1, emit=late).job,
        Compression(pieces, 4, None, emit=late, seconds=60),
    ]
    for job in work:
        turns = job.size // llama.config.window
        assert turns > 5
        while not events:
            time.sleep(0.01)
        before = len(events)
        made.submit(job)
        assert not isinstance(ended.get(timeout=60), Failed)
        assert events[before:].index("late") >= turns


def test_a_compression_is_that_of_compress(llama: Nugget2D, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TURN", 2 * llama.config.window)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    pieces = split(llama.tokenizer, tiny.TEXT, llama.config.window)
    start(llama).submit(Compression(pieces, 5, "int8", emit=events.put, seconds=60))
    made, wanted = events.get(timeout=60), llama.compress(tiny.TEXT, ratio=5, dtype="int8")
    assert isinstance(made, Made)
    assert made.memory.positions == wanted.positions
    assert made.memory.segments == wanted.segments
    for mine, theirs in zip(made.memory.keys, wanted.keys, strict=True):
        assert torch.allclose(mine.restore(), theirs.restore(), atol=0.05)


def test_a_compressed_head_reads_as_a_memory(llama: Nugget2D, start: Start) -> None:
    stored, head = llama.compress(tiny.TEXT[:200], ratio=3, dtype="int8", exact=True), tiny.TEXT[200:500]
    pieces = split(llama.tokenizer, head, llama.config.window)
    made = start(llama)
    memory = llama.compress(head, ratio=4)
    client = Client(llama, "The sea", head=pieces, head_ratio=4)
    made.submit(client.job)
    assert client.text() == llama.generate("The sea", memory=memory, max_new_tokens=12)
    both = Client(llama, "The sea", stored, head=pieces, head_ratio=4)
    made.submit(both.job)
    context = both.events.get(timeout=60)
    assert context == jobs.Context(
        tokens=stored.num_tokens + memory.num_tokens + len(llama.ids_after("The sea")[0]),
        stored=stored.num_tokens,
        nuggets=stored.num_nuggets + memory.num_nuggets,
        whole=len(llama.ids_after("The sea")[0]),
        unread=0,
    )
    assert both.text()


def test_one_rotation_serves_engines_that_number_slots(llama: Nugget2D) -> None:
    """Read from position k with all keys turned back by n - k, a memory says what it says from position n."""
    memory = llama.compress(tiny.TEXT[:200], ratio=4)
    nuggets, end = text_nuggets(llama, memory)
    back = end - nuggets.count
    turned = Nuggets(llama.rotation(nuggets.keys, torch.full((1, nuggets.count), -back)), nuggets.values)
    with torch.no_grad():
        wanted = llama.decode(nuggets, llama.ids_after("The sea"), prompt="continue", start=end)
        found = llama.decode(turned, llama.ids_after("The sea"), prompt="continue", start=nuggets.count)
        unturned = llama.decode(nuggets, llama.ids_after("The sea"), prompt="continue", start=nuggets.count)
    assert back > 20
    assert torch.allclose(found, wanted, atol=1e-3)
    assert not torch.allclose(unturned, wanted, atol=1e-1)


@pytest.mark.usefixtures("endless")
def test_a_cancelled_job_leaves_its_slot(llama: Nugget2D, start: Start) -> None:
    made = start(llama, slots=1)
    first, second, third = Client(llama, max_new_tokens=3000), Client(llama), Client(llama)
    for client in (first, second, third):
        made.submit(client.job)
    first.wait_for_text()
    assert (made.num_running, made.num_waiting) == (1, 2)
    second.job.cancel()
    first.job.cancel()
    assert third.text()
    assert second.events.empty()
    assert not any(isinstance(first.events.get(), (Finished, Failed)) for _ in range(first.events.qsize()))


@pytest.mark.usefixtures("endless")
def test_what_cannot_wait_is_refused(llama: Nugget2D, start: Start) -> None:
    made = start(llama, slots=1, queue=1)
    running, waiting = Client(llama, max_new_tokens=3000), Client(llama)
    made.submit(running.job)
    running.wait_for_text()
    made.submit(waiting.job)
    with pytest.raises(OverloadError, match="1 requests are waiting"):
        made.submit(Client(llama).job)
    running.job.cancel()
    assert waiting.text()
    made.submit(Client(llama).job)


@pytest.mark.usefixtures("endless")
def test_time_limits_hold_for_those_who_run_and_who_wait(llama: Nugget2D, start: Start) -> None:
    made = start(llama, slots=1)
    running, waiting = Client(llama, max_new_tokens=3000, seconds=0.5), Client(llama, seconds=0.3)
    made.submit(running.job)
    made.submit(waiting.job)
    assert isinstance(waiting.error(), TimeLimitError)
    assert isinstance(running.error(), TimeLimitError)
    after = Client(llama)
    made.submit(after.job)
    assert after.text()


def test_a_failure_is_its_own(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.trained("gpt2", "lora")
    made = start(model)
    too_long, fine = Client(model, max_new_tokens=5000), Client(model)
    made.submit(too_long.job)
    made.submit(fine.job)
    assert isinstance(too_long.error(), InputError)
    assert fine.text()
    broken, survivor = Client(model), Client(model, " and")

    def out_of_memory(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(batch, "read", out_of_memory)
        made.submit(broken.job)
        assert "no memory" in str(broken.error())
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "row", out_of_memory)  # no room in the batch
        homeless = Client(model)
        made.submit(homeless.job)
        assert "no memory" in str(homeless.error())
    made.submit(survivor.job)
    assert survivor.text() == model.generate(" and", max_new_tokens=12)


@pytest.mark.usefixtures("endless")
def test_closing_fails_what_is_not_done(llama: Nugget2D) -> None:
    made = Engine(llama, slots=1, queue=5)
    running, waiting = Client(llama, max_new_tokens=3000), Client(llama)
    made.submit(running.job)
    made.submit(waiting.job)
    running.wait_for_text()
    made.close()
    assert isinstance(running.error(), ShutdownError)
    assert isinstance(waiting.error(), ShutdownError)
    with pytest.raises(ShutdownError):
        made.submit(Client(llama).job)
