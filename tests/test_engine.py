"""Continuous batching: every answer is what it would be alone, and nobody waits for another."""

import math
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, ModelError, ShutdownError, TimeLimitError
from nugget2d.inference.prefix import prefix
from nugget2d.inference.prompting import stop_tokens
from nugget2d.inference.sampling import Sampler
from nugget2d.memory.states import States
from nugget2d.methods.options import CompressOptions
from nugget2d.modeling.cache import Nuggets, cached_states
from nugget2d.server import batch, engine, jobs
from nugget2d.server.batch_cache import BatchCache
from nugget2d.server.engine import Engine
from nugget2d.server.events import ContextSize, Event, Failed, Finished, Made, Text
from nugget2d.server.jobs import Compression, Generation
from nugget2d.text.detokenizer import Transcript
from test_sampling import LOGITS, SEEDS, TEMPERATURES, TOP_PS

pytestmark = pytest.mark.slow

PROMPTS = ["The keeper", "Seven, he would say to the dog", " and", "In winter the road was closed " * 3]
# what differs for a padded batch: two weight sets on one base, sliding windows, learned positions, part of a head
KINDS = [("llama", "lora"), ("gemma3", "copies"), ("gpt2", "lora"), ("neox", "lora")]

Start = Callable[..., Engine]


