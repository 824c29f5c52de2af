"""What every method must do, whatever it is: one suite over the registry.

A method that only this file knows passes it by registration alone: other tokens and another number of them for each
layer and head, so that a cache of ragged heads is saved, joined, searched, generated from and served.
"""

import json
from collections.abc import Callable, Iterator
from math import ceil, inf, nan
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.cli.options import RESERVED, compress_arguments
from nugget2d.errors import InputError, MismatchError, ModelError
from nugget2d.inference.scoring import score_ids
from nugget2d.inference.token_decoding import decode_tokens
from nugget2d.memory.states import STORE_DTYPES, StoreDtype
from nugget2d.methods.options import CompressOptions
from nugget2d.methods.registry import METHODS, method_class
from nugget2d.methods.whole_context import Context, Kept, WholeContextMethod
from nugget2d.modeling.selection import share_nuggets
from nugget2d.server.engine import Engine
from nugget2d.store import MemoryStore
from serving import serving
from test_engine import Client
from test_headwise import Row, dense, masks_by_layer

TEXT, OTHER = tiny.TEXT[:240], tiny.TEXT[500:640]
TARGET = " She measured the tower."


class Ragged(WholeContextMethod):
    """Random tokens, with one budget for all heads; one keeps the last token alone for as long as it can."""

    name: ClassVar[str] = "ragged"
    source: ClassVar[str] = "this test"

    seed: int = 0

    def select(self, context: Context, count: int) -> Kept:
        """Heads are the more favoured the later they come, but for the last one."""
        shape = len(context.keys), context.keys[0].shape[0], context.length
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))
        scores += torch.linspace(0, 0.8, shape[0] * shape[1]).view(*shape[:2], 1)
        scores[-1, -1] -= 2
        scores[..., -1] = inf
        kept = torch.zeros(scores.numel(), dtype=torch.bool)
        kept[scores.flatten().topk(count * shape[0] * shape[1]).indices] = True
        return [[head.nonzero().flatten() for head in layer] for layer in kept.view(shape)]


ALL = [*METHODS, "ragged"]
TRAINING_FREE = [name for name in ALL if name == "ragged" or not method_class(name).needs_training]
# compressors, and LMs as they are: positions by rotation, of a part, in some layers, or learned; sliding windows
COMPRESSORS = ["llama", "gemma3", "gpt2"]
PLAIN = ["llama", "mistral-window", "smollm3", "neox", "opt"]
CASES = [
    *((method, "trained", kind) for method in ALL for kind in COMPRESSORS),
    *((method, "plain", kind) for method in TRAINING_FREE for kind in PLAIN),
]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "ragged", Ragged)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Nugget2D]:
    """Models by kind, each made once: with a compressor, or as `from_pretrained` loads a folder of an LM."""
    made: dict[tuple[str, str, int], Nugget2D] = {}

    def get(wrapper: str, kind: str, seed: int = 0) -> Nugget2D:
        key = wrapper, kind, seed
        if key not in made:
            if wrapper == "trained":
                made[key] = tiny.trained(kind, "lora", seed)
            else:
                folder = tmp_path_factory.mktemp("lm") / f"{kind}-{seed}"
                tiny.lm(kind, seed).save_pretrained(folder)
                tiny.tokenizer().save_pretrained(folder)
                made[key] = Nugget2D.from_pretrained(folder)
        return made[key]

    return get


def _slow_but(kind: str) -> tuple[pytest.MarkDecorator, ...]:
    """Quick runs take one architecture."""
    return () if kind == "llama" else (pytest.mark.slow,)


plain_kinds = pytest.mark.parametrize("kind", [pytest.param(kind, marks=_slow_but(kind)) for kind in PLAIN])


@pytest.fixture(params=[pytest.param(one, marks=_slow_but(one[2])) for one in CASES], ids="-".join)
def case(request: pytest.FixtureRequest, load: Callable[..., Nugget2D]) -> tuple[str, Nugget2D]:
    method, wrapper, kind = request.param
    return method, load(wrapper, kind)


