"""A store in a folder: what it keeps, whom it shows it to, how it is searched, and what it refuses."""

import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import DamageWarning, InputError, MemoryFileError, OutputError, StoreError, UnknownMemoryError
from nugget2d.inference.token_decoding import decode_tokens
from nugget2d.memory.states import States, StoreDtype
from nugget2d.methods.options import CompressOptions, digest
from nugget2d.store import MemoryStore, Record

TEXT = "The dog looked up as if it had counted too. In winter the road was closed for weeks."


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store") as opened:
        yield opened


def files(store_folder: Path) -> list[Path]:
    return sorted(path for path in (store_folder / "memories").rglob("*") if path.is_file())


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


# ---- keeping ----


def test_a_kept_memory_is_the_same_memory(store: MemoryStore, llama: Nugget2D) -> None:
    memory = llama.compress(TEXT, ratio=4, exact=True, dtype="int8")
    record = store.put(memory, name="a", tags=["x", "y"])
    assert store.get(record.id).checksum == memory.checksum == record.key
    assert store.put(memory, name="again") == record
    assert llama.reconstruct(store.get(record.id)) == TEXT
    assert (record.num_tokens, record.num_nuggets, record.num_chars, record.ratio, record.nbytes, record.model) == (
        memory.num_tokens,
        memory.num_nuggets,
        len(TEXT),
        memory.ratio,
        memory.nbytes,
        memory.fingerprint,
    )
    assert Record.model_validate_json(record.model_dump_json()) == record == store.record(record.id)


def test_the_same_work_is_not_done_twice(store: MemoryStore, llama: Nugget2D, monkeypatch) -> None:
    first = store.add(llama, TEXT, ratio=4, name="first")
    same = store.add(llama, TEXT, ratio=4.0, selection=llama.config.selection, dtype="int8", name="second")
    assert same == first == store.record(first.id)
    others = [
        store.add(llama, TEXT + " ", ratio=4),
        store.add(llama, TEXT, ratio=5),
        store.add(llama, TEXT, ratio=4, exact=True),
        store.add(llama, TEXT, ratio=4, dtype="float32"),
        store.add(llama, TEXT, ratio=4, selection="even"),
        store.add(llama, TEXT, target_accuracy=0.5),
        store.add(tiny.trained("llama", "copies", seed=9), TEXT, ratio=4),
    ]
    assert len({first.id, *(record.id for record in others)}) == 8 == len(store.records())
    # another owner's record needs no work either
    monkeypatch.setattr(CompressOptions, "compress", None)
    theirs = store.add(llama, TEXT, ratio=4, owner="ann")
    assert theirs.key == first.key and theirs.id != first.id
    with pytest.raises(TypeError):
        store.add(llama, "another text", ratio=4)


def test_a_store_keeps_int8_unless_asked_otherwise(store: MemoryStore, llama: Nugget2D) -> None:
    """What was kept as float32, the former default, keeps its address."""
    record = store.add(llama, TEXT, ratio=4)
    assert store.get(record.id).checksum == llama.compress(TEXT, ratio=4, dtype="int8").checksum
    former = store.put(llama.compress(TEXT, ratio=4), key=CompressOptions.of(llama, ratio=4).address(TEXT, llama))
    asked = store.add(llama, TEXT, ratio=4, dtype="float32")
    assert asked == former != record and store.get(asked.id).dtype == "float32"
    exact = store.add(llama, TEXT, ratio=4, exact=True)
    assert store.get(exact.id).dtype == "int8" and llama.reconstruct(store.get(exact.id)) == TEXT
    assert record.nbytes < former.nbytes / 3


def test_two_owners_share_a_file_until_both_are_gone(tmp_path: Path, llama: Nugget2D) -> None:
    with MemoryStore(tmp_path) as store:
        ann, bob = (store.add(llama, TEXT, ratio=4, owner=owner) for owner in ("ann", "bob"))
        assert len(files(tmp_path)) == 1
        store.remove(ann.id, owner="ann")
        assert store.get(bob.id, owner="bob").num_tokens == bob.num_tokens
        store.remove(bob.id)
        assert files(tmp_path) == [] == store.records()


def test_what_is_anothers_does_not_exist(store: MemoryStore, llama: Nugget2D) -> None:
    record = store.add(llama, TEXT, ratio=4, owner="ann", tags=["x"])
    for ask in (store.get, store.record, store.remove):
        with pytest.raises(UnknownMemoryError) as theirs:
            ask(record.id, owner="bob")
        with pytest.raises(UnknownMemoryError) as nobodys:
            ask("0" * 32, owner="bob")
        assert str(theirs.value).replace(record.id, "") == str(nobodys.value).replace("0" * 32, "")
    assert store.records(owner="bob") == [] == store.search("dog", owner="bob")
    assert store.records(owner="ann") == [record] == store.records(tag="x") == store.records()
    assert store.records(tag="z") == []


