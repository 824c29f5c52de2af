"""Memory files that anybody can make: right checksums over wrong contents. Each is refused in one line, or reads."""

import json
import lzma
import os
import random
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from forgeries import forged, forgeries, parts
from nugget2d import Memory, Nugget2D
from nugget2d.errors import MemoryFileError, MismatchError, NuggetError
from nugget2d.inspection import inspect_memory, to_json
from nugget2d.memory.memory import ReaderSpec, Segment
from nugget2d.memory.states import States
from nugget2d.store.words import Words
from test_memory_kinds import embeddings_memory, text_memory

TEXT = tiny.TEXT[:150]
VERSION_1 = Path(__file__).parent / "data" / "v1"

MAKERS: dict[str, Callable[[Nugget2D], Memory]] = {
    "nuggets": lambda model: model.compress(TEXT, ratio=4),
    "exact": lambda model: model.compress(TEXT, ratio=4, exact=True, dtype="int8"),
    "joined": lambda model: Memory.join(model.compress(["The dog looked up.", "He was there."], ratio=3)),
    "heads that differ": lambda model: model.compress(TEXT, ratio=4, method="knorm"),
    "one token set": lambda model: model.compress(TEXT, ratio=4, method="truncation", dtype="bfloat16"),
    "text": text_memory,
    "embeddings": embeddings_memory,
}
kinds = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture(scope="module")
def model() -> Nugget2D:
    return tiny.trained("llama", "copies")


def load(data: bytes) -> Memory | None:
    """None: it is refused, as it should be."""
    try:
        return Memory.from_bytes(data, "a.nugget")
    except MemoryFileError as error:
        assert str(error).startswith("memory a.nugget is ") and "\n" not in str(error)
        return None


# ---- one thing wrong ----


@kinds
def test_forged_files_are_refused_or_load(kind: str, model: Nugget2D) -> None:
    data = MAKERS[kind](model).to_bytes()
    assert load(data) is not None
    loaded = {name for name, forgery in forgeries(data) if load(forgery) is not None}
    # other names, options, digests, and numbers within their range
    never = ("also ", ": nan", ": inf", ": as torch", ": a number", ": one dimension more")
    assert not {name for name in loaded if any(how in name for how in never)}
    assert not {f"no {name}" for name in parts(data)[0]} & loaded


@pytest.mark.parametrize("name", ["float32", "exact-int8", "segments-int8"])
def test_forged_files_of_version_1_are_refused_or_load(name: str) -> None:
    data = (VERSION_1 / f"{name}.nugget").read_bytes()
    tensors, header, version = parts(data)
    assert version == "1" and load(forged(tensors, header, "1")) is not None
    for _, forgery in forgeries(data):
        load(forgery)
    assert load(forged(tensors, header, "2")) is None


@kinds
def test_names_that_would_fill_a_terminal_are_refused(kind: str, model: Nugget2D) -> None:
    """Errors and listings show them."""
    tensors, header, _ = parts(MAKERS[kind](model).to_bytes())
    for part in ("fingerprint", "method"):
        assert load(forged(tensors, header | {part: header[part] | {"name": "x" * 4096}})) is not None
        assert load(forged(tensors, header | {part: header[part] | {"name": "x" * 4097}})) is None


@pytest.mark.slow
@kinds
def test_what_loads_can_be_read_or_is_refused(kind: str, model: Nugget2D) -> None:
    memory = MAKERS[kind](model)
    loaded = [(name, forgery) for name, data in forgeries(memory.to_bytes()) if (forgery := load(data)) is not None]
    for name, forgery in random.Random(0).sample(loaded, 12):
        for use in (
            lambda forgery: (repr(forgery), forgery.spans, forgery.total_nbytes, forgery.accuracy),
            lambda forgery: model.score(" It", memory=forgery),
            lambda forgery: model.generate(memory=forgery, max_new_tokens=2, do_sample=True),
            model.reconstruct,
            lambda forgery: to_json(inspect_memory(model, forgery)),
            lambda forgery: Words.of_states(forgery, model).to_bytes(),
            lambda forgery: Memory.join([forgery, memory]),
            lambda forgery: Memory.join([memory, forgery]),
            lambda forgery: model.stream(memory=forgery, recent_window=8).append(" It was."),
        ):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    use(forgery)
            except NuggetError:
                pass
            except Exception as error:
                pytest.fail(f"{name}: {type(error).__name__}: {error}")