@pytest.fixture
def method(case: tuple[str, Nugget2D]) -> str:
    return case[0]


@pytest.fixture
def model(case: tuple[str, Nugget2D]) -> Nugget2D:
    return case[1]


def tokens(model: Nugget2D, text: str) -> int:
    return model.ids(text).shape[1]


def assert_same(one: Memory, other: Memory) -> None:
    assert one.checksum == other.checksum


# ---- files ----


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_a_file_gives_the_memory_back(method: str, model: Nugget2D, dtype: StoreDtype, tmp_path: Path) -> None:
    memory = model.compress(TEXT, method=method, ratio=4, dtype=dtype)
    assert (memory.dtype, memory.kind) == (dtype, method_class(method).payload)
    assert memory.save(tmp_path / "a.nugget") == memory.total_nbytes > memory.nbytes
    for read in (Memory.load, Memory.map):
        loaded = read(tmp_path / "a.nugget")
        assert_same(loaded, memory)
        assert (loaded.spans, loaded.segments, loaded.reader) == (memory.spans, memory.segments, memory.reader)
        assert model.score(TARGET, memory=loaded) == model.score(TARGET, memory=memory)


def test_a_file_tells_method_and_configuration(method: str, model: Nugget2D, tmp_path: Path) -> None:
    model.compress(TEXT, method=method, ratio=4, dtype="int8").save(tmp_path / "a.nugget")
    record = Memory.load(tmp_path / "a.nugget").method
    assert record.name == method
    assert record.config == CompressOptions.of(model, method=method, dtype="int8").config
    assert record.config["dtype"] == "int8" and set(record.config) == set(method_class(method).model_fields)
    json.dumps(dict(record.config))