@pytest.mark.parametrize("id", ["", "..", "../../etc/passwd", "A" * 32, "é" * 32, "0" * 31])
def test_ids_never_become_paths(store: MemoryStore, llama: Nugget2D, id: str) -> None:
    for ask in (store.get, store.record, store.remove, store.place):
        with pytest.raises(UnknownMemoryError):
            ask(id)
    with pytest.raises(InputError, match="content address"):
        store.put(llama.compress(TEXT, ratio=4), key=id)


def test_addresses_have_no_seams(llama: Nugget2D) -> None:
    """What ends one part of an address cannot begin the next."""
    assert digest("text", "ab", "c") != digest("text", "a", "bc") != digest("text", "a", "b", "c")
    settings = CompressOptions.of(llama, ratio=4, dtype="int8")
    assert settings.address("\ud800", llama) != settings.address("\ud801", llama)


def test_a_training_free_memory_has_one_address_for_every_wrapper_of_the_base() -> None:
    one, other = tiny.trained("llama", "lora", 0), tiny.make("llama", "lora", 0)
    free, trained = ({"method": "knorm"}, {"method": "nugget2d"})
    addresses = [
        [CompressOptions.of(model, **how).address(TEXT, model) for model in (one, other)] for how in (free, trained)
    ]
    assert addresses[0][0] == addresses[0][1]
    assert addresses[1][0] != addresses[1][1]


def test_a_new_process_finds_everything(tmp_path: Path, llama: Nugget2D) -> None:
    with MemoryStore(tmp_path) as store:
        records = [store.add(llama, f"{number} {TEXT}", ratio=4) for number in range(5)]
    with MemoryStore(tmp_path, create=False) as store:
        assert store.records() == records
        assert [store.get(record.id).num_chars for record in records] == [len(TEXT) + 2] * 5


def test_settings_are_those_that_compress_would_take(llama: Nugget2D) -> None:
    of = CompressOptions.of
    assert of(llama) == of(llama, method="nugget2d", ratio=20, selection="learned", dtype="float32")
    assert of(llama, target_accuracy=0.9).ratio is None
    assert of(llama, target_accuracy=0.9, optimize_steps=3).ratio == 20
    for asked in (
        {},
        {"target_accuracy": 0.5},
        {"method": "knorm", "nuggets": 7},
        {"ratio": 3.0, "exact": True, "dtype": "bfloat16"},
    ):
        direct = llama.compress(TEXT, **asked)
        assert of(llama, **asked).compress(llama, [TEXT])[0].checksum == direct.checksum


def test_what_compress_refuses_is_not_kept(store: MemoryStore, llama: Nugget2D) -> None:
    for text, asked in (("", {}), (TEXT, {"ratio": 0.5}), (TEXT, {"dtype": "int4"}), (TEXT, {"target_accuracy": 2.0})):
        with pytest.raises(InputError):
            store.add(llama, text, **asked)
    assert store.records() == []


# ---- reading lazily ----