# ---- a right fingerprint, and not that model's ----


def _wider(states: States) -> States:
    return States(torch.cat([states.data, states.data], dim=-1))


def _more_heads(states: States) -> States:
    return States(torch.cat([states.data, states.data]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda kv: replace(kv, keys=kv.keys[:-1], values=kv.values[:-1]), "other shapes"),
        (lambda kv: replace(kv, keys=tuple(map(_wider, kv.keys))), "other shapes"),
        (lambda kv: replace(kv, values=tuple(map(_wider, kv.values))), "other shapes"),
        (lambda kv: kv.with_states(map(_more_heads, kv.keys), map(_more_heads, kv.values)), "other shapes"),
        (lambda kv: replace(kv, last_id=2**31 - 1), "a token 2147483647, which the model does not know"),
        (lambda kv: replace(kv, prefix_ids=(10**6,)), "a token 1000000, which the model does not know"),
    ],
    ids=["layers", "keys", "values", "heads", "last token", "prefix"],
)
def test_what_only_the_model_knows_is_checked_by_it(change: Callable, reason: str, model: Nugget2D) -> None:
    memory = model.compress(TEXT, ratio=4, method="truncation")
    data = replace(memory, payload=change(memory.kv)).to_bytes()
    forgery = Memory.from_bytes(data, "a.nugget")
    for use in (
        lambda: model.score(" It", memory=forgery),
        lambda: model.generate(memory=forgery, max_new_tokens=1),
        lambda: Words.of_states(forgery, model),
    ):
        with pytest.raises(MismatchError, match=f"cannot read this memory: .*{reason}"):
            use()


def test_segments_that_no_decoder_makes_are_not_decoded(model: Nugget2D) -> None:
    """Decoding takes memory and time for every token that a segment claims."""
    memory = model.compress(TEXT, ratio=50)
    long = replace(memory, segments=(*memory.segments[:-1], replace(memory.segments[-1], num_tokens=10**9)))
    for use in (model.reconstruct, lambda forgery: inspect_memory(model, forgery)):
        with pytest.raises(MismatchError, match="a segment of 1,000,000,000 tokens"):
            use(Memory.from_bytes(long.to_bytes(), "a.nugget"))


def test_a_patch_of_unknown_tokens_is_refused(model: Nugget2D) -> None:
    memory = model.compress(TEXT, ratio=4, exact=True)
    patches = ({0: 10**6}, *memory.exact.patches[1:])
    forgery = replace(memory, exact=replace(memory.exact, patches=patches))
    with pytest.raises(MismatchError, match="a token 1000000"):
        model.reconstruct(Memory.from_bytes(forgery.to_bytes(), "a.nugget"))


def test_a_plain_lm_has_no_decoder(model: Nugget2D, tmp_path: Path) -> None:
    tiny.lm().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    plain = Nugget2D.from_pretrained(tmp_path)
    memory = plain.compress(TEXT, ratio=4, method="truncation")
    with pytest.raises(MismatchError, match="read by a decoder"):
        plain.score(" It", memory=replace(memory, reader=ReaderSpec("decoder")))


# ---- much out of little ----


def bomb(model: Nugget2D, *, patch: bytes | None = None, copy: bytes | None = None, tokens: int = 0) -> bytes:
    """An exact memory with another patch or copy, and with so many tokens more than it has."""
    tensors, header, _ = parts(model.compress("The dog looked up.", ratio=10, exact=True).to_bytes())
    for name, data in (("exact.patch", patch), ("exact.copy", copy)):
        if data is not None:
            tensors[name] = torch.tensor(list(data), dtype=torch.uint8)
    header["segments"][0][2] += tokens
    return forged(tensors, header)