class Client:
    """Sends one job and collects what comes."""

    ends = staticmethod(lambda model: stop_tokens(model.lm.generation_config, model.tokenizer))

    def __init__(self, model: Nugget2D, prompt: str = "The keeper", memory: Memory | None = None, **options: Any):
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.prompt, self.memory = prompt, memory
        ids = (model.ids(prompt) if memory is None else model.ids_after(prompt))[0].tolist()
        if memory is None and model.start_token is not None and not options.get("prefix"):
            ids = [model.start_token, *ids]
        drawing = {name: options.pop(name) for name in ("temperature", "top_p", "seed") if name in options}
        sampler = options.pop("sampler", None) or Sampler(**{"seed": 0} | drawing)
        transcript = Transcript(model.tokenizer, options.pop("stop", ()))
        defaults = {"max_new_tokens": 12, "seconds": 60, "emit": self.events.put, "ends": Client.ends(model)}
        self.job = options.pop("job", Generation)(
            ids, memory=memory, sampler=sampler, transcript=transcript, **defaults | options
        )

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

    def make(model: Nugget2D, max_num_seqs: int = 8, queue: int = 64, **options: Any) -> Engine:
        engines.append(Engine(model, max_num_seqs=max_num_seqs, queue=queue, **options))
        return engines[-1]

    yield make
    for made in engines:
        made.close()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends an answer before its last, however fast the machine is."""
    monkeypatch.setattr(Client, "ends", lambda model: frozenset())


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
    made = start(model, max_num_seqs=5)
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
    monkeypatch.setattr("nugget2d.methods.nugget.method.STEP_TOKENS", 16)
    monkeypatch.setattr(engine, "WORK_SECONDS", 0)
    events: list[str] = []
    made = start(llama, on_step=lambda answers: events.append("step"))
    made.submit(Client(llama, max_new_tokens=3000).job)
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def late(event: Event) -> None:
        if isinstance(event, (Finished, Made, Failed)):
            events.append("late")
            ended.put(event)

    tokens = len(llama.ids(tiny.TEXT)[0])
    work = [
        Client(llama, tiny.TEXT[:900], max_new_tokens=1, emit=late).job,
        Compression(tiny.TEXT, tokens, CompressOptions.of(llama, ratio=4), emit=late, seconds=60),
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


@pytest.mark.parametrize("more", [{}, {"target_accuracy": 1.0, "exact": True}], ids=["steps", "exact"])
def test_a_compression_without_end_has_a_time_limit(
    more: dict[str, Any], llama: Nugget2D, start: Start, endless: None
) -> None:
    """It neither holds up answers, nor leaves a trace in what they compute."""
    made = start(llama)
    alone, bystander = (Client(llama, max_new_tokens=60) for _ in range(2))
    made.submit(alone.job)
    wanted = alone.text()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    how = CompressOptions.of(llama, ratio=4, optimize_steps=10**6, **more)
    made.submit(Compression(tiny.TEXT, 1000, how, emit=events.put, seconds=1))
    made.submit(bystander.job)
    assert bystander.text() == wanted
    ended = events.get(timeout=30)
    assert isinstance(ended, Failed) and isinstance(ended.error, TimeLimitError)


def test_a_prefill_pauses(llama: Nugget2D, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nugget2d.methods.whole_context.STEP_TOKENS", 16)
    how, text = CompressOptions.of(llama, ratio=4, method="knorm"), tiny.TEXT[:300]
    left = list(how.make().steps(llama, [text], how.budget))
    assert len(left) > 3 and left == sorted(left, reverse=True)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    start(llama).submit(Compression(text, 100, how, emit=events.put, seconds=60))
    made, wanted = events.get(timeout=60), llama.compress(text, ratio=4, method="knorm")
    assert isinstance(made, Made)
    for mine, theirs in zip(made.memory.keys, wanted.keys, strict=True):
        assert torch.allclose(mine.restore(), theirs.restore(), atol=1e-4)


@pytest.mark.filterwarnings("ignore::nugget2d.errors.AccuracyWarning")
@pytest.mark.parametrize("more", [{"exact": True}, {"target_accuracy": 0.5}, {"optimize_steps": 1}])
def test_what_is_measured_pauses_as_often(
    llama: Nugget2D, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr("nugget2d.methods.nugget.method.STEP_TOKENS", 1)
    how = CompressOptions.of(llama, **more)
    pauses = list(how.make().steps(llama, [tiny.TEXT], how.budget))
    assert len(pauses) >= len(llama.compress(tiny.TEXT).segments) > 1


def test_a_compression_is_that_of_compress(llama: Nugget2D, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nugget2d.methods.nugget.method.STEP_TOKENS", 2 * llama.config.window)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    options = CompressOptions.of(llama, ratio=5, dtype="int8")
    start(llama).submit(Compression(tiny.TEXT, 100, options, emit=events.put, seconds=60))
    made, wanted = events.get(timeout=60), llama.compress(tiny.TEXT, ratio=5, dtype="int8")
    assert isinstance(made, Made)
    assert made.memory.positions == wanted.positions
    assert made.memory.segments == wanted.segments
    for mine, theirs in zip(made.memory.keys, wanted.keys, strict=True):
        assert torch.allclose(mine.restore(), theirs.restore(), atol=0.05)


def test_a_compressed_prefix_reads_as_a_memory(llama: Nugget2D, start: Start) -> None:
    stored, text = llama.compress(tiny.TEXT[:200], ratio=3, dtype="int8", exact=True), tiny.TEXT[200:500]
    options = CompressOptions.of(llama, ratio=4)
    made = start(llama)
    memory = llama.compress(text, ratio=4)
    client = Client(llama, "The sea", prefix=text, prefix_options=options)
    made.submit(client.job)
    assert client.text() == llama.generate("The sea", memory=memory, max_new_tokens=12)
    both = Client(llama, "The sea", stored, prefix=text, prefix_options=options)
    made.submit(both.job)
    context = both.events.get(timeout=60)
    assert context == ContextSize(
        tokens=stored.num_tokens + memory.num_tokens + len(llama.ids_after("The sea")[0]),
        stored=stored.num_tokens,
        nuggets=stored.num_nuggets + memory.num_nuggets,
        whole=len(llama.ids_after("The sea")[0]),
        unread=0,
    )
    assert both.text()


def test_one_rotation_serves_engines_that_number_cache_entries(llama: Nugget2D) -> None:
    """Read from position k with all keys turned back by n - k, a memory says what it says from position n."""
    memory = llama.compress(tiny.TEXT[:200], ratio=4)
    nuggets, end = Nuggets(*cached_states(prefix(llama, memory).cache)), memory.num_tokens
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
def test_a_cancelled_job_leaves_its_sequence_slot(llama: Nugget2D, start: Start) -> None:
    made = start(llama, max_num_seqs=1)
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
def test_owners_take_turns(llama: Nugget2D, start: Start) -> None:
    made = start(llama, max_num_seqs=1)
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def submit(name: str) -> None:
        def emit(event: Event) -> None:
            if isinstance(event, (Finished, Failed)):
                ended.put(name)

        made.submit(Client(llama, owner=name[0], emit=emit, max_new_tokens=2).job)

    first = Client(llama, owner="a", max_new_tokens=3000)
    made.submit(first.job)
    first.wait_for_text()
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        submit(name)
    first.job.cancel()
    assert [ended.get(timeout=60) for _ in range(6)] == ["b1", "c1", "a1", "b2", "a2", "a3"]


@pytest.mark.usefixtures("endless")
def test_rows_that_would_not_fit_side_by_side_wait(llama: Nugget2D, start: Start) -> None:
    """All rows of a batch are as long as the longest."""
    steps: list[int] = []
    made = start(llama, max_entries=300, on_step=steps.append)
    clients = [Client(llama, entries=entries, max_new_tokens=40) for entries in (140, 100, 160, 60)]
    for client in clients:
        made.submit(client.job)
    for client in clients:
        assert client.text()
    assert max(steps) == 2


@pytest.mark.usefixtures("endless")
def test_time_limits_hold_for_those_who_run_and_who_wait(llama: Nugget2D, start: Start) -> None:
    made = start(llama, max_num_seqs=1)
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
        patch.setattr(BatchCache, "row", out_of_memory)  # no room in the batch
        homeless = Client(model)
        made.submit(homeless.job)
        assert "no memory" in str(homeless.error())
    made.submit(survivor.job)
    assert survivor.text() == model.generate(" and", max_new_tokens=12)


@pytest.mark.usefixtures("endless")
def test_closing_fails_what_is_not_done(llama: Nugget2D) -> None:
    made = Engine(llama, max_num_seqs=1, queue=5)
    running, waiting = Client(llama, max_new_tokens=3000), Client(llama)
    made.submit(running.job)
    made.submit(waiting.job)
    running.wait_for_text()
    made.close()
    assert isinstance(running.error(), ShutdownError)
    assert isinstance(waiting.error(), ShutdownError)
    with pytest.raises(ShutdownError):
        made.submit(Client(llama).job)


# ---- one job's trouble ----


class Hostile(Sampler):
    """Sees logits of its own."""

    def __init__(self, value: float, **options: Any) -> None:
        super().__init__(**options)
        self.value = value

    def choose(self, logits: torch.Tensor) -> int:
        return super().choose(torch.full_like(logits, self.value))


def test_no_numbers_of_one_job_touch_another(llama: Nugget2D, start: Start) -> None:
    """All parameters of an answer at their extremes, side by side with one that stays what it is alone."""
    made = start(llama)
    wanted = llama.generate("The keeper", max_new_tokens=20)
    beside = llama.generate(" and", max_new_tokens=3)
    temperatures, values = st.sampled_from(TEMPERATURES), st.sampled_from([*LOGITS, math.nan])
    top_ps, seeds = st.sampled_from(TOP_PS), st.sampled_from(SEEDS)
    hostile = st.builds(Hostile, values, temperature=temperatures, top_p=top_ps, seed=seeds)
    harmless = st.builds(Sampler, temperatures, top_ps, seeds)
    # what ends it at once, in the middle, never, or holds back all of its text
    stops = st.lists(st.sampled_from([beside[:1], beside, beside[1:] + "\0", "\0" * 200, " ", "é"]), max_size=16)
    lengths = st.sampled_from([1, 2, 6, 30])

    @settings(max_examples=40)
    @given(st.lists(st.tuples(hostile | harmless, stops, lengths), min_size=1, max_size=3))
    def check(numbers: list[tuple[Sampler, list[str], int]]) -> None:
        bystander = Client(llama, max_new_tokens=20)
        others = [
            Client(llama, " and", sampler=sampler, stop=stop, max_new_tokens=length)
            for sampler, stop, length in numbers
        ]
        for client in [*others, bystander]:
            made.submit(client.job)
        assert bystander.text() == wanted
        for client, (sampler, _, _) in zip(others, numbers, strict=True):
            damaged = isinstance(sampler, Hostile) and (math.isnan(sampler.value) or sampler.value == -math.inf)
            ended = client.result()[-1]
            assert isinstance(ended, Failed if damaged else Finished)

    check()


@pytest.mark.parametrize("part", ["sampler", "transcript"])
def test_a_failure_in_the_middle_of_one_answer_is_its_own(
    part: str, llama: Nugget2D, start: Start, endless: None
) -> None:
    made = start(llama)
    wanted = Client(llama, max_new_tokens=40)
    made.submit(wanted.job)
    alone = wanted.text()
    broken, bystander = Client(llama, " and", max_new_tokens=3000), Client(llama, max_new_tokens=40)
    made.submit(broken.job)
    broken.wait_for_text()
    made.submit(bystander.job)
    bystander.wait_for_text()

    def fail(*arguments: object) -> None:
        raise RuntimeError("broken")

    for name in ("choose", "push"):
        setattr(getattr(broken.job, f"_{part}"), name, fail)
    assert "broken" in str(broken.error())
    rest = bystander.text()
    assert rest and alone.endswith(rest)
    after = Client(llama, max_new_tokens=40)
    made.submit(after.job)
    assert after.text() == alone


class Damaged(Generation):
    """Reads states that are not numbers."""

    def work(self, model: Nugget2D) -> Iterator[int]:
        yield from super().work(model)
        for buffer in (buffer for buffers in self.cache._buffers for buffer in buffers):
            buffer.fill_(math.nan)


def test_states_that_are_not_numbers_stay_in_their_own_answer(llama: Nugget2D, start: Start) -> None:
    """Nor does a later answer see them, in the row that they leave."""
    made = start(llama)
    for _ in range(2):
        clients = [Client(llama, job=Damaged), Client(llama), Client(llama, "Seven")]
        for client in clients:
            made.submit(client.job)
        assert isinstance(clients[0].error(), ModelError)
        for client in clients[1:]:
            assert client.text() == llama.generate(client.prompt, max_new_tokens=12)


@pytest.mark.parametrize("options", [{}, {"method": "knorm"}], ids=["trained", "training-free"])
def test_a_damaged_memory_fails_its_own_answers(options: dict[str, Any], llama: Nugget2D, start: Start) -> None:
    """However they are drawn: with sampling, numbers that are none have ended everybody's answers."""
    made, memory = start(llama), llama.compress(tiny.TEXT[:200], ratio=4, **options)
    values = [States.store(torch.full_like(states.restore(), math.nan), "float32") for states in memory.values]
    damaged = memory.with_states(memory.keys, values)
    bystander = Client(llama, max_new_tokens=40)
    made.submit(bystander.job)
    for drawing in ({"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0}, {"temperature": 1e-6}, {}):
        broken = Client(llama, " and", damaged, **drawing)
        made.submit(broken.job)
        assert isinstance(broken.error(), ModelError)
        reader = Client(llama, " and", memory)
        made.submit(reader.job)
        assert reader.text() == llama.generate(" and", memory=memory, max_new_tokens=12)
    assert bystander.text() == llama.generate("The keeper", max_new_tokens=40)


def test_a_long_row_that_was_left_is_forgotten_when_the_next_comes() -> None:
    cache = BatchCache()

    def add(length: int, capacity: int) -> None:
        states = torch.full((1, 2, length, 4), float(length))
        cache.add([states], [states], capacity)

    add(3, 8)
    add(5, 1000)
    add(2, 10)
    assert cache._buffers[0][0].shape == (4, 2, 1000, 4)
    cache.drop(1)
    add(4, 9)
    assert cache._buffers[0][0].shape == (4, 2, 10, 4)
    assert [cache.row(row)[0][0][0, 0, :, 0].tolist() for row in range(3)] == [[3] * 3, [2] * 2, [4] * 4]


def test_a_row_that_is_left_is_empty() -> None:
    """What is masked still takes part in a sum with weight 0, and 0 times NaN is NaN."""
    cache = BatchCache()

    def add(value: float, length: int) -> None:
        states = torch.full((1, 2, length, 4), value)
        cache.add([states], [states], 8)

    add(math.nan, 6)
    add(2.0, 3)
    add(math.nan, 7)
    cache.drop(2)
    cache.drop(0)
    add(3.0, 1)
    add(4.0, 5)
    new = torch.full((3, 2, 1, 4), 7.0)
    for states in cache.update(new, new, 0):
        assert states[:, 0, :, 0].tolist() == [[2, 2, 2, 7, 0, 0], [3, 7, 0, 0, 0, 0], [4, 4, 4, 4, 4, 7]]