# ---- budgets ----


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_bytes_are_kept_to(method: str, model: Nugget2D, dtype: StoreDtype) -> None:
    """From too few to more than the whole text takes; and what they have room for is used."""

    def compress(**budget: int) -> Memory:
        return model.compress(TEXT, method=method, dtype=dtype, **budget)

    n = tokens(model, TEXT)
    parts = len(compress(nuggets=n).segments)
    least, most = compress(nuggets=parts).nbytes, compress(nuggets=n).nbytes
    each = (most - least) // (n - parts)
    for budget in (least, least + each - 1, least + each, (least + most) // 2, most - 1, most, 3 * most):
        memory = compress(nbytes=budget)
        assert memory.nbytes <= budget < memory.nbytes + each or memory.num_nuggets == n
        assert sum(states.nbytes for states in (*memory.keys, *memory.values)) == memory.nbytes
    for budget in (1, least - 1):
        with pytest.raises(InputError, match=r"raise|segments of at least one"):
            compress(nbytes=budget)


def test_nuggets_and_ratios_are_kept_to(method: str, model: Nugget2D) -> None:
    n = tokens(model, TEXT)
    parts = len(model.compress(TEXT, method=method).segments)
    for nuggets in (parts, parts + 1, n // 3, n - 1, n, 10 * n):
        memory = model.compress(TEXT, method=method, nuggets=nuggets)
        assert memory.num_nuggets == min(nuggets, n)
        assert (memory.num_tokens, memory.num_chars) == (n, len(TEXT))
    for ratio in (1, 1.5, 5, 1e9):
        assert model.compress(TEXT, method=method, ratio=ratio).num_nuggets == max(parts, ceil(n / ratio))
    default = model.compress(TEXT, method=method)
    assert default.num_nuggets == max(parts, ceil(n / method_class(method).default_ratio))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.floats(0, 1))
def test_nuggets_are_shared_out_to_the_last(lengths: list[int], share: float) -> None:
    count = round(len(lengths) + share * (sum(lengths) - len(lengths)))
    counts = share_nuggets(lengths, count)
    assert sum(counts) == count
    assert all(1 <= mine <= length for mine, length in zip(counts, lengths, strict=True))
    even = [length * count / sum(lengths) for length in lengths]
    if min(even) >= 1:  # else the shortest take from the others
        assert all(abs(mine - wanted) < 1 + 1e-6 for mine, wanted in zip(counts, even, strict=True))
    with pytest.raises(InputError, match=f"{len(lengths)} segments of at least one nugget"):
        share_nuggets(lengths, len(lengths) - 1)


@pytest.mark.parametrize(
    "budget",
    [
        {"ratio": 0.5},
        {"ratio": 0},
        {"ratio": nan},
        {"ratio": inf},
        {"ratio": -3},
        {"nuggets": 0},
        {"nuggets": -1},
        {"nbytes": 0},
        {"ratio": 2, "nuggets": 4},
        {"nbytes": 10_000, "nuggets": 4},
    ],
    ids=str,
)
def test_impossible_budgets_are_refused(budget: dict[str, float], load: Callable[..., Nugget2D]) -> None:
    for method in ALL:
        with pytest.raises(InputError, match=r"must be at least 1|exactly one|finite"):
            load("trained", "llama").compress(TEXT, method=method, **budget)


# ---- reading ----


def test_it_can_be_read(method: str, model: Nugget2D) -> None:
    memory = model.compress(TEXT, method=method, ratio=3)
    greedy = model.generate(" She", memory=memory, max_new_tokens=8)
    assert "".join(model.generate(" She", memory=memory, max_new_tokens=8, stream=True)) == greedy
    # one beam is greedy; several find a text that is at least as likely
    both = model.generate(" She", memory=memory, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert len(set(both)) == 2
    assert model.generate(memory=memory, max_new_tokens=4)
    other = model.compress(OTHER, method=method, ratio=3)
    assert abs(model.score(TARGET, memory=memory) - model.score(TARGET, memory=other)) > 1e-3
    assert model.score(TARGET, memory=memory, prompt=" She") != model.score(TARGET, memory=memory)


def test_it_gives_its_text_back_or_says_that_it_cannot(method: str, model: Nugget2D) -> None:
    memory = model.compress(TEXT, method=method, ratio=3)
    if method_class(method).needs_training:
        assert tokens(model, model.reconstruct(memory))
        return
    said = rf"method '{method}' cannot be reconstructed: .*method='nugget2d'"
    refusal = (InputError, said) if model.has_compressor else (ModelError, "no trained compressor")
    with pytest.raises(refusal[0], match=refusal[1]):
        model.reconstruct(memory)


def test_a_batch_is_what_each_text_is_alone(method: str, model: Nugget2D) -> None:
    texts = [TEXT, "Beans.", OTHER]
    for memory, text in zip(model.compress(texts, method=method, ratio=4), texts, strict=True):
        alone = model.compress(text, method=method, ratio=4)
        assert (memory.spans, memory.segments, memory.method) == (alone.spans, alone.segments, alone.method)
        for one, other in zip((*memory.keys, *memory.values), (*alone.keys, *alone.values), strict=True):
            torch.testing.assert_close(one.data, other.data, atol=1e-4, rtol=1e-4)
        assert model.score(TARGET, memory=memory) == pytest.approx(model.score(TARGET, memory=alone), abs=1e-4)


def test_progress_is_told_to_its_end(method: str, model: Nugget2D) -> None:
    told: list[tuple[int, int]] = []
    model.compress([TEXT, OTHER], method=method, on_progress=lambda *progress: told.append(progress))
    assert told and told[-1][0] == told[-1][1] and told == sorted(told)


def test_provenance_is_where_the_tokens_are(method: str, model: Nugget2D) -> None:
    memory = model.compress(TEXT, method=method, ratio=4)
    assert all(0 <= start < end <= len(TEXT) for start, end in memory.spans)
    assert memory.positions == sorted(set(memory.positions))
    assert memory.spans[-1][1] == len(TEXT)  # the last token is always there
    held = {
        span
        for layer in range(len(memory.keys))
        for head in range(memory.kv.num_kv_heads)
        for span in memory.head_spans(layer, head)
    }
    assert held == set(memory.spans)


def test_another_base_is_refused_by_name(method: str, model: Nugget2D, load: Callable[..., Nugget2D]) -> None:
    memory = model.compress("The dog looked up.", method=method, ratio=2)
    other = load("plain", "qwen2", 9)
    for read in (
        other.reconstruct,
        lambda memory: other.generate("a", memory=memory),
        lambda memory: other.score(TARGET, memory=memory),
        lambda memory: Memory.join([memory, other.compress("Beans.", method="knorm")]),
    ):
        with pytest.raises(MismatchError) as caught:
            read(memory)
        assert repr(model.config.name) in str(caught.value) and repr(other.config.name) in str(caught.value)


# ---- joining ----


def test_joining_is_concatenation(method: str, model: Nugget2D, tmp_path: Path) -> None:
    one, two, three = (model.compress(text, method=method, ratio=3) for text in (TEXT, OTHER, "Beans."))
    joined = Memory.join([one, two, three])
    assert_same(joined, Memory.join([Memory.join([one, two]), three]))
    assert_same(joined, Memory.join([one, Memory.join([two, three])]))
    assert_same(Memory.join([one]), one)
    joined.save(tmp_path / "a.nugget")
    assert_same(Memory.load(tmp_path / "a.nugget"), joined)
    assert joined.num_tokens == sum(memory.num_tokens for memory in (one, two, three))
    whole = TEXT + OTHER + "Beans."
    assert joined.num_chars == len(whole)
    kept = [whole[start:end] for start, end in joined.spans]
    assert kept == [
        text[start:end]
        for memory, text in ((one, TEXT), (two, OTHER), (three, "Beans."))
        for start, end in memory.spans
    ]
    prefix = len(one.kv.prefix_ids)
    for layer, counts in enumerate(joined.kv.head_counts):
        parts = [memory.kv.head_counts[layer] for memory in (one, two, three)]
        assert counts == [sum(part) - 2 * prefix for part in zip(*parts, strict=True)]


def test_a_joined_memory_reads_both(method: str, model: Nugget2D) -> None:
    one, two = (model.compress(text, method=method, ratio=2) for text in (TEXT, OTHER))
    try:
        _ = model.rotation
    except ModelError:
        with pytest.raises(ModelError, match="compress shorter texts"):
            model.score(TARGET, memory=Memory.join([one, two]))
        return
    scores = [model.score(TARGET, memory=memory) for memory in (one, two, Memory.join([one, two]))]
    scores.append(model.score(TARGET, memory=Memory.join([two, one])))
    assert len({round(score, 4) for score in scores}) == 4
    assert model.generate(" She", memory=Memory.join([one, two]), max_new_tokens=3, num_beams=2)


@pytest.mark.parametrize("method", TRAINING_FREE)
@pytest.mark.parametrize("kind", ["llama", "neox", "smollm3"])
def test_a_joined_memory_is_read_at_its_place(method: str, kind: str, tmp_path: Path) -> None:
    """Without a start token the two contexts can be read in ONE pass, by a mask that keeps them apart."""
    tiny.lm(kind).save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer().__class__(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    tokenizer.save_pretrained(tmp_path)
    model = Nugget2D.from_pretrained(tmp_path)
    assert model.start_token is None
    one, two = (model.compress(text, method=method, ratio=2) for text in (TEXT, OTHER))
    ids = [model.ids(TEXT), model.ids(OTHER), model.ids_after(TARGET)]
    first, second = ids[0].shape[1], ids[1].shape[1]
    everything = torch.cat(ids, dim=1)
    length, asking = everything.shape[1], first + second - 1  # the last token of the context is read again
    masks = []
    for layer in range(len(one.keys)):
        seen = torch.ones(1, one.kv.num_kv_heads, length, length, dtype=torch.bool).tril()
        seen[:, :, first:asking, :first] = False
        heads = zip(one.kv.rows_of(layer), two.kv.rows_of(layer), strict=True)
        for head, (mine, yours) in enumerate(heads):
            kept = torch.zeros(length, dtype=torch.bool)
            kept[asking:] = True
            kept[one.local_positions.long()[mine]] = True
            kept[first + two.local_positions.long()[yours]] = True
            seen[0, head, asking:] &= kept
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        masks.append(mask.repeat_interleave(model.lm.config.num_attention_heads // one.kv.num_kv_heads, dim=1))
    expected = masked_losses(model, everything, masks)[asking:]
    found = score_ids(model, Memory.join([one, two]), ids[2][:, :0], ids[2]).losses
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def masked_losses(model: Nugget2D, ids: Tensor, masks: list[Tensor]) -> Tensor:
    """(n - 1,) losses of one pass in which every layer has its mask."""
    before = model.lm.config._attn_implementation
    model.lm.set_attn_implementation("eager")
    with masks_by_layer(model.lm, masks), torch.no_grad():
        logits = model.lm(input_ids=ids).logits[0, :-1]
    model.lm.set_attn_implementation(before)
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


# ---- methods that read the whole context ----


@pytest.mark.parametrize("method", TRAINING_FREE)
@pytest.mark.parametrize(
    ("wrapper", "kind"), [("trained", "llama"), *(pytest.param("plain", kind, marks=_slow_but(kind)) for kind in PLAIN)]
)
def test_at_ratio_1_a_memory_is_the_full_context(
    method: str, wrapper: str, kind: str, load: Callable[..., Nugget2D]
) -> None:
    model = load(wrapper, kind)
    memory = model.compress(TEXT, method=method, ratio=1)
    before, target = model.ids_after(" The keeper said"), model.ids_after(TARGET)
    full = score_ids(model, None, torch.cat([model.ids(TEXT), before], dim=1), target)
    found = score_ids(model, memory, before, target)
    torch.testing.assert_close(found.losses, full.losses, atol=2e-4, rtol=1e-4)
    assert model.score(TARGET, memory=memory) == pytest.approx(model.score(TARGET, prompt=TEXT), abs=2e-4)
    for options in ({}, {"num_beams": 3}):
        answers = [model.generate(" The keeper", memory=memory, max_new_tokens=12, **options)]
        answers.append(model.generate(TEXT + " The keeper", max_new_tokens=12, **options))
        assert answers[0] == answers[1]
    # and only there
    some = score_ids(model, model.compress(TEXT, method=method, ratio=3), before, target)
    assert (some.losses - full.losses).abs().max() > 1e-2


@pytest.mark.parametrize("method", TRAINING_FREE)
@plain_kinds
def test_it_reads_as_a_dense_pass_that_hides_what_was_dropped(
    method: str, kind: str, load: Callable[..., Nugget2D], tmp_path: Path
) -> None:
    model = load("plain", kind)
    model.compress(TEXT, method=method, ratio=4).save(tmp_path / "a.nugget")
    memory = Memory.load(tmp_path / "a.nugget")
    prefix = len(memory.kv.prefix_ids)
    context = torch.tensor([[*memory.kv.prefix_ids, *model.ids(TEXT)[0].tolist()]])
    target = model.ids_after(TARGET)
    kept = [
        [torch.cat([torch.arange(prefix), prefix + memory.local_positions.long()[rows[:-1]]]) for rows in heads]
        for heads in (memory.kv.rows_of(layer) for layer in range(len(memory.keys)))
    ]
    row = Row(context[:, :-1], kept, torch.cat([context[:, -1:], target], dim=1))
    with torch.no_grad():
        logits = dense(model.lm, row)[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, target[0], reduction="none")
    torch.testing.assert_close(score_ids(model, memory, target[:, :0], target).losses, expected, atol=2e-4, rtol=1e-4)


def test_ragged_heads_are_ragged(load: Callable[..., Nugget2D]) -> None:
    """Else the tests here would say nothing about them."""
    memory = load("plain", "llama").compress(TEXT, method="ragged", ratio=4)
    counts = [count for layer in memory.kv.head_counts for count in layer]
    n, prefix = memory.num_tokens, len(memory.kv.prefix_ids)
    assert counts[-1] == prefix + 1  # the last token alone
    assert min(counts[:-1]) < 0.1 * n and max(counts) > 0.5 * n
    assert len({keys.data.shape for keys in memory.keys}) > 1


def test_memories_of_one_lm_are_everybodys(load: Callable[..., Nugget2D]) -> None:
    """What one user's wrapper made, another's reads, and so does the plain LM: adapters are not of the LM."""
    plain, mine = load("plain", "llama"), load("trained", "llama")
    yours = tiny.trained("llama", "lora", seed=0, lora_rank=2, scorer_layer=1)
    assert yours.legacy_fingerprint != mine.legacy_fingerprint
    for method in TRAINING_FREE:
        memory = mine.compress(TEXT, method=method, ratio=3)
        scores = [model.score(TARGET, memory=memory) for model in (plain, mine, yours)]
        assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)
        assert plain.generate(memory=memory, max_new_tokens=4) == yours.generate(memory=memory, max_new_tokens=4)
        for maker in (plain, yours):
            assert maker.compress(TEXT, method=method, ratio=3).spans == memory.spans
    trained = mine.compress(TEXT, method="nugget2d", ratio=3)
    for other in (plain, yours):
        with pytest.raises(MismatchError, match="adapters of 'LlamaForCausalLM'"):
            other.score(TARGET, memory=trained)


# ---- names and options ----


def test_unknown_methods_are_refused_with_the_list(load: Callable[..., Nugget2D]) -> None:
    with pytest.raises(InputError, match="unknown method 'nope'; choose one of nugget2d, knorm, truncation"):
        load("plain", "llama").compress(TEXT, method="nope")


def test_unknown_options_are_refused_with_those_there_are(method: str, model: Nugget2D) -> None:
    with pytest.raises(InputError) as caught:
        model.compress(TEXT, method=method, nonsense=1)
    message = str(caught.value)
    assert f"method {method!r} has no option nonsense" in message
    assert all(option in message for option in method_class(method).model_fields)
    with pytest.raises(InputError, match=rf"method '{method}', dtype: .*'int4'"):
        model.compress(TEXT, method=method, dtype="int4")


def test_values_of_no_use_are_refused_in_one_line(load: Callable[..., Nugget2D]) -> None:
    model = load("trained", "llama")
    for options in (
        {"ratio": "many"},
        {"nuggets": 2.5},
        {"nbytes": [1]},
        {"model": 1},
        {"chat": "perhaps"},
        {"exact": True},
        {"dtype": ["int8"]},
    ):
        with pytest.raises(InputError) as caught:
            model.compress(TEXT, method="knorm", **options)
        assert "\n" not in str(caught.value) and next(iter(options)) in str(caught.value)


def test_no_option_has_the_name_of_another_argument() -> None:
    for name in ALL:
        assert not RESERVED & set(method_class(name).model_fields)


def test_set_takes_options_of_the_method_alone() -> None:
    for name in RESERVED:
        with pytest.raises(InputError, match=f"--set takes options of the method, and {name} is none"):
            compress_arguments(method=None, ratio=None, more=[f"{name}=1"])
    for one in ("nonsense", "=1", "a b=1", ""):
        with pytest.raises(InputError, match="--set takes NAME=VALUE"):
            compress_arguments(method=None, ratio=None, more=[one])
    assert compress_arguments(method="truncation", ratio=None, more=["sinks=8", "chat=true", "a=b"]) == {
        "method": "truncation",
        "sinks": 8,
        "chat": True,
        "a": "b",
    }


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_streams_continue_memories_of_their_own_alone(method: str, load: Callable[..., Nugget2D]) -> None:
    model = load("trained", "llama")
    with pytest.raises(InputError, match=rf"cannot continue a memory of method '{method}'"):
        model.stream(memory=model.compress(TEXT, method=method))
    with pytest.raises(ModelError, match="no trained compressor"):
        load("plain", "llama").stream()


def test_trained_methods_are_refused_without_training(load: Callable[..., Nugget2D]) -> None:
    for method in set(ALL) - set(TRAINING_FREE):
        with pytest.raises(ModelError, match="no trained compressor"):
            load("plain", "llama").compress(TEXT, method=method)
    assert load("plain", "llama").compress(TEXT).method.name == "knorm"
    assert load("trained", "llama").compress(TEXT).method.name == "nugget2d"


def test_every_row_says_what_it_is() -> None:
    for name in ALL:
        kind = method_class(name)
        assert (kind.name, kind.payload) == (name, "kv") and kind.source and kind.__doc__


@pytest.mark.parametrize("method", TRAINING_FREE)
def test_texts_beyond_the_context_are_refused(method: str, load: Callable[..., Nugget2D]) -> None:
    model = tiny.make(context=100)
    tokens = model.ids(TEXT).shape[1]
    with pytest.raises(InputError, match=f"{tokens} tokens, .* contexts of 100.*compress it in parts"):
        model.compress(["Beans.", TEXT], method=method)
    assert model.compress(TEXT[:200], method=method).num_tokens < 100
    for kind in ("opt", "mistral-window"):  # where there are no such positions at all
        with pytest.raises(InputError, match="compress"):
            load("plain", kind).compress(tiny.TEXT * 3, method=method)


@pytest.mark.parametrize("text", ["a", " ", "\n\n\n", " \t ", "\u00a0", "\x00", "</s><|endoftext|>", "😀"], ids=repr)
def test_short_and_odd_texts_are_compressed(text: str, load: Callable[..., Nugget2D]) -> None:
    model = load("trained", "llama")
    for method in ALL:
        for ratio in (1, 5, 1e6):
            memory = model.compress(text, method=method, ratio=ratio)
            assert memory.num_nuggets == ceil(memory.num_tokens / ratio) and memory.num_chars == len(text)
            model.score(TARGET, memory=memory)
            model.generate(memory=Memory.join([memory, memory]), max_new_tokens=2)


def test_what_is_no_text_is_refused(method: str, model: Nugget2D) -> None:
    for text, said in (
        ("", "empty"),
        ("\ud800", "lone surrogate"),
        (["a", ""], "text 1 is empty"),
        ([b"a"], "bytes"),
        (b"a", "text 0 is bytes, not str"),
    ):
        with pytest.raises(InputError, match=said):
            model.compress(text, method=method)
    assert model.compress([], method=method) == []


# ---- beside others ----


@pytest.fixture
def engine() -> Iterator[Callable[[Nugget2D], Engine]]:
    engines: list[Engine] = []

    def start(model: Nugget2D) -> Engine:
        engines.append(Engine(model, max_num_seqs=4, queue=16))
        return engines[-1]

    yield start
    for made in engines:
        made.close()


def test_answers_side_by_side_are_those_of_generate(
    method: str, model: Nugget2D, engine: Callable[[Nugget2D], Engine]
) -> None:
    """Two memories of this method, an ordinary one and a plain prompt; more of them than are read at once."""
    memories: list[Memory | None] = [model.compress(text, method=method, ratio=4) for text in (TEXT, OTHER)]
    memories += [model.compress(OTHER, ratio=2), None, memories[0]]
    prompts = [" She", " and", " The keeper", "Seven", " He counted"]
    clients = [Client(model, prompt, memory) for prompt, memory in zip(prompts, memories, strict=True)]
    started = engine(model)
    for client in clients:
        started.submit(client.job)
    answers = [client.text() for client in clients]
    assert answers == [
        model.generate(prompt, memory=memory, max_new_tokens=12)
        for prompt, memory in zip(prompts, memories, strict=True)
    ]
    assert len(set(answers)) == len(answers)


def test_a_store_keeps_and_finds_it(method: str, model: Nugget2D, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        record = store.add(model, TEXT, method=method, ratio=2, name="one")
        again = store.add(model, TEXT, method=method, ratio=2)
        other = store.add(model, "Nothing alike: 0123456789", method=method, ratio=2, name="two")
        assert again.id == record.id != other.id
        assert store.add(model, TEXT, method=method, ratio=3).id != record.id
        assert_same(store.get(record.id), model.compress(TEXT, method=method, ratio=2, dtype="int8"))
        assert record.settings is not None and record.settings.method == method
        spans = {(segment.start, segment.end) for segment in store.get(record.id).segments}
        words = decode_tokens(model, store.get(record.id))
        hits = store.search(model.text(torch.cat(words).tolist()))
        assert (hits[0].record.id, (hits[0].start, hits[0].end) in spans) == (record.id, True)


def test_addresses_tell_methods_and_configurations_apart(load: Callable[..., Nugget2D]) -> None:
    model = load("trained", "llama")
    ways = [CompressOptions.of(model, method=method, ratio=4) for method in ALL]
    ways += [CompressOptions.of(model, method=method, nuggets=4) for method in ALL]
    ways += [CompressOptions.of(model, method=method, ratio=4, dtype="int8") for method in ALL]
    assert len({way.address(TEXT, model) for way in ways}) == len(ways)
    plain = load("plain", "llama")
    for method in TRAINING_FREE:  # of one LM
        way = CompressOptions.of(model, method=method, ratio=4)
        assert way.address(TEXT, model) == way.address(TEXT, plain)


# ---- served ----


def test_a_server_compresses_by_any_method(load: Callable[..., Nugget2D], tmp_path: Path) -> None:
    """Of an LM as it is: knorm by itself, others by name, and nothing but 4xx for what it cannot do."""
    model = load("plain", "llama")
    with serving(model, tmp_path) as running, running.http() as http:

        def make(**fields: object) -> httpx.Response:
            return http.post("/v1/memories", json={"text": TEXT, **fields})

        ids = []
        for fields in ({}, *({"method": method} for method in TRAINING_FREE)):
            made = make(**fields)
            assert made.status_code == 201, made.text
            ids.append(made.json()["id"])
        assert ids[0] == ids[1] and len(set(ids)) == len(TRAINING_FREE)
        for id in ids[1:]:
            asked = {"memory_ids": [id], "max_tokens": 6, "temperature": 0}
            answer = http.post("/v1/completions", json={"model": "tiny", "prompt": " She", **asked})
            with MemoryStore(tmp_path) as store:
                assert answer.json()["choices"][0]["text"] == model.generate(
                    " She", memory=store.get(id), max_new_tokens=6
                )
            messages = [{"role": "user", "content": "How many?"}]
            answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **asked})
            assert answer.status_code == 200, answer.text
        refused = {
            "unknown method 'nope'; choose one of nugget2d, knorm, truncation": {"method": "nope"},
            "no option nonsense; it takes dtype, chat": {"method": "knorm", "options": {"nonsense": 1}},
            "no trained compressor": {"method": "nugget2d"},
            "has no chat template": {"method": "knorm", "options": {"chat": True}},
            "ratio in options": {"options": {"ratio": 2}},
            "dtype in options": {"options": {"dtype": "int8"}},
            "has no option model": {"options": {"model": 1}},
            "exactly one": {"ratio": 2, "nuggets": 3},
            "bytes cannot hold": {"nbytes": 1},
        }
        for said, fields in refused.items():
            answer = make(**fields)
            assert answer.status_code in (400, 422), answer.text
            assert said in answer.json()["error"]["message"]
