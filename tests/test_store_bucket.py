"""A store in a bucket, against a server of S3 on loopback: as a folder behaves, with no lock but create-if-absent."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from moto.server import ThreadedMotoServer

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import DamageError, DamageWarning, MemoryFileError, StoreError, UnknownMemoryError
from nugget2d.store import MemoryStore, bucket
from nugget2d.store.backend import entry_digest

pytestmark = pytest.mark.e2e

TEXT = "The dog looked up as if it had counted too. In winter the road was closed for weeks."


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def options(server: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What leads to an empty bucket."""
    for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):
        urllib.request.urlopen(urllib.request.Request(f"{server}/{path}", method=method)).close()
    secrets = {"access_key_id": "a", "secret_access_key": "s", "region": "us-east-1"}
    return {"endpoint": server, **secrets, "client_options": {"allow_http": True}}


@pytest.fixture
def store(options: dict[str, Any]) -> MemoryStore:
    return MemoryStore("s3://bucket/prefix", **options)


@pytest.fixture
def objects(options: dict[str, Any]) -> Callable[[], dict[str, bytes]]:
    place = obstore.store.from_url("s3://bucket/prefix", **options)

    def read() -> dict[str, bytes]:
        names = [meta["path"] for page in obstore.list(place) for meta in page]
        return {name: bytes(obstore.get(place, name).bytes()) for name in names}

    return read


@pytest.fixture(scope="module")
def memory() -> Memory:
    return tiny.trained("llama", "copies").compress(TEXT, ratio=4)


def test_it_behaves_like_a_folder(store: MemoryStore, options: dict[str, Any], llama: Nugget2D, tmp_path: Path) -> None:
    with MemoryStore(tmp_path) as folder:
        for place in (folder, store):
            first = place.add(llama, TEXT, ratio=1, name="a", tags=["x"], owner="ann")
            assert place.add(llama, TEXT, ratio=1, owner="ann") == first
            place.add(llama, "Beans behind the wall.", ratio=1, owner="bob")
        here, there = folder.records(), store.records()
        assert [record.model_copy(update={"created": ""}) for record in here] == [
            record.model_copy(update={"created": ""}) for record in there
        ]
        for record in there:
            assert store.get(record.id).checksum == folder.get(record.id).checksum
        found, expected = (place.search("Beans behind the wall.") for place in (store, folder))
        assert [(hit.record.id, hit.score, hit.start, hit.end) for hit in found] == [
            (hit.record.id, hit.score, hit.start, hit.end) for hit in expected
        ]
        assert store.records(owner="bob", tag="x") == [] and store.records(tag="x") == there[:1]
        with pytest.raises(UnknownMemoryError):
            store.get(there[0].id, owner="bob")
        assert store.verify() == [] and store.gc() == (0, 0)
    again = MemoryStore("s3://bucket/prefix", **options)
    assert again.records() == there
    assert MemoryStore("s3://bucket/other", **options).records() == []


def test_another_owner_needs_no_work(store: MemoryStore, llama: Nugget2D, monkeypatch) -> None:
    first = store.add(llama, TEXT, ratio=4, owner="ann")
    monkeypatch.setattr(Nugget2D, "compress", None)
    second = store.add(llama, TEXT, ratio=4, owner="bob")
    assert second.key == first.key
    store.remove(first.id)
    assert store.get(second.id).num_tokens == second.num_tokens
    with pytest.raises(UnknownMemoryError):
        store.remove(first.id)


def test_many_writers_of_one_memory(options: dict[str, Any], memory: Memory, objects) -> None:
    stores = [MemoryStore("s3://bucket/prefix", **options) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(lambda n: stores[n % 4].put(memory, name=str(n), key=f"{n % 3:032x}"), range(24)))
    assert len({record.id for record in records}) == 3
    # who came late was given the record of who came first
    assert len({(record.id, record.name, record.created) for record in records}) == 3
    assert sorted(stores[0].records(), key=lambda record: record.id) == sorted(
        {record.id: record for record in records}.values(), key=lambda record: record.id
    )
    assert stores[0].verify() == []
    assert len(objects()) == 6


