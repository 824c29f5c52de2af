"""What streams are made of: text in parts, eviction, the threshold, and whole texts in parallel."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import InputError
from nugget2d.inference.placement import join_rows
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.losses import token_losses
from nugget2d.modeling.parameters import Role
from nugget2d.modeling.selection import count_nuggets
from nugget2d.streaming.eviction import evict, keep_counts
from nugget2d.streaming.feed import LONGEST, TextFeed
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import Way, mixed_logits
from nugget2d.text.segmentation import tokenize
from nugget2d.training.objectives import stream_loss

# ---- text in parts ----


@given(st.text(alphabet="ab \n.é😀", max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_parts_of_text_are_tokens_of_the_whole(text: str, cuts: list[int]) -> None:
    feed, ids, start = TextFeed(tiny.tokenizer()), [], 0
    for cut in sorted({*cuts, len(text)}):
        ids += feed.push(text[start:cut])
        start = max(start, cut)
    assert ids + feed.flush() == tokenize(tiny.tokenizer(), text)[0]


def test_endless_words_are_not_held_for_ever() -> None:
    text = "x" * (3 * LONGEST + 7)
    whole, parts = TextFeed(tiny.tokenizer()), TextFeed(tiny.tokenizer())
    expected = whole.push(text)
    assert len(tiny.tokenizer().decode(expected)) == 3 * LONGEST
    assert [token for part in text for token in parts.push(part)] == expected


# ---- eviction ----


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 100))
def test_the_oldest_give_way(counts: list[int], most: int) -> None:
    kept = keep_counts(counts, most)
    assert sum(kept) == min(most, sum(counts))
    assert all(0 <= after <= before for after, before in zip(kept, counts, strict=True))
    first = next(index for index, count in enumerate(kept) if count)
    assert kept[first + 1 :] == counts[first + 1 :]


def test_reduced_memories_keep_their_last_nuggets(llama: Nugget2D) -> None:
    memories = [llama.compress(text, ratio=2) for text in (tiny.TEXT[:40], tiny.TEXT[40:80])]
    newest = memories[1].num_nuggets
    reduced = evict(memories, newest + 3)
    assert [memory.num_nuggets for memory in reduced] == [3, newest]
    assert reduced[1] is memories[1]
    assert reduced[0].spans[-1] == memories[0].spans[-1] and set(reduced[0].spans) <= set(memories[0].spans)
    assert reduced[0].num_tokens == memories[0].num_tokens
    chosen = [memories[0].spans.index(span) for span in reduced[0].spans]
    assert torch.equal(reduced[0].keys[1].data, memories[0].keys[1].data[:, chosen])
    assert len(evict(memories, 1)) == 1
    assert llama.reconstruct(reduced[0])  # a memory like any other


# ---- threshold ----


@pytest.mark.parametrize("ratio", [1, 3, 10])
def test_a_calibrated_stream_meets_the_ratio(ratio: float, tmp_path: Path) -> None:
    model = tiny.trained("llama", "copies", selection="learned")
    model.calibrate(tiny.TEXT, ratio)
    model.save_pretrained(tmp_path)
    model = Nugget2D.from_pretrained(tmp_path)
    threshold = model.config.threshold
    assert threshold is not None and threshold.ratio == ratio
    ids = model.ids(tiny.TEXT)[0]
    stream = model.stream(20)
    stream.append(ids)
    memory = stream.memory()
    assert memory.num_tokens / memory.num_nuggets == pytest.approx(ratio, rel=0.1)
    chosen = set(memory.positions)
    for start in range(0, len(ids), tiny.WINDOW):
        if stream.num_tokens - start > stream.num_uncompressed:  # the recent tokens are cut elsewhere
            scores = model.token_scores(ids[None, start : start + tiny.WINDOW])[0]
            above = {start + int(place) for place in (scores[:-1] > threshold.value).nonzero()}
            assert {place for place in chosen if start <= place < start + tiny.WINDOW - 1} == above


def test_a_ratio_that_is_given_counts(llama: Nugget2D) -> None:
    model = tiny.trained("llama", "copies", selection="learned", threshold={"ratio": 2, "value": -1e9})
    ids = tiny.random_ids(1, 100)[0]
    for stream, count in ((model.stream(20), 64), (model.stream(20, 4), 16)):
        stream.append(ids)
        assert stream.num_nuggets == count


@pytest.mark.parametrize(
    ("selection", "text", "ratio", "message"),
    [
        ("even", tiny.TEXT, 4, "does not go by scores"),
        ("learned", tiny.TEXT, 0.5, "ratio must be from 1"),
        ("learned", tiny.TEXT, 33, "to 32"),
        ("learned", "short", 4, "at least 32 are needed"),
    ],
)
def test_what_cannot_be_calibrated(selection: str, text: str, ratio: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.make("llama", "copies", selection=selection).calibrate(text, ratio)


# ---- in parallel ----


@pytest.fixture(scope="module", params=[(20, 4), (32, 3), (50, 3), (1, 2)], ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout(request.param[0], tiny.WINDOW, request.param[1])


def nuggets_of(model: Nugget2D, ids: torch.Tensor, layout: Layout, count: int = 8) -> Nuggets:
    rows = ids[:, : layout.segments * layout.chunk].reshape(-1, layout.chunk)
    encoded = model.encode(rows, [layout.chunk] * len(rows), [count] * len(rows))
    return join_rows(model, encoded.nuggets, len(ids), layout.segments, layout.chunk)


@pytest.fixture
def _eager() -> Iterator[None]:
    """FlexAttention has no kernel for every CPU; uncompiled it computes the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_eager")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("way", ["chunked", "flex"])
