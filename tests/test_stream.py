"""Streams: independent of how a text is divided, the plain LM until the window first slides, bounded for ever after."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, MismatchError, ModelError
from nugget2d.modeling.hooks import find_layers
from nugget2d.streaming.stream import Stream

RECENT = 20
CHUNK = tiny.WINDOW


@pytest.fixture
def movable(case: tuple[str, str]) -> None:
    """Models with learned positions cannot stream; one test says so."""
    if not tiny.KINDS[case[0]].movable:
        pytest.skip("its keys cannot move")


def in_parts(stream: Stream, ids: list[int], sizes: list[int]) -> torch.Tensor:
    """Feed `ids` in parts; the losses of all."""
    losses, start = [], 0
    for size in sizes:
        losses.append(stream.append_scored(ids[start : start + size]))
        start += size
    losses.append(stream.append_scored(ids[start:]))
    return torch.cat(losses)


def same(first: Stream, second: Stream) -> bool:
    """Whether both have read as much and predict alike."""
    return first.num_tokens == second.num_tokens and torch.allclose(first.logits, second.logits, atol=1e-4)


# ---- what it computes ----


@pytest.mark.usefixtures("movable")
def test_parts_do_not_matter(model: Nugget2D) -> None:
    ids = tiny.random_ids(1, 160)[0].tolist()
    whole, parts = model.stream(RECENT, 4), model.stream(RECENT, 4)
    expected = whole.append_scored(ids)
    assert len(expected) == 160
    got = in_parts(parts, ids, [1, 1, 50, 2, *[1] * 40, 30])
    assert torch.allclose(got, expected, atol=1e-4)
    assert same(whole, parts) and whole.num_nuggets == parts.num_nuggets > 0


def test_cut_text_is_the_same_text(llama: Nugget2D) -> None:
    whole, parts = llama.stream(RECENT, 4), llama.stream(RECENT, 4)
    whole.append(tiny.TEXT)
    size = len(tiny.TEXT) // 100
    for start in range(0, len(tiny.TEXT), size):
        parts.append(tiny.TEXT[start : start + size])
    assert same(whole, parts)
    assert whole.num_tokens == llama.ids(tiny.TEXT).shape[1]


@pytest.mark.usefixtures("movable")
def test_a_window_that_never_slid_is_the_plain_lm(model: Nugget2D) -> None:
    ids = tiny.random_ids(1, RECENT + CHUNK)
    stream = model.stream(RECENT, 4)
    losses = stream.append_scored(ids[0])
    start = torch.full((1, 1), model.start_token)
    expected = model.decode(None, torch.cat([start, ids], dim=1), prompt=None)[0]
    assert torch.allclose(stream.logits, expected[-1], atol=1e-4)
    assert torch.allclose(losses, nn.functional.cross_entropy(expected[:-1], ids[0], reduction="none"), atol=1e-4)
    before = stream.logits
    stream.append(ids[0, :1])  # and now it slides
    expected = model.decode(None, torch.cat([start, ids, ids[:, :1]], dim=1), prompt=None)[0, -1]
    assert stream.num_nuggets == CHUNK // 4 and not torch.allclose(stream.logits, expected, atol=1e-2)
    assert not torch.equal(stream.logits, before)


@pytest.mark.usefixtures("movable")
@pytest.mark.parametrize("ratio", [1, 4])
def test_going_on_from_a_memory_is_reading_it(model: Nugget2D, ratio: float) -> None:
    """At any ratio, one nugget a token included: what a stream opens with is what `score` and `generate` read."""
    memory = model.compress(tiny.TEXT[:400], ratio=ratio)
    stream = model.stream(RECENT, ratio, memory=memory)
    assert stream.num_tokens == memory.num_tokens and stream.num_nuggets == memory.num_nuggets
    assert stream.score("the sea was calm") == pytest.approx(model.score("the sea was calm", memory=memory), abs=1e-4)
    written = "".join(stream.generate("the sea", max_new_tokens=8))
    assert written == model.generate("the sea", memory=memory, max_new_tokens=8)


def test_nuggets_out_of_reach_are_held_but_not_read() -> None:
    model = tiny.trained("llama", "copies", context=160)
    reach = 160 - 2 - RECENT - CHUNK
    parts = [model.compress(tiny.TEXT[start : start + 60], ratio=4) for start in range(0, 900, 60)]
    long = Memory.join(parts)
    stream = model.stream(RECENT, 4, memory=long)
    assert stream.num_nuggets == long.num_nuggets
    in_reach = sum(position >= long.num_tokens - reach for position in long.positions)
    assert stream.cache_size == in_reach + 1 < long.num_nuggets
    assert torch.allclose(stream.logits, model.stream(RECENT, 4, memory=Memory.join(parts[-6:])).logits, atol=1e-4)
    assert not torch.allclose(stream.logits, model.stream(RECENT, 4, memory=parts[-1]).logits, atol=1e-2)


def test_long_streams_stay_in_bounds() -> None:
    """Far beyond the context: cache and bytes no longer grow, and positions turn without losing precision."""
    model = tiny.trained("llama", "copies", context=160)
    length, most = 1500, 24
    stream = model.stream(RECENT, 4, max_nuggets=most)
    ids = tiny.random_ids(1, length)[0]
    memory = model.compress("one nugget", ratio=100)
    for block in ids.split(37):
        stream.append(block)
        assert stream.nbytes <= (RECENT + CHUNK + 1 + 2 * most) * memory.nbytes
        assert min(RECENT, stream.num_tokens) <= stream.num_uncompressed <= RECENT + CHUNK
        assert stream.cache_size <= RECENT + CHUNK + 1 + most and stream.num_nuggets <= most
    assert stream.num_tokens == length
    # three layers look back three windows, and nuggets at the text of their segment: what was before is forgotten
    late = model.stream(RECENT, 4, max_nuggets=most)
    late.append(ids[length // CHUNK * CHUNK - 12 * CHUNK :])
    assert torch.allclose(late.logits, stream.logits, atol=1e-4)


def test_sliding_windows_hide_nothing() -> None:
    """All positions in use, and a state for each: as many as a layer with a sliding window keeps."""
    ids = tiny.random_ids(1, 700)[0]
    sliding, full = (tiny.trained(kind, "copies", context=512) for kind in ("mistral-window", "mistral"))
    streams = [model.stream(RECENT, 1) for model in (sliding, full)]
    for stream in streams:
        stream.append(ids[:-1])
        stream.append(ids[-1:])
    assert same(*streams) and streams[0].cache_size > 512 - CHUNK


def test_without_a_limit_all_nuggets_are_held(llama: Nugget2D) -> None:
    stream = llama.stream(RECENT, 4)
    stream.append(tiny.random_ids(1, RECENT + 5 * CHUNK + 1)[0])
    assert stream.num_nuggets == 5 * CHUNK // 4
    assert stream.cache_size == stream.num_nuggets + 1 + stream.num_uncompressed


@pytest.mark.parametrize("chunk", [3, 8, 20])
def test_chunks_of_other_lengths(llama: Nugget2D, chunk: int) -> None:
    """Pieces do not matter, the ratio is met (or one nugget a chunk), the cache stays in bounds, rewinding is exact."""
    ids = tiny.random_ids(1, 90)[0].tolist()
    whole, parts = (llama.stream(RECENT, 4, 6, chunk=chunk) for _ in range(2))
    expected = whole.append_scored(ids)
    assert torch.allclose(in_parts(parts, ids, [1, 50, 2, *[1] * 10]), expected, atol=1e-4)
    assert same(whole, parts)
    assert RECENT <= whole.num_uncompressed <= RECENT + chunk and whole.cache_size == 6 + 1 + whole.num_uncompressed
    parts.rewind(chunk)
    never = llama.stream(RECENT, 4, 6, chunk=chunk)
    never.append(ids[:-chunk])
    assert same(parts, never)
    whole = llama.stream(RECENT, 4, chunk=chunk)
    whole.append(ids)
    left = 90 - whole.num_uncompressed
    assert left % chunk == 0 and whole.num_nuggets == (left // 3 if chunk == 3 else -(-left // 4))


# ---- rewind ----


@pytest.mark.usefixtures("movable")
def test_rewound_is_never_read(model: Nugget2D) -> None:
    """Within the window and across its last slide."""
    ids = tiny.random_ids(1, RECENT + 2 * CHUNK + 6)[0].tolist()
    for count in (0, 1, 5, 6, 7, 20, CHUNK):
        stream, never = model.stream(RECENT, 4), model.stream(RECENT, 4)
        stream.append(ids)
        stream.rewind(count)
        never.append(ids[: len(ids) - count])
        assert same(stream, never), count
        for one in (stream, never):
            one.append(ids[:40])
        assert same(stream, never), count


def test_rewinding_too_far_is_refused_and_harmless(llama: Nugget2D) -> None:
    stream, never = llama.stream(RECENT, 4), llama.stream(RECENT, 4)
    ids = tiny.random_ids(1, RECENT + 4 * CHUNK + 6)[0]
    for one in (stream, never):
        one.append(ids)
    with pytest.raises(InputError, match=f"the last {6 + CHUNK - 1} can"):
        stream.rewind(6 + CHUNK)
    with pytest.raises(InputError, match="cannot rewind -1"):
        stream.rewind(-1)
    assert same(stream, never)
    stream.rewind(6 + CHUNK - 1)
    assert stream.num_tokens == RECENT + 3 * CHUNK + 1


def test_a_stream_can_be_rewound_to_its_start(llama: Nugget2D) -> None:
    stream = llama.stream(RECENT, 4)
    stream.append("one two three")
    assert stream.logits is not None  # the last word has been read
    stream.rewind(stream.num_tokens)
    assert stream.num_tokens == 0 and same(stream, llama.stream(RECENT, 4))


# ---- memory ----


def test_the_memory_of_a_short_text_is_what_compress_makes(llama: Nugget2D) -> None:
    text = tiny.TEXT[:60]
    stream = llama.stream(RECENT, 4)
    stream.append(text)
    memory, expected = stream.memory(), llama.compress(text, ratio=4)
    assert memory.spans == expected.spans and memory.segments == expected.segments
    assert all(torch.equal(a.data, b.data) for a, b in zip(memory.keys, expected.keys, strict=True))


def test_the_memory_is_of_everything_and_comes_back(llama: Nugget2D, tmp_path: Path) -> None:
    stream = llama.stream(RECENT, 1)
    stream.append(tiny.TEXT[:500])
    memory = stream.memory()
    assert memory.num_tokens == memory.num_nuggets == stream.num_tokens == llama.ids(tiny.TEXT[:500]).shape[1]
    assert "".join(tiny.TEXT[start:end] for start, end in memory.spans) == tiny.TEXT[:500]
    assert all(a[1] <= b[0] for a, b in pairwise(memory.spans))
    memory.save(tmp_path / "a.nugget")
    loaded = Memory.load(tmp_path / "a.nugget")
    assert llama.reconstruct(loaded) == llama.reconstruct(memory)
    first, second = (llama.stream(RECENT, 4, memory=one) for one in (memory, loaded))
    assert same(first, second)
    assert first.memory().positions == memory.positions  # nothing read since: the same memory


def test_spans_of_characters_that_take_several_tokens(llama: Nugget2D) -> None:
    text = "a 😀 Café — 中文!"
    stream = llama.stream(RECENT, 1)
    stream.append(text)
    memory = stream.memory()
    assert memory.num_chars == len(text)
    assert {text[start:end] for start, end in memory.spans} >= {"😀", "é", "中"}


def test_the_ratio_is_met_exactly(llama: Nugget2D) -> None:
    stream = llama.stream(RECENT, 10)
    stream.append(tiny.random_ids(1, 777)[0])
    assert stream.memory().num_nuggets == -(-777 // 10)


def test_a_memory_of_another_model_is_refused(llama: Nugget2D) -> None:
    memory = tiny.trained("llama", "copies", seed=7).compress("some text", ratio=2)
    with pytest.raises(MismatchError):
        llama.stream(RECENT, 4, memory=memory)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"exact": True}])
def test_any_memory_can_be_gone_on_from(llama: Nugget2D, options: dict[str, object]) -> None:
    memory = llama.compress(tiny.TEXT[:200], ratio=4, **options)
    stream = llama.stream(RECENT, 4, memory=memory)
    stream.append(tiny.TEXT[200:600])
    assert stream.memory().num_tokens == stream.num_tokens


# ---- score and generate ----


@pytest.mark.usefixtures("movable")
def test_generate_is_a_loop_of_single_steps(model: Nugget2D) -> None:
    """Across a slide."""
    prompt = tiny.TEXT[:150]
    stream, loop = model.stream(RECENT, 4), model.stream(RECENT, 4)
    written = "".join(stream.generate(prompt, max_new_tokens=CHUNK))
    loop.append(prompt)
    ids: list[int] = []
    while len(ids) < CHUNK and (token := int(loop.logits.argmax())) != model.tokenizer.eos_token_id:
        scores = torch.tensor([loop.score([token]), loop.score([token - 1])])
        assert scores[0] <= scores[1]
        loop.append([token])
        ids.append(token)
    assert written == model.text(ids)
    assert same(stream, loop)


def test_scoring_leaves_the_stream_as_it_was(llama: Nugget2D) -> None:
    stream, other = llama.stream(RECENT, 4), llama.stream(RECENT, 4)
    for one in (stream, other):
        one.append(tiny.TEXT[:300])
    assert same(stream, other)
    score = stream.score(tiny.TEXT[300:700])  # slides, in a copy
    assert same(stream, other)
    assert score == pytest.approx(float(other.append_scored(tiny.TEXT[300:700]).mean()), abs=1e-5)


def test_stopping_to_ask_stops_writing(llama: Nugget2D) -> None:
    stream, other = llama.stream(RECENT, 4), llama.stream(RECENT, 4)
    parts = stream.generate("The lamp", max_new_tokens=50)
    first = next(parts)
    parts.close()
    written = stream.num_tokens - llama.ids("The lamp").shape[1]
    assert first and 1 <= written < 50
    assert list(other.generate("The lamp", max_new_tokens=written)) == [first]
    assert same(stream, other)


def test_sampling_follows_the_seed(llama: Nugget2D) -> None:
    def sample(seed: int) -> str:
        torch.manual_seed(seed)
        return "".join(llama.stream(RECENT, 4).generate("The lamp", max_new_tokens=12, temperature=1.5))

    assert sample(1) == sample(1) != sample(2)


def test_the_end_of_text_ends_writing_and_is_not_read(llama: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llama.stream(RECENT, 4)
    stream.append("The lamp")
    end = nn.functional.one_hot(torch.tensor(llama.tokenizer.eos_token_id), len(llama.tokenizer)).float()
    monkeypatch.setattr(Stream, "logits", property(lambda self: end))
    read = stream.num_tokens
    assert list(stream.generate()) == [] and stream.num_tokens == read


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent_window": 0}, "recent_window must be at least 1"),
        ({"recent_window": 4096}, "it can be 4030 at most"),
        ({"ratio": 0.5}, "ratio must be at least 1"),
        ({"ratio": float("nan")}, "ratio must be at least 1"),
        ({"max_nuggets": 0}, "max_nuggets must be at least 1"),
        ({"chunk": 0}, "chunk must be from 1 to the 32 tokens"),
        ({"chunk": 33}, "chunk must be from 1 to the 32 tokens"),
    ],
)
def test_bad_settings(llama: Nugget2D, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llama.stream(**options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([3, 10**6], "token 1 is 1000000"), ([-1], "token 0 is -1"), (["a"], "token 0 is 'a'"), ("a\ud800", "surrogate")],
)
def test_bad_tokens_leave_the_stream_as_it_was(llama: Nugget2D, tokens: object, message: str) -> None:
    stream, other = llama.stream(RECENT, 4), llama.stream(RECENT, 4)
    for one in (stream, other):
        one.append("The lamp burned and bur")
    for method in (stream.append, stream.append_scored, stream.score):
        with pytest.raises(InputError, match=message):
            method(tokens)  # type: ignore[arg-type]
    for one in (stream, other):
        one.append("ned on.")
    assert same(stream, other)


def test_nothing_to_do(llama: Nugget2D) -> None:
    stream = llama.stream(RECENT, 4)
    for action in (stream.memory, lambda: stream.score("")):
        with pytest.raises(InputError, match="nothing"):
            action()
    with pytest.raises(InputError, match="max_new_tokens"):
        stream.generate("a", max_new_tokens=0)
    with pytest.raises(InputError, match="temperature"):
        stream.generate("a", temperature=-1)
    assert stream.num_tokens == 0 and stream.append("") == 0 and len(stream.append_scored("")) == 0


def test_special_tokens_in_text_are_text(llama: Nugget2D) -> None:
    stream = llama.stream(RECENT, 1)
    stream.append(f"a {tiny.END} b")
    assert stream.memory().num_tokens == llama.ids(f"a {tiny.END} b").shape[1]
    assert llama.tokenizer.eos_token_id not in llama.ids(f"a {tiny.END} b")


def test_keys_that_cannot_move_cannot_stream() -> None:
    with pytest.raises(ModelError, match="cannot stream"):
        tiny.make("gpt2", "lora").stream()


def test_an_interrupt_leaves_the_stream_usable() -> None:
    """It comes when some layers have cached a token and others have not."""
    model = tiny.trained("llama", "copies")
    stream, other = model.stream(RECENT, 4), model.stream(RECENT, 4)
    ids = tiny.random_ids(1, 70)[0]
    stream.append(ids)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = find_layers(model.lm)[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream.append([7])
    hook.remove()
    other.append(ids)
    assert same(stream, other)