def deflated(piece: bytes, times: int) -> bytes:
    deflate = zlib.compressobj(1)
    return b"".join([*(deflate.compress(piece) for _ in range(times)), deflate.flush()])


BOMBS: dict[str, Callable[[Nugget2D], bytes]] = {
    "zeros": lambda model: bomb(model, patch=deflated(bytes(1 << 20), 200)),
    "zeros, and as many tokens": lambda model: bomb(model, patch=deflated(bytes(1 << 20), 200), tokens=10**9),
    "one endless number": lambda model: bomb(model, patch=deflated(b"\x80" * (1 << 20), 100)),
    "one endless number within bounds": lambda model: bomb(model, patch=deflated(b"\x80" * 600_000, 1), tokens=60_000),
    "a patch of all tokens": lambda model: bomb(model, patch=deflated(b"\xff\xff\xff\x07" + bytes(600_000), 1)),
    "no end": lambda model: bomb(model, patch=deflated(bytes(100), 1)[:-4]),
    "two streams": lambda model: bomb(model, patch=deflated(b"\0", 1) * 2),
    "no patch": lambda model: bomb(model, patch=b""),
    "tokens without a patch": lambda model: bomb(model, tokens=10**9),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_patch_is_expanded_as_far_as_the_text_is_long(name: str, model: Nugget2D) -> None:
    data = BOMBS[name](model)
    begun = time.perf_counter()
    assert load(data) is None
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    "copy",
    [
        lzma.compress(b"a" * (1 << 25), preset=1),
        lzma.compress(b"The dog looked up?!"),
        lzma.compress(b"The dog looked"),
        lzma.compress("The dog looked up.".encode("utf-16")),
        lzma.compress(b"The dog looked up.")[:-10],
        lzma.compress(b"The dog looked up.") + b"\0",
        lzma.compress(b"The dog looked up.", format=lzma.FORMAT_ALONE),
        # a dictionary of 1.5 GB
        lzma.compress(b"a", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 3 << 29}]) if sys.maxsize > 2**32 else b"",
        b"",
    ],
    ids=["long", "longer", "shorter", "utf-16", "cut", "more", "another format", "large dictionary", "empty"],
)
def test_a_copy_is_expanded_as_far_as_the_text_is_long(copy: bytes, model: Nugget2D) -> None:
    memory = Memory.from_bytes(bomb(model, copy=copy), "a.nugget")
    for use in (memory.exact.text, lambda: Memory.join([memory, memory])):
        begun = time.perf_counter()
        with pytest.raises(MemoryFileError, match="lossless copy in this exact memory is damaged") as caught:
            use()
        assert time.perf_counter() - begun < 5 and "\n" not in str(caught.value)


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_bombs_stay_within_the_memory_of_what_they_claim(model: Nugget2D, tmp_path: Path) -> None:
    """Within 300 MB, in a process that is not given more than the largest file."""
    files = {f"patch {name}": make(model) for name, make in BOMBS.items()}
    files["copy"] = bomb(model, copy=lzma.compress(bytes(1 << 28), preset=0))
    files["layers"] = forged(*_claims(model, num_layers=10**9))
    files["tokens"] = forged(*_claims(model, tokens=2**31 - 1))
    for number, data in enumerate(files.values()):
        (tmp_path / f"{number}.nugget").write_bytes(data)
    sparse = tmp_path / "sparse.nugget"
    sparse.touch()
    os.truncate(sparse, 2 << 30)
    with (tmp_path / "head.nugget").open("wb") as file:
        file.write(model.compress(TEXT, ratio=4).to_bytes())
        file.truncate(2 << 30)
    with (tmp_path / "length.nugget").open("wb") as file:
        file.write((2**63).to_bytes(8, "little") + b"{")
        file.truncate(2 << 30)
    code = """
        import resource, sys
        from pathlib import Path
        from nugget2d import Memory
        from nugget2d.errors import MemoryFileError

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (3 << 30),) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(Path(sys.argv[1]).glob("*.nugget")):
            for read in (Memory.load, Memory.map, lambda path: Memory.map(path, verify=False)):
                try:
                    memory = read(path)
                    if memory.exact is not None:
                        memory.exact.text()
                    print(path, memory, memory.offsets.sum())
                except MemoryFileError as error:
                    print(error)
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        sys.exit(f"{more} kB more" if more > 300_000 else 0)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    # whatever of the last claims is within its range loads
    assert len(ran.stdout.splitlines()) == 3 * (len(files) + 3)


def _claims(model: Nugget2D, num_layers: int | None = None, tokens: int | None = None) -> tuple[dict, dict]:
    tensors, header, _ = parts(model.compress("The dog looked up.", ratio=10).to_bytes())
    if num_layers is not None:
        header["payload"]["num_layers"] = num_layers
    if tokens is not None:
        header["segments"][0][2] = tokens
    return tensors, header


def test_legitimate_memories_stand_for_far_more_than_they_weigh(model: Nugget2D) -> None:
    """What bounds forgeries must not refuse a few tokens of a long text, or an exact memory of a text of one letter."""
    memory = model.compress(TEXT, ratio=50, method="truncation")
    long = replace(memory, segments=(Segment(0, 4_000_000, 1_000_000, memory.segments[0].num_nuggets),))
    assert Memory.from_bytes(long.to_bytes(), "a.nugget").num_tokens == 1_000_000
    exact = model.compress("a" * 5000, ratio=50, exact=True, dtype="int8")
    assert Memory.from_bytes(exact.to_bytes(), "a.nugget").exact.text() == "a" * 5000


# ---- containers ----


def test_headers_of_safetensors_that_lie_are_refused(model: Nugget2D, tmp_path: Path) -> None:
    data = model.compress(TEXT, ratio=4).to_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def rewritten(text: str) -> bytes:
        return len(text.encode()).to_bytes(8, "little") + text.encode() + body

    def altered(name: str, **fields: object) -> bytes:
        return rewritten(json.dumps(header | {name: header[name] | fields}))

    files = [
        altered("scores", data_offsets=[0, 10**12]),
        altered("scores", data_offsets=[2**63, 2**64]),
        altered("scores", shape=[2**62, 8]),
        altered("scores", dtype="F4"),
        altered("scores", dtype=7),
        altered("__metadata__", checksum=None),
        altered("__metadata__", version="2" * 5000),
        rewritten(json.dumps(header | {"__metadata__": ["nugget2d.memory"]})),
        rewritten(json.dumps(header | {"__metadata__": {"format": "nugget2d.memory"}})),
        rewritten(json.dumps({"__metadata__": header["__metadata__"]})),
        rewritten('{"a":' * 100_000),
        rewritten("[" * 100_000),
        rewritten('{"a":' + "9" * 10_000 + "}"),
        rewritten('{"a":"\\ud800"}'),
        rewritten(json.dumps(header)[:-1] + "," + json.dumps(header)[1:]).replace(b'"I32"', b'"U32"', 1),
        *((number).to_bytes(8, "little") + data[8:] for number in (0, 1, length - 1, 2**31, 2**63, 2**64 - 1)),
        data[:8],
        data[: 8 + length],
    ]
    for number, file in enumerate(files):
        path = tmp_path / f"{number}.nugget"
        path.write_bytes(file)
        for read in (Memory.load, Memory.map, lambda path: Memory.from_bytes(path.read_bytes(), path)):
            with pytest.raises(MemoryFileError) as caught:
                read(path)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_pipes_and_devices_are_no_memories(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nugget")  # nobody writes: opening it would wait for ever
    for path in (tmp_path / "pipe.nugget", Path("/dev/zero"), Path("/dev/null")):
        for read in (Memory.load, Memory.map):
            with pytest.raises(MemoryFileError, match="a pipe or a device"):
                read(path)
    for read in (Memory.load, Memory.map):
        with pytest.raises(MemoryFileError):
            read("a\0b")
