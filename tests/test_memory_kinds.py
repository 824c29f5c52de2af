"""Every kind of payload, through files and readers; and keys and values whose heads differ, joined and taken apart."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, MemoryFileError, MismatchError
from nugget2d.inference.prefix import prefix
from nugget2d.memory.header import KVPart
from nugget2d.memory.kv import HeadSelection, KVPayload, join_kv
from nugget2d.memory.memory import MethodRecord, ReaderSpec, Segment
from nugget2d.memory.payload import EmbeddingsPayload, TextPayload
from nugget2d.memory.states import STORE_DTYPES, States, StoreDtype
from nugget2d.server.engine import Engine
from nugget2d.store import MemoryStore
from test_engine import Client

TEXT = tiny.TEXT[:200]
SHORT = TEXT[:68] + " " + TEXT[131:180]  # what stands for it
TARGET = " She measured the tower."


def text_memory(model: Nugget2D, short: str = SHORT) -> Memory:
    spans = torch.tensor([[0, 68], [131, 180]], dtype=torch.int32)
    return _memory(model, TextPayload(short, model.ids(short).shape[1], spans), "extract")


def embeddings_memory(model: Nugget2D) -> Memory:
    """The embeddings of the short text: they must read as that text does, but for the start token."""
    ids = model.ids(SHORT)
    with torch.no_grad():
        vectors = model.embed(model.after_start(ids))[0]
    spans = torch.tensor([[0, 0], *([index, index + 1] for index in range(ids.shape[1]))], dtype=torch.int32)
    return _memory(model, EmbeddingsPayload(States.store(vectors, "float32"), spans), "soft")


def ragged_memory(model: Nugget2D) -> Memory:
    return _memory(model, random_payload(random.Random(3), layers=3, segments=1, prefix=1)[0], "ragged")


def _memory(model: Nugget2D, payload: TextPayload | EmbeddingsPayload | KVPayload, method: str) -> Memory:
    count = len(payload.local_positions) if isinstance(payload, KVPayload) else payload.count
    return Memory(
        payload=payload,
        segments=(Segment(0, len(TEXT), model.ids(TEXT).shape[1], count),),
        fingerprint=model.fingerprint,
        reader=ReaderSpec(),
        method=MethodRecord(method, {"keep": 2, "nested": {"a": [1, None, "é"]}}),
        token_nbytes=384,
    )


MAKERS: dict[str, Callable[[Nugget2D], Memory]] = {
    "text": text_memory,
    "embeddings": embeddings_memory,
    "kv": ragged_memory,
}
kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
readable = pytest.mark.parametrize("make", [text_memory, embeddings_memory], ids=["text", "embeddings"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Nugget2D:
    folder = tmp_path_factory.mktemp("lm")
    tiny.lm().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return Nugget2D.from_pretrained(folder)


# ---- files ----


@kinds
def test_files_and_bytes_give_the_memory_back(make: Callable[[Nugget2D], Memory], plain: Nugget2D, tmp_path: Path):
    memory = make(plain)
    size = memory.save(tmp_path / "a.nugget")
    assert size == memory.total_nbytes == (tmp_path / "a.nugget").stat().st_size
    for loaded in (
        Memory.load(tmp_path / "a.nugget"),
        Memory.map(tmp_path / "a.nugget"),
        Memory.from_bytes(memory.to_bytes(), "here"),
    ):
        assert loaded.checksum == memory.checksum
        assert (loaded.kind, loaded.nbytes, loaded.dtype) == (memory.kind, memory.nbytes, memory.dtype)
        assert (loaded.method, loaded.reader, loaded.fingerprint) == (memory.method, memory.reader, memory.fingerprint)
        assert (loaded.segments, loaded.spans, loaded.num_nuggets) == (
            memory.segments,
            memory.spans,
            memory.num_nuggets,
        )
        assert repr(loaded) == repr(memory)


@pytest.mark.slow
@kinds
def test_damaged_files_are_refused(make: Callable[[Nugget2D], Memory], plain: Nugget2D, tmp_path: Path) -> None:
    stored, path = make(plain).to_bytes(), tmp_path / "a.nugget"
    chance = random.Random(0)
    header = 8 + int.from_bytes(stored[:8], "little")
    cuts = [stored[:size] for size in (*range(0, header, 97), header, *range(header, len(stored), 331))]
    offsets = [*range(0, header, 7), *(chance.randrange(header, len(stored)) for _ in range(100))]
    flips = [bytearray(stored) for _ in offsets]
    for damaged, offset in zip(flips, offsets, strict=True):
        damaged[offset] ^= 1 << chance.randrange(8)
    for data in (*cuts, *map(bytes, flips), stored + b"\0"):
        path.write_bytes(data)
        for read in (Memory.load, Memory.map):
            with pytest.raises(MemoryFileError) as caught:
                read(path)
            assert "\n" not in str(caught.value)


@kinds
def test_sizes_are_what_they_say(make: Callable[[Nugget2D], Memory], plain: Nugget2D) -> None:
    memory = make(plain)
    assert memory.total_nbytes > memory.nbytes > 0
    if memory.kind == "text":
        assert memory.nbytes == len(SHORT.encode()) and memory.num_nuggets == plain.ids(SHORT).shape[1]
    elif memory.kind == "embeddings":
        assert memory.nbytes == memory.num_nuggets * plain.lm.config.hidden_size * 4
    assert memory.full_nbytes == memory.num_tokens * 384
    assert memory.ratio == memory.num_tokens / memory.num_nuggets


@kinds
def test_repr_tells_method_and_kind(make: Callable[[Nugget2D], Memory], plain: Nugget2D) -> None:
    memory = make(plain)
    line = repr(memory)
    assert "\n" not in line
    how = {"text": "as text", "embeddings": "as float32", "kv": "as float32"}[memory.kind]
    for part in (f"{memory.num_tokens} tokens", f"{memory.nbytes:,} bytes {how}", f"method {memory.method.name!r}"):
        assert part in line


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_numbers_are_kept_as_asked(dtype: StoreDtype, plain: Nugget2D) -> None:
    text, vectors, ragged = text_memory(plain), embeddings_memory(plain), ragged_memory(plain)
    assert text.to(dtype).checksum == text.checksum
    assert plain.score(TARGET, memory=text.to(dtype)) == plain.score(TARGET, memory=text)
    limit = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.51 / 127}[dtype]
    before, after = vectors.payload.vectors.restore(), vectors.to(dtype).payload.vectors.restore()
    assert vectors.to(dtype).dtype == dtype
    assert ((after - before).abs() <= limit * before.abs().amax(-1, keepdim=True) + 1e-6).all()
    kept = ragged.to(dtype)
    assert (kept.dtype, kept.kv.head_counts) == (dtype, ragged.kv.head_counts)
    for layer in range(3):
        for (one, _), (other, _) in zip(ragged.kv.per_head(layer), kept.kv.per_head(layer), strict=True):
            assert ((one - other).abs() <= limit * one.abs().amax(-1, keepdim=True) + 1e-6).all()
    for memory in (vectors, ragged):
        with pytest.raises(InputError, match="unknown dtype 'int4'"):
            memory.to("int4")


# ---- readers ----


@readable
def test_it_reads_as_the_text_does(make: Callable[[Nugget2D], Memory], plain: Nugget2D, tmp_path: Path) -> None:
    make(plain).save(tmp_path / "a.nugget")
    memory = Memory.load(tmp_path / "a.nugget")
    start = prefix(plain, memory)
    assert start.cache.get_seq_length() == 0 and start.role == "base" and start.skipped == 0
    assert start.embeds.shape[1] == start.next_position == plain.ids(SHORT).shape[1] + 1
    assert plain.score(TARGET, memory=memory) == pytest.approx(plain.score(TARGET, prompt=SHORT), abs=1e-5)
    assert plain.score(TARGET, memory=memory, prompt=" He") == pytest.approx(
        plain.score(TARGET, prompt=SHORT + " He"), abs=1e-5
    )
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        wanted = plain.generate(SHORT + " He", max_new_tokens=8, **options)
        assert plain.generate(" He", memory=memory, max_new_tokens=8, **options) == wanted
    assert "".join(plain.generate(" He", memory=memory, max_new_tokens=8, stream=True)) == plain.generate(
        SHORT + " He", max_new_tokens=8
    )
    assert plain.generate(memory=memory, max_new_tokens=8) == plain.generate(SHORT, max_new_tokens=8)


@readable
def test_a_compressor_reads_it_with_the_lm_alone(make: Callable[[Nugget2D], Memory], plain: Nugget2D) -> None:
    trained = tiny.trained("llama", "lora")
    assert trained.score(TARGET, memory=make(plain)) == pytest.approx(plain.score(TARGET, prompt=SHORT), abs=1e-5)


def test_an_engine_answers_from_all_kinds_side_by_side(plain: Nugget2D) -> None:
    memories = [text_memory(plain), embeddings_memory(plain), plain.compress(TEXT), None]
    clients = [Client(plain, " He counted", memory) for memory in memories]
    engine = Engine(plain, max_num_seqs=4, queue=8)
    try:
        for client in clients:
            engine.submit(client.job)
        answers = [client.text() for client in clients]
    finally:
        engine.close()
    assert answers == [plain.generate(" He counted", memory=memory, max_new_tokens=12) for memory in memories]


@kinds
def test_another_base_is_refused(make: Callable[[Nugget2D], Memory], plain: Nugget2D) -> None:
    other = tiny.make(seed=7, name="other")
    with pytest.raises(MismatchError, match="cannot be read by 'other'"):
        other.score(TARGET, memory=make(plain))


@readable
def test_only_keys_and_values_are_joined_and_looked_into(make: Callable[[Nugget2D], Memory], plain: Nugget2D) -> None:
    memory = make(plain)
    for what in (
        lambda: Memory.join([memory, memory]),
        lambda: Memory.join([plain.compress(TEXT), memory]),
        lambda: memory.keys,
        lambda: memory.head_spans(0, 0),
    ):
        with pytest.raises(InputError, match=f"holds {memory.kind}, not keys and values") as caught:
            what()
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be reconstructed"):
        tiny.make().reconstruct(memory)
    assert memory.spans == [(start, end) for start, end in memory.payload.spans.tolist()] and memory.spans


@readable
def test_a_store_keeps_it(make: Callable[[Nugget2D], Memory], plain: Nugget2D, tmp_path: Path) -> None:
    with MemoryStore(tmp_path) as store:
        record = store.put(make(plain), model=plain, name="short")
        assert store.get(record.id).checksum == make(plain).checksum
        plainly = store.put(plain.compress("Nothing alike: 0123456789", ratio=1), model=plain)
        hits = store.search("lighthouse keeper")
        assert (record.id in {hit.record.id for hit in hits}) == (make is text_memory)  # embeddings tell no words
        if make is text_memory:
            assert hits[0].record.id == record.id and (hits[0].start, hits[0].end) == (0, len(TEXT))
        assert store.search("0123456789")[0].record.id == plainly.id


# ---- heads that differ ----


def random_payload(
    chance: random.Random, layers: int = 2, heads: int = 2, segments: int = 2, prefix: int = 1, width: int = 4
) -> tuple[KVPayload, list[int]]:
    """A payload with random heads, as of one text of several segments; and where the rows of each segment begin."""
    rows = [chance.randint(1, 5) for _ in range(segments)]
    begins = [sum(rows[:number]) for number in range(segments + 1)]
    kept = [
        [
            [[*sorted(chance.sample(range(count - 1), chance.randint(0, count - 1))), count - 1] for count in rows]
            for _ in range(heads)
        ]
        for _ in range(layers)
    ]
    for number, count in enumerate(rows):  # a table holds what some head keeps
        for row in range(count):
            if not any(row in head[number] for layer in kept for head in layer):
                kept[0][0][number] = sorted([*kept[0][0][number], row])
    counts = torch.tensor(
        [[[len(head[number]) for head in layer] for layer in kept] for number in range(segments)], dtype=torch.int32
    )
    selection = HeadSelection(
        counts,
        tuple(
            torch.tensor(
                [begins[number] + row for head in layer for number in range(segments) for row in head[number]],
                dtype=torch.int32,
            )
            for layer in kept
        ),
    )
    sizes = [sum(prefix + sum(map(len, head)) for head in layer) for layer in kept]
    generator = torch.Generator().manual_seed(chance.randrange(2**31))

    def states() -> tuple[States, ...]:
        return tuple(States.store(torch.randn(size, width, generator=generator), "float32") for size in sizes)

    table = torch.cat([torch.arange(count, dtype=torch.int32) for count in rows])
    payload = KVPayload(
        keys=states(),
        values=states(),
        local_positions=table,
        token_spans=torch.stack([torch.arange(len(table)), torch.arange(len(table)) + 1], dim=1).int(),
        scores=torch.rand(len(table), generator=generator),
        heads=selection,
        prefix_ids=(7,) * prefix,
        last_id=chance.randrange(100),
    )
    return payload, begins


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 2), st.integers(1, 3), st.integers(1, 3))
def test_joined_heads_are_the_heads_one_after_the_other(
    seed: int, parts: int, prefix: int, layers: int, heads: int
) -> None:
    chance = random.Random(seed)
    payloads = [random_payload(chance, layers, heads, chance.randint(1, 3), prefix)[0] for _ in range(parts)]
    chars = [100 * number for number in range(parts)]
    joined = join_kv(payloads, chars)
    begins = [0]
    for payload in payloads:
        begins.append(begins[-1] + len(payload.local_positions))
    assert joined.num_states == sum(payload.num_states for payload in payloads)
    assert joined.last_id == payloads[-1].last_id and len(joined.prefix_ids) == prefix
    assert len(joined.local_positions) == len(joined.token_spans) == len(joined.scores) == begins[-1]
    for layer in range(layers):
        per_head = joined.per_head(layer)
        assert [len(keys) for keys, _ in per_head] == joined.head_counts[layer]
        for head, (rows, (keys, values)) in enumerate(zip(joined.rows_of(layer), per_head, strict=True)):
            wanted_rows, wanted_keys, wanted_values = [], [], []
            for number, payload in enumerate(payloads):
                mine, yours = payload.per_head(layer)[head]
                wanted_rows.append(payload.rows_of(layer)[head] + begins[number])
                wanted_keys.append(mine[prefix if number else 0 :])
                wanted_values.append(yours[prefix if number else 0 :])
            assert torch.equal(rows, torch.cat(wanted_rows))
            assert rows.tolist() == sorted(set(rows.tolist()))
            assert torch.equal(keys, torch.cat(wanted_keys)) and torch.equal(values, torch.cat(wanted_values))
            spans = torch.cat([payload.token_spans + start for payload, start in zip(payloads, chars, strict=True)])
            assert torch.equal(joined.token_spans[rows], spans[rows])
    if parts > 2:  # in whatever order
        grouped = join_kv([join_kv(payloads[:2], chars[:2]), *payloads[2:]], [0, *chars[2:]])
        for name, tensor in joined.tensors().items():
            assert torch.equal(grouped.tensors()[name], tensor), name


@given(st.integers(0, 2**31), st.integers(0, 2), st.integers(1, 3))
def test_parts_give_the_payload_back(seed: int, prefix: int, segments: int) -> None:
    payload, _ = random_payload(random.Random(seed), segments=segments, prefix=prefix)
    rebuilt = KVPayload.from_parts(payload.tensors(), KVPart(**payload.header()))
    assert (rebuilt.head_counts, rebuilt.nbytes, rebuilt.count) == (payload.head_counts, payload.nbytes, payload.count)


@given(st.integers(0, 2**31))
def test_head_spans_are_of_what_the_head_keeps(seed: int) -> None:
    payload, begins = random_payload(random.Random(seed), segments=2)
    segments = tuple(Segment(20 * n, 20 * n + 20, 8, begins[n + 1] - begins[n]) for n in range(2))
    memory = replace(ragged_memory(_any_model()), payload=payload, segments=segments)
    held = set()
    for layer in range(2):
        for head in range(2):
            spans = memory.head_spans(layer, head)
            assert len(spans) == memory.kv.head_counts[layer][head] - 1  # the prefix is of no text
            held.update(spans)
    assert held == set(memory.spans)
    assert memory.positions == [*payload.local_positions[: begins[1]], *(8 + payload.local_positions[begins[1] :])]


_MODELS: list[Nugget2D] = []


def _any_model() -> Nugget2D:
    if not _MODELS:
        _MODELS.append(tiny.make())
    return _MODELS[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda payload: payload.to("int8"), r"kept as float32 and int8; convert with \.to"),
        (lambda payload: replace(payload, prefix_ids=(8,)), "different prefixes"),
        (lambda payload: replace(payload, heads=None), "one token set with one whose heads differ"),
    ],
)
def test_what_does_not_fit_is_not_joined(change: Callable[[KVPayload], KVPayload], said: str) -> None:
    payload, _ = random_payload(random.Random(1))
    with pytest.raises(InputError, match=said):
        join_kv([payload, change(payload)], [0, 10])
    with pytest.raises(InputError, match="only a memory with one token set"):
        payload.pick(slice(0, 1))