def test_a_lost_answer_is_no_other_writer(store: MemoryStore, memory: Memory, monkeypatch, objects) -> None:
    """The request that creates the record is repeated below after its answer was lost: the record there is ours."""
    put = obstore.put

    def twice(place: Any, name: str, data: bytes, **mode: str) -> Any:
        if mode:
            put(place, name, data, **mode)
        return put(place, name, data, **mode)

    monkeypatch.setattr(obstore, "put", twice)
    record = store.put(memory)
    assert store.get(record.id).checksum == memory.checksum and len(objects()) == 2


def test_damage_is_named(store: MemoryStore, options: dict[str, Any], memory: Memory, objects) -> None:
    ids = [store.put(memory, key=f"{number:032x}").id for number in range(5)]
    place = obstore.store.from_url("s3://bucket/prefix", **options)
    held = objects()
    rows = [json.loads(held[f"records/{id}.json"]) for id in ids]
    file = bytearray(held[rows[1]["file"]])
    file[len(file) // 2] ^= 1
    obstore.put(place, rows[1]["file"], bytes(file))
    obstore.delete(place, rows[2]["file"])
    changed = {**rows[3], "record": rows[3]["record"].replace('"owner":""', '"owner":"x"')}
    obstore.put(place, f"records/{ids[3]}.json", json.dumps(changed).encode())
    obstore.put(place, f"records/{ids[4]}.json", held[f"records/{ids[4]}.json"][:-9])
    reasons = {damage.id: damage.reason for damage in store.verify()}
    assert set(reasons) == set(ids[1:])
    assert "checksum" in reasons[ids[1]] and "lost its file" in reasons[ids[2]]
    assert "checksum" in reasons[ids[3]] and "damaged" in reasons[ids[4]]
    with pytest.raises(MemoryFileError, match=r"s3://bucket/prefix/memories/"):
        store.get(ids[1])
    # lists go on, and name what they cannot read
    with pytest.warns(DamageWarning, match=f"record {ids[4]} is damaged"):
        assert {record.id for record in store.records()} == set(ids[:4])
    for number, id in enumerate(ids[1:], 1):
        with pytest.raises(UnknownMemoryError):
            store.remove(id, owner="bob")
        if number % 2:
            assert store.at(f"{number:032x}") is None
            assert (store.at(f"{number:032x}", verify=False) is None) == (number != 1)  # a bit that only reading tells
            assert store.put(memory, key=f"{number:032x}").id == id
        else:
            store.remove(id, owner="")
    assert store.verify() == [] and {record.id for record in store.records()} == {ids[0], ids[1], ids[3]}
    for number in (2, 4):
        store.put(memory, key=f"{number:032x}")
    assert store.verify() == [] and len(store.records()) == 5


def test_a_damaged_record_is_written_again(store: MemoryStore, options: dict[str, Any], memory: Memory) -> None:
    record = store.put(memory, key="0" * 32, name="a", tags=["x"], owner="ann")
    place = obstore.store.from_url("s3://bucket/prefix", **options)
    obstore.put(place, f"records/{record.id}.json", b"{")
    for ask in (store.record, store.get, store.remove):
        with pytest.raises(UnknownMemoryError):
            ask(record.id, owner="bob")
    with pytest.raises(DamageError):
        store.record(record.id, owner="ann")
    again = store.put(memory, key="0" * 32, name="b", owner="ann")
    assert (again.id, again.name) == (record.id, "b") and store.records() == [again]
    # if the record can still be read, what people gave it stays
    obstore.delete(place, [meta["path"] for page in obstore.list(place, "memories") for meta in page])
    assert store.put(memory, key="0" * 32, name="c", owner="ann").name == "b"
    assert store.verify() == [] and store.get(record.id).checksum == memory.checksum


def test_files_that_changed_places_are_noticed(store: MemoryStore, options: dict[str, Any], memory: Memory) -> None:
    one, two = store.put(memory), store.put(memory.to("int8"))
    place = obstore.store.from_url("s3://bucket/prefix", **options)
    names = [store.place(record.id).removeprefix("s3://bucket/prefix/") for record in (one, two)]
    obstore.put(place, names[0], bytes(obstore.get(place, names[1]).bytes()))
    assert [damage.id for damage in store.verify()] == [one.id]
    with pytest.raises(MemoryFileError, match="not the one that was stored there"):
        store.get(one.id)


def test_lists_have_parts(store: MemoryStore, memory: Memory) -> None:
    records = [store.put(memory, key=f"{n:032x}", owner="ann", tags=["x"] if n % 2 else []) for n in range(5)]
    store.put(memory, owner="bob")
    assert store.records(owner="ann", limit=2) == records[:2]
    assert store.records(owner="ann", limit=9, after=records[1].id) == records[2:]
    assert store.records(owner="ann", tag="x", newest_first=True) == [records[3], records[1]]
    assert store.records(owner="ann", tag="x", after=records[2].id) == [records[3]]
    assert sorted(store.matching(records[0].id[:1])) == sorted(
        record.id for record in store.records() if record.id[0] == records[0].id[0]
    )
    with pytest.raises(UnknownMemoryError):
        store.records(owner="bob", after=records[0].id)


def test_records_of_earlier_stores_are_read(store: MemoryStore, options: dict[str, Any], memory: Memory) -> None:
    """Version 2: the record does not know the checksum of its memory."""
    kept = store.put(memory, tags=["x"])
    record = kept.model_copy(update={"checksum": ""})
    file = store.place(kept.id).removeprefix("s3://bucket/prefix/")
    text = record.model_dump_json(exclude={"checksum"})
    row = {"version": 2, "record": text, "words": "", "file": file}
    row["digest"] = entry_digest(text.encode(), b"").hex()
    place = obstore.store.from_url("s3://bucket/prefix", **options)
    obstore.put(place, f"records/{kept.id}.json", json.dumps(row).encode())
    assert store.records(tag="x") == [record] == [store.put(memory)]
    assert store.get(kept.id).checksum == memory.checksum and store.verify() == []
    obstore.put(place, f"records/{kept.id}.json", json.dumps({**row, "version": 9}).encode())
    for ask in (store.records, store.gc):  # of a newer package, which knows what it means
        with pytest.raises(StoreError, match="has version 9"):
            ask()


def test_gc_sweeps_only_old_orphans(store: MemoryStore, options: dict[str, Any], memory: Memory, monkeypatch) -> None:
    kept = store.put(memory)
    place = obstore.store.from_url("s3://bucket/prefix", **options)
    obstore.put(place, f"memories/{'0' * 32}/x.nugget", b"12345")
    assert store.gc() == (0, 0)
    monkeypatch.setattr(bucket, "ORPHAN_SECONDS", -60)
    assert store.gc() == (1, 5)
    assert store.get(kept.id).checksum == memory.checksum


def test_variables_of_the_environment_lead_there(options: dict[str, Any], memory: Memory, monkeypatch) -> None:
    for name, value in (
        ("AWS_ENDPOINT", options["endpoint"]),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ALLOW_HTTP", "true"),
    ):
        monkeypatch.setenv(name, value)
    assert MemoryStore("s3://bucket/prefix").put(memory).num_tokens == memory.num_tokens


def test_what_cannot_be_reached_is_one_clear_error(options: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"s3://nowhere/x: .*NoSuchBucket"):
        MemoryStore("s3://nowhere/x", **options).records()
    for url in ("bogus://b", "s3://", "s3://a b", "://"):
        with pytest.raises(StoreError, match=url):
            MemoryStore(url, **options)
    with pytest.raises(StoreError, match="nonsense"):
        MemoryStore("s3://bucket", **options, nonsense=1)