def mapped_kilobytes(path: Path) -> int:
    """Of the pages of `path` that this process has touched."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    return sum(
        int(line.split()[1]) for start in starts for line in lines[start + 1 : start + 6] if line.startswith("Rss:")
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells which pages are touched")
def test_layers_are_read_when_they_are_touched(store: MemoryStore, llama: Nugget2D) -> None:
    """Layers of 8 MB: a page that is touched may bring up to 2 MB with it."""
    memory = llama.compress(TEXT[:40], ratio=4)
    layers = [States(torch.full((64, memory.num_nuggets, 2**15 // memory.num_nuggets), float(n))) for n in range(8)]
    record = store.put(replace(memory, payload=memory.kv.with_states(layers[:4], layers[4:])), key="0" * 32)
    path = Path(store.place(record.id))
    whole, layer = path.stat().st_size / 1024, layers[0].nbytes / 1024
    lazy = store.get(record.id, verify=False)
    before = mapped_kilobytes(path)
    assert lazy.keys[2].data.mean() == 2
    after = mapped_kilobytes(path)
    assert before < whole / 2 and layer / 2 < after - before < 2 * layer
    del lazy
    verified = store.get(record.id)
    assert mapped_kilobytes(path) > whole * 0.95
    # what a reader writes stays its own
    verified.keys[0].data.fill_(5)
    assert store.get(record.id).keys[0].data.max() == 0


def test_an_unverified_read_finds_other_layers_whole(store: MemoryStore, llama: Nugget2D) -> None:
    record = store.add(llama, TEXT, ratio=2)
    good = store.get(record.id)
    path = Path(store.place(record.id))
    data = path.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")
    flip_bit(path, first + json.loads(data[8:first])["values.2"]["data_offsets"][0])
    with pytest.raises(MemoryFileError, match="damaged"):
        store.get(record.id)
    lazy = store.get(record.id, verify=False)
    assert torch.equal(lazy.keys[0].data, good.keys[0].data)


# ---- checking ----


def test_a_flipped_bit_is_named(tmp_path: Path, llama: Nugget2D) -> None:
    with MemoryStore(tmp_path) as store:
        records = [store.add(llama, f"{number} {TEXT}", ratio=4) for number in range(4)]
        assert store.verify() == []
        path = Path(store.place(records[2].id))
        flip_bit(path, path.stat().st_size // 2)
        (damage,) = store.verify()
        assert (damage.id, damage.place) == (records[2].id, str(path)) and "checksum" in damage.reason
        path.unlink()
        (damage,) = store.verify()
        assert damage.id == records[2].id
        with pytest.raises(StoreError, match="lost its file"):
            store.get(records[2].id)
        # as the message says
        store.remove(records[2].id)
        again = store.add(llama, f"2 {TEXT}", ratio=4)
        assert again.id == records[2].id and store.verify() == []


@pytest.mark.parametrize("column", ["record", "words"])
def test_a_flipped_bit_in_the_index_is_named(tmp_path: Path, llama: Nugget2D, column: str) -> None:
    with MemoryStore(tmp_path) as store:
        records = [store.add(llama, f"{number} {TEXT}", ratio=4) for number in range(3)]
        db = sqlite3.connect(tmp_path / "index.db")
        (data,) = db.execute(f"SELECT {column} FROM records WHERE id = ?", (records[1].id,)).fetchone()
        damaged = data[:1] + bytes([data[1] ^ 1]) + data[2:]
        with db:
            db.execute(f"UPDATE records SET {column} = ? WHERE id = ?", (damaged, records[1].id))
        db.close()
        (damage,) = store.verify()
        assert damage.id == records[1].id and "checksum" in damage.reason
        if column == "record":  # lists are not held up
            with pytest.warns(DamageWarning, match=f"{records[1].id} is damaged .*add its text again, or remove it"):
                assert store.records() == [records[0], records[2]]
        store.remove(records[1].id, owner="")
        assert store.records() == [records[0], records[2]]


def test_a_damaged_file_is_not_handed_on(store: MemoryStore, llama: Nugget2D) -> None:
    """What another owner adds is read from the first one's file only if that file is whole; else it is mended."""
    first = store.add(llama, TEXT, ratio=4, owner="ann")
    flip_bit(Path(store.place(first.id)), -5)
    second = store.add(llama, TEXT, ratio=4, owner="bob")
    assert store.verify() == []
    assert store.get(first.id).checksum == store.get(second.id).checksum


def test_other_folders_and_newer_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        MemoryStore(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()
    MemoryStore(tmp_path).close()
    db = sqlite3.connect(tmp_path / "index.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="has version 99, this package reads 3; upgrade"):
        MemoryStore(tmp_path)
    for name, content in (("text", b"plain text " * 100), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.db").write_bytes(content)
        with pytest.raises(StoreError):
            MemoryStore(tmp_path / name)
        assert (tmp_path / name / "index.db").read_bytes() == content
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StoreError, match="cannot make a store"):
        MemoryStore(tmp_path / "file")


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Permissions mean nothing to root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_store_that_cannot_be_written_is_read(tmp_path: Path, llama: Nugget2D, request) -> None:
    folder = tmp_path / "store"
    with MemoryStore(folder) as store:
        record = store.add(llama, TEXT, ratio=4)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.parents)}
    modes = {path: mode for path, mode in modes.items() if path == folder or mode & 0o005 != 0o005}
    for path in modes:
        path.chmod(0o555 if path == folder else 0o755)
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    request.getfixturevalue("unprivileged")
    try:
        with MemoryStore(folder) as store:
            assert store.records() == [record]
            assert store.get(record.id).num_tokens == record.num_tokens
            assert store.verify() == []
            with pytest.raises((StoreError, OutputError)):
                store.add(llama, TEXT, ratio=5)
            with pytest.raises(StoreError, match="readonly"):
                store.remove(record.id)
    finally:
        if not os.getuid():
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


# ---- searching ----


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_chosen_tokens_are_read_off_any_memory(kind: str, dtype: StoreDtype) -> None:
    model = tiny.trained(kind, "lora")
    memory = model.compress(TEXT, ratio=3, dtype=dtype)
    ids, spelt = model.ids(TEXT)[0], decode_tokens(model, memory)
    assert [len(part) for part in spelt] == [segment.num_nuggets for segment in memory.segments]
    right = (torch.cat(spelt) == ids[memory.positions]).float().mean()
    assert right == 1 if kind != "gpt2" else right > 0.5  # there, positions are as loud as tokens


def test_an_empty_store_finds_nothing(store: MemoryStore, llama: Nugget2D) -> None:
    assert store.search("dog") == [] == store.records() == store.verify()
    assert store.gc() == (0, 0)


def test_records_are_plain_json(store: MemoryStore, llama: Nugget2D) -> None:
    record = store.add(llama, TEXT, ratio=4, name="\u2028 \x1b[31m", tags=["é"])
    assert json.loads(record.model_dump_json())["model"]["name"] == record.model.name
    assert store.records()[0].name == "\u2028 \x1b[31m"
    assert isinstance(Memory.load(store.place(record.id)), Memory)