@torch.no_grad()
def test_all_ways_are_the_dense_mask(case: tuple[str, str], model: Nugget2D, layout: Layout, way: Way) -> None:
    if not tiny.KINDS[case[0]].movable:
        pytest.skip("its keys cannot move")
    ids = tiny.random_ids(2, layout.length)
    nuggets = nuggets_of(model, ids, layout)
    dense = mixed_logits(model, nuggets, ids, layout, "dense")
    assert torch.allclose(mixed_logits(model, nuggets, ids, layout, way), dense, atol=1e-4)
    blind = mixed_logits(model, Nuggets(nuggets.keys, [value * 2 for value in nuggets.values]), ids, layout, way)
    first = layout.recent_window + layout.chunk
    assert torch.allclose(blind[:, :first], dense[:, :first], atol=1e-4)
    assert not torch.allclose(blind[:, first:], dense[:, first:], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("role", ["decoder", "base"])
def test_older_segments_can_be_hidden(llama: Nugget2D, role: Role) -> None:
    """Chunks that gather only visible segments are the dense mask; the base sees no sinks."""
    ids = tiny.random_ids(1, 20 + 4 * tiny.WINDOW)
    near, all_of_them = (Layout(20, tiny.WINDOW, 4, visible) for visible in (1, None))
    nuggets = nuggets_of(llama, ids, near)
    found = mixed_logits(llama, nuggets, ids, near, "chunked", role=role)
    assert torch.allclose(found, mixed_logits(llama, nuggets, ids, near, "dense", role=role), atol=1e-4)
    everything = mixed_logits(llama, nuggets, ids, all_of_them, role=role)
    second = 20 + 2 * tiny.WINDOW  # the first chunk that has two segments behind it
    assert torch.allclose(found[:, :second], everything[:, :second], atol=1e-4)
    assert not torch.allclose(found[:, second:], everything[:, second:], atol=1e-2)
    if role == "base":
        decoded = mixed_logits(llama, nuggets, ids, near)
        assert not torch.allclose(found[:, tiny.WINDOW + 20 :], decoded[:, tiny.WINDOW + 20 :], atol=1e-2)


@torch.no_grad()
def test_in_parallel_is_one_by_one(case: tuple[str, str], model: Nugget2D, plain: Nugget2D, layout: Layout) -> None:
    """Trained adapters differ in the first step, which a stream's base reads (see `mixed_logits`); fresh ones not."""
    if not tiny.KINDS[case[0]].movable:
        pytest.skip("its keys cannot move")
    model = plain if case[1] == "lora" else model
    ids = tiny.random_ids(1, layout.length)
    logits = mixed_logits(model, nuggets_of(model, ids, layout), ids, layout)
    stream = model.stream(layout.recent_window, 4)
    for token, expected in zip(ids[0].tolist(), logits[0], strict=True):
        stream.append([token])
        assert torch.allclose(stream.logits, expected, atol=1e-4)
    assert stream.num_nuggets == layout.segments * 8


def test_gradients_are_those_of_the_dense_mask(layout: Layout) -> None:
    """To both parameter sets, the soft prompt and, through the straight-through term, the scorer."""

    def gradients(way: Way) -> list[torch.Tensor]:
        model = tiny.trained("llama", "copies", selection="learned")
        ids = tiny.random_ids(2, layout.length)
        logits = mixed_logits(model, nuggets_of(model, ids, layout), ids, layout, way)
        token_losses(logits[:, :-1], ids[:, 1:]).mean().backward()
        encoder = model.parameters_by_role.encoder_parameters()
        decoder = model.parameters_by_role.decoder_parameters()
        wanted = [encoder[0], decoder[1], model.prompts["continue"], model.flag, model.scorer.hidden.weight]
        found = [parameter.grad for parameter in wanted]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found)
        return [gradient for gradient in found if gradient is not None]

    for first, second in zip(gradients("chunked"), gradients("dense"), strict=True):
        assert torch.allclose(first, second, atol=1e-5)


def test_the_objective_is_the_loss_of_a_stream(llama: Nugget2D) -> None:
    layout = Layout(recent_window=20, chunk=tiny.WINDOW, steps=4)
    ids = tiny.random_ids(2, layout.length)
    count = count_nuggets([tiny.WINDOW], 4)[0]
    with torch.no_grad():
        loss, _ = stream_loss(llama, ids, layout, count, llama.config.selection, torch.Generator())
    expected = []
    for row in ids:
        stream = llama.stream(layout.recent_window, 4)
        expected.append(stream.append_scored(row)[layout.recent_window + layout.chunk + 1 :])
    assert float(loss) == pytest.approx(float(torch.cat(expected).mean()), abs=1e-4)


def test_a_layout_of_another_length_is_refused(llama: Nugget2D) -> None:
    with pytest.raises(InputError, match="the layout is one of"):
        mixed_logits(llama, None, tiny.random_ids(1, 50), Layout(20, 32, 2))
