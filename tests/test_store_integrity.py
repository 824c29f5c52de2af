"""What is lost or damaged in a store is named, can be removed, and is mended by adding it again."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nugget2d import Nugget2D
from nugget2d.errors import (
    DamageError,
    DamageWarning,
    MemoryFileError,
    NuggetError,
    OutputError,
    SearchWarning,
    StoreError,
    StoreGoneError,
    UnknownMemoryError,
)
from nugget2d.store import MemoryStore
from nugget2d.store.index import VERSION, Index
from test_cli import fails, run

TEXT = "The dog looked up as if it had counted too. In winter the road was closed for weeks."
V1 = Path(__file__).parent / "data" / "v1" / "store"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[MemoryStore]:
    with MemoryStore(folder) as opened:
        yield opened


def change(folder: Path, statement: str, *values: object) -> None:
    """In the index, past the store."""
    db = sqlite3.connect(folder / "index.db")
    with db:
        assert db.execute(statement, values).rowcount > 0
    db.close()


# ---- damage, and its mending ----


def lose_file(folder: Path, id: str, file: Path) -> None:
    file.unlink()


def lose_folder(folder: Path, id: str, file: Path) -> None:
    shutil.rmtree(folder / "memories")


def flip_bit(folder: Path, id: str, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def truncate(folder: Path, id: str, file: Path) -> None:
    os.truncate(file, 100)


def link_elsewhere(folder: Path, id: str, file: Path) -> None:
    file.unlink()
    file.symlink_to(folder / "nowhere")


def break_record(folder: Path, id: str, file: Path) -> None:
    change(folder, "UPDATE records SET record = ? WHERE id = ?", b"{", id)


def change_record(folder: Path, id: str, file: Path) -> None:
    """It can still be read."""
    change(folder, "UPDATE records SET record = CAST(replace(record, '\"a\"', '\"b\"') AS BLOB) WHERE id = ?", id)


def break_words(folder: Path, id: str, file: Path) -> None:
    change(folder, "UPDATE records SET words = ? WHERE id = ?", b"", id)


def change_owner(folder: Path, id: str, file: Path) -> None:
    change(folder, "UPDATE records SET owner = 'bob' WHERE id = ?", id)


def lose_tags(folder: Path, id: str, file: Path) -> None:
    change(folder, "DELETE FROM tags WHERE id = ?", id)


def change_types(folder: Path, id: str, file: Path) -> None:
    """SQLite keeps any type in any column."""
    change(folder, "UPDATE records SET words = 'text', digest = 1, file = x'00', nbytes = 'many' WHERE id = ?", id)


def break_text(folder: Path, id: str, file: Path) -> None:
    """To what is not UTF-8."""
    change(folder, "UPDATE records SET (key, created, owner, file) = (t, t, t, t) FROM (SELECT CAST(x'ff' AS TEXT) t)")
    change(folder, "UPDATE tags SET tag = CAST(x'ff' AS TEXT) WHERE id = ?", id)


HARM = [lose_file, lose_folder, flip_bit, truncate, link_elsewhere, break_record, change_record, break_words]
HARM += [change_owner, lose_tags, change_types, break_text]


@pytest.mark.parametrize("harm", HARM)
def test_adding_again_mends(
    store: MemoryStore, folder: Path, llama: Nugget2D, harm: Callable[[Path, str, Path], None]
) -> None:
    record = store.add(llama, TEXT, ratio=4, name="a", tags=["x"], owner="ann")
    harm(folder, record.id, Path(store.place(record.id)))
    assert record.id in {damage.id for damage in store.verify()}
    assert store.at(record.key, owner="ann") is None
    unseen = store.at(record.key, owner="ann", verify=False)
    assert unseen == (record if harm is flip_bit else None)  # which only reading tells
    again = store.add(llama, TEXT, ratio=4, name="a", tags=["x"], owner="ann")
    assert again.id == record.id and again.name == "a"
    assert store.verify() == [] and store.get(again.id, owner="ann").checksum == record.checksum
    assert store.records(owner="ann", tag="x") == [again] == store.records()
    assert store.add(llama, TEXT, ratio=4, name="b", owner="ann") == again


def test_what_people_gave_a_lost_memory_stays(store: MemoryStore, llama: Nugget2D) -> None:
    """The new memory may be another one, as rounding differs with the machine."""
    first, other = llama.compress(TEXT, ratio=4), llama.compress(TEXT, ratio=3)
    record = store.put(first, key="0" * 32, name="a", tags=["x"])
    kept = store.put(other, key="0" * 32, name="b")
    assert kept == record and not Path(store.place(record.id)).with_stem(other.checksum).exists()
    Path(store.place(record.id)).unlink()
    mended = store.put(other, key="0" * 32, name="b")
    assert (mended.name, mended.tags, mended.checksum) == ("a", ("x",), other.checksum)
    assert store.get(record.id).checksum == other.checksum and store.verify() == []


@pytest.mark.parametrize("harm", [break_record, lose_file, flip_bit, change_record])
def test_an_owner_can_remove_what_is_damaged(
    store: MemoryStore, folder: Path, llama: Nugget2D, harm: Callable[[Path, str, Path], None]
) -> None:
    record = store.add(llama, TEXT, ratio=4, owner="ann", tags=["x"], name="a")
    harm(folder, record.id, Path(store.place(record.id)))
    with pytest.raises(UnknownMemoryError):
        store.remove(record.id, owner="bob")
    with pytest.raises(UnknownMemoryError):
        store.record(record.id, owner="bob")
    store.remove(record.id, owner="ann")
    assert store.verify() == [] == store.records() and store.matching("") == []
    assert not list(folder.rglob("*.nugget"))


def test_a_damaged_record_holds_up_no_list(
    store: MemoryStore, folder: Path, llama: Nugget2D, recwarn: pytest.WarningsRecorder
) -> None:
    records = [store.add(llama, f"{number} {TEXT}", ratio=4, tags=["x"]) for number in range(4)]
    assert not [warning for warning in recwarn if warning.category is DamageWarning]
    break_record(folder, records[1].id, folder)
    for asked in ({}, {"tag": "x"}, {"owner": ""}):
        with pytest.warns(DamageWarning, match=f"record {records[1].id} is damaged .* the list leaves it out"):
            assert store.records(**asked) == [records[0], *records[2:]]
    with pytest.warns(DamageWarning):
        assert store.records(limit=2) == [records[0], records[2]]
    assert store.records(after=records[1].id) == records[2:]
    with pytest.raises(DamageError, match="add its text again, or remove it"):
        store.get(records[1].id)
    with pytest.warns(SearchWarning, match=records[1].id):
        assert {hit.record.id for hit in store.search(TEXT)} == {record.id for record in records} - {records[1].id}


def test_text_that_is_none_holds_up_no_other_record(store: MemoryStore, folder: Path, llama: Nugget2D) -> None:
    one, two = (store.add(llama, f"{number} {TEXT}", ratio=4, tags=["x"]) for number in range(2))
    change(folder, "UPDATE records SET id = CAST(x'ff' AS TEXT), owner = CAST(x'ff' AS TEXT) WHERE id = ?", one.id)
    with pytest.warns(DamageWarning):
        assert store.records() == [two]
    assert store.records(owner="") == store.records(tag="x") == [two]
    assert [hit.record.id for hit in store.search("dog")] == [two.id]
    assert len(store.verify()) >= 1


def test_the_command_line_names_damage_and_goes_on(store: MemoryStore, folder: Path, llama: Nugget2D) -> None:
    one, two = (store.put(llama.compress(text, ratio=2), name=name) for text, name in (("One.", "a"), ("Two.", "b")))
    break_record(folder, one.id, folder)
    listed = run("store", "list", "--store", folder)
    assert two.id[:12] in listed.stdout and one.id[:12] not in listed.stdout
    (line,) = listed.stderr.splitlines()
    assert line.startswith("warning: record") and one.id in line
    fails("store", "verify", "--store", folder, saying=f"record {one.id} is damaged")
    run("store", "rm", one.id[:6], "--store", folder)
    run("store", "verify", "--store", folder)


# ---- the wrong file ----


@pytest.mark.parametrize("verify", [True, False])
def test_files_that_changed_places_are_noticed(store: MemoryStore, llama: Nugget2D, verify: bool) -> None:
    """Each is a whole memory, but of another text."""
    records = [store.add(llama, f"{number} {TEXT}", ratio=4) for number in range(2)]
    one, two = (Path(store.place(record.id)) for record in records)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert {damage.id for damage in store.verify()} == {record.id for record in records}
    for record in records:
        with pytest.raises(MemoryFileError, match="not the one that was stored there"):
            store.get(record.id, verify=verify)
    for number in range(2):
        store.add(llama, f"{number} {TEXT}", ratio=4)
    assert store.verify() == []


# ---- a store that is gone ----


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replace(folder: Path) -> None:
    rename(folder)
    MemoryStore(folder).close()


@pytest.mark.parametrize("leave", [remove, rename, replace])
def test_nothing_is_acknowledged_by_a_store_that_is_gone(
    store: MemoryStore, folder: Path, llama: Nugget2D, leave: Callable[[Path], None]
) -> None:
    record = store.add(llama, TEXT, ratio=4)
    leave(folder)
    before = sorted(folder.parent.rglob("*"))
    for ask in (
        lambda: store.add(llama, TEXT, ratio=4),
        lambda: store.put(llama.compress("Beans.", ratio=2)),
        lambda: store.get(record.id),
        lambda: store.remove(record.id),
        store.records,
        store.verify,
        store.gc,
    ):
        with pytest.raises(StoreGoneError, match="removed, moved or replaced"):
            ask()
    assert sorted(folder.parent.rglob("*")) == before


def test_a_store_that_goes_while_it_is_written_acknowledges_nothing(
    store: MemoryStore, folder: Path, llama: Nugget2D, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store._backend._write

    def late(path: Path, data: bytes) -> None:
        write(path, data)
        rename(folder)

    monkeypatch.setattr(store._backend, "_write", late)
    with pytest.raises(StoreGoneError):
        store.add(llama, TEXT, ratio=4)


# ---- links ----


def test_links_are_not_followed_out_of_a_store(store: MemoryStore, folder: Path, llama: Nugget2D) -> None:
    home = folder.parent / "home"
    home.mkdir()
    memory = llama.compress(TEXT, ratio=4)
    names = ["letter.txt", f"{memory.checksum}.nugget", f"ab{'0' * 30}.nugget", f".{'0' * 32}.nugget.x.tmp"]
    for name in names:
        (home / name).write_text("dear")
        os.utime(home / name, (0, 0))
    for name in ("zz", "ab", memory.checksum[:2]):
        (folder / "memories" / name).symlink_to(home)
    assert store.gc() == (0, 0)
    with pytest.raises(StoreError, match="is a link"):
        store.put(memory)
    assert {path.name: path.read_text() for path in home.iterdir()} == dict.fromkeys(names, "dear")


def test_gc_leaves_what_no_store_wrote(store: MemoryStore, folder: Path) -> None:
    place = folder / "memories" / "ab"
    place.mkdir()
    others = [
        place / "notes.txt",
        place / ".hidden",
        folder / "memories" / "ab.nugget",
        folder / "memories" / "x" / "y",
    ]
    others[-1].parent.mkdir()
    linked = place / f"ab{'1' * 30}.nugget"
    orphan = place / f"ab{'0' * 30}.nugget"
    for path in (*others, orphan):
        path.write_bytes(b"12345")
        os.utime(path, (0, 0))
    linked.symlink_to(others[0])
    assert store.gc() == (1, 5)
    assert all(path.exists() for path in (*others, linked)) and not orphan.exists()


# ---- making and opening ----


def test_a_store_is_made_where_there_are_no_hard_links(
    folder: Path, llama: Nugget2D, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with MemoryStore(folder) as store:
        record = store.add(llama, TEXT, ratio=4)
    assert sorted(path.name for path in folder.iterdir()) == ["index.db", "memories"]
    assert [path.name for path in (folder / "memories").iterdir()] == [record.checksum[:2]]


def test_addresses_of_folders_are_no_buckets(folder: Path, store: MemoryStore) -> None:
    for address in (f"file://{folder}", f"FILE://{folder}", "memory://"):
        with pytest.raises(StoreError, match="plain path"):
            MemoryStore(address)
        fails("store", "list", "--store", address, saying="plain path")


@pytest.fixture
def earlier(folder: Path) -> Path:
    """A store of version 2, with an owner and a damaged record."""
    shutil.copytree(V1, folder)
    return folder


def test_an_earlier_store_is_extended(earlier: Path) -> None:
    ids = sqlite3.connect(earlier / "index.db").execute("SELECT id FROM records ORDER BY created").fetchall()
    break_record(earlier, ids[1][0], earlier)
    for _ in range(2):
        with MemoryStore(earlier) as store, pytest.warns(DamageWarning):
            (record,) = store.records(owner="")
            assert store.records(tag="sea") == [record] and record.checksum == ""
            assert Path(store.place(record.id)).stem == record.key
            assert store.get(record.id).num_tokens == record.num_tokens
            assert store.at(record.key) == record and [damage.id for damage in store.verify()] == [ids[1][0]]
    with MemoryStore(earlier) as store:
        store.remove(ids[1][0], owner="")
        assert store.verify() == [] and store.gc() == (0, 0)
        again = store.put(store.get(record.id), key=record.key, owner="ann")
        store.remove(record.id)
        assert len(list(earlier.rglob("*.nugget"))) == 1
        assert store.get(again.id).num_tokens == record.num_tokens
    assert sqlite3.connect(earlier / "index.db").execute("PRAGMA user_version").fetchone() == (VERSION,)


def test_an_earlier_store_that_cannot_be_written_is_read(earlier: Path, llama: Nugget2D, monkeypatch) -> None:
    connect = Index._connect
    monkeypatch.setattr(Index, "_connect", lambda self, mode: connect(self, "immutable=1"))
    before = (earlier / "index.db").read_bytes()
    with MemoryStore(earlier) as store:
        record = store.records(tag="sea")[0]
        assert store.get(record.id).num_tokens == record.num_tokens and store.verify() == []
        with pytest.raises(StoreError, match="readonly"):
            store.remove(record.id)
        with pytest.raises(NuggetError, match="readonly"):
            store.put(llama.compress(TEXT, ratio=4))
    assert (earlier / "index.db").read_bytes() == before


def test_a_folder_in_the_way_is_one_clear_error(store: MemoryStore, folder: Path, llama: Nugget2D) -> None:
    memory = llama.compress(TEXT, ratio=4)
    (folder / "memories" / memory.checksum[:2]).write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        store.put(memory)
    assert store.records() == []
