"""Lists of a store by parts: in Python, over HTTP, and with the official client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BaseModel
from openai.pagination import SyncCursorPage

from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, UnknownMemoryError
from nugget2d.store import MemoryStore, Record
from serving import serving


@pytest.fixture(scope="module")
def memory(llama: Nugget2D) -> Memory:
    return llama.compress("Beans grow behind the wall.", ratio=4)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path) as opened:
        yield opened


def fill(store: MemoryStore, memory: Memory, count: int) -> list[Record]:
    """Every other one is ann's, every third one has the tag "x"."""
    return [
        store.put(
            memory,
            key=f"{number:032x}",
            name=str(number),
            owner="" if number % 2 else "ann",
            tags=["all", "all", *(["x"] if number % 3 == 0 else [])],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("owner", [None, "", "ann", "bob"])
@pytest.mark.parametrize("tag", [None, "x", "all", "y"])
@pytest.mark.parametrize("newest_first", [False, True])
def test_parts_are_the_whole(
    store: MemoryStore, memory: Memory, owner: str | None, tag: str | None, newest_first: bool
) -> None:
    whole = [
        record
        for record in fill(store, memory, 13)
        if owner in (None, record.owner) and (tag is None or tag in record.tags)
    ]
    if newest_first:
        whole.reverse()
    wanted = {"owner": owner, "tag": tag, "newest_first": newest_first}
    assert store.records(**wanted) == whole
    for limit in (1, 2, 5, 13, 100):
        read: list[Record] = []
        while part := store.records(**wanted, limit=limit, after=read[-1].id if read else None):
            assert len(part) == limit or len(read) + len(part) == len(whole)
            read += part
        assert read == whole


def test_a_list_goes_on_behind_a_record_of_its_owner(store: MemoryStore, memory: Memory) -> None:
    anns, nobodys = fill(store, memory, 2)
    for after, owner in ((anns.id, ""), (nobodys.id, "ann"), ("0" * 32, None), ("", None)):
        with pytest.raises(UnknownMemoryError):
            store.records(owner=owner, after=after)
    for limit in (0, -1):
        with pytest.raises(InputError, match="limit must be at least 1"):
            store.records(limit=limit)


def test_bytes_of_an_owner(store: MemoryStore, memory: Memory) -> None:
    fill(store, memory, 5)
    assert (store.nbytes(owner="ann"), store.nbytes(owner="")) == (3 * memory.nbytes, 2 * memory.nbytes)
    assert store.nbytes(owner="bob") == 0


def test_beginnings_of_ids(store: MemoryStore, memory: Memory) -> None:
    ids = sorted(record.id for record in fill(store, memory, 40))
    assert sorted(store.matching("")) == ids and store.matching(ids[0]) == ids[:1]
    assert sorted(store.matching(ids[0][0])) == [id for id in ids if id[0] == ids[0][0]]
    for prefix in ("%", "_", "x", ids[0] + "0", "A"):
        assert store.matching(prefix) == []


def test_filters_are_answered_by_an_index(store: MemoryStore, memory: Memory) -> None:
    """Not by reading and sorting all: that a list of an owner, or of a tag of an owner, is as long as its part."""
    fill(store, memory, 3)
    asked: list[str] = []
    store._backend._index._db.set_trace_callback(asked.append)
    for owner in (None, "ann"):
        for tag in (None, "x"):
            store.records(owner=owner, tag=tag, limit=2)
            store.records(owner=owner, tag=tag, limit=2, newest_first=True)
    store._backend._index._db.set_trace_callback(None)
    lists = [query for query in asked if "ORDER BY" in query]
    assert len(lists) == 8
    for query in lists:
        plan = " ".join(row[-1] for row in store._backend._index.rows(f"EXPLAIN QUERY PLAN {query}"))
        assert "TEMP B-TREE" not in plan and "USING" in plan, plan


# ---- over HTTP ----


class Stored(BaseModel):
    """As a user of the official client declares it."""

    id: str
    name: str


def test_the_server_lists_by_parts(llama: Nugget2D, memory: Memory, tmp_path: Path) -> None:
    with MemoryStore(tmp_path) as store:
        names = [record.name for record in fill(store, memory, 250) if record.owner == ""]
    with serving(llama, tmp_path) as server, server.http() as http:
        first = http.get("/v1/memories").json()
        assert [one["name"] for one in first["data"]] == names[:100] and first["has_more"]
        assert (first["first_id"], first["last_id"]) == (first["data"][0]["id"], first["data"][-1]["id"])
        second = http.get("/v1/memories", params={"after": first["last_id"], "limit": 100}).json()
        assert [one["name"] for one in second["data"]] == names[100:] and not second["has_more"]
        newest = http.get("/v1/memories", params={"order": "desc", "limit": 3, "tag": "x"}).json()
        assert [one["name"] for one in newest["data"]] == ["249", "243", "237"]
        empty = http.get("/v1/memories", params={"tag": "none"}).json()
        assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        for wrong in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"before": first["last_id"]}):
            refused = http.get("/v1/memories", params=wrong)
            assert refused.status_code == 422 and refused.json()["error"]["param"] == next(iter(wrong))
        assert http.get("/v1/memories", params={"after": "0" * 32}).status_code == 404
        # the official client goes through all parts by itself
        client = server.client()
        assert client.get("/memories", cast_to=object)["last_id"] == first["last_id"]
        pages = client.get_api_list("/memories", page=SyncCursorPage[Stored], model=Stored)
        assert [one.name for one in pages] == names


def test_a_damaged_memory_is_no_bar_to_others(
    llama: Nugget2D, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its owner can delete it, or add its text again; the log names it."""
    fields = [{"text": f"{name} grow behind the wall.", "name": name} for name in ("Beans", "Peas", "Oats")]
    with serving(llama, tmp_path, ("a", "b")) as server, server.http("a") as http:
        ids = [http.post("/v1/memories", json=one).json()["id"] for one in fields]
        with server.service.store._backend._index.transaction() as db:
            db.execute("UPDATE records SET record = x'7b' WHERE id IN (?, ?)", ids[:2])
        lost = Path(server.service.store.place(ids[2]))
        lost.unlink()
        assert [one["id"] for one in http.get("/v1/memories").json()["data"]] == ids[2:]
        assert ids[0] in capfd.readouterr().err
        assert server.http("b").get("/v1/memories").json()["data"] == []
        assert server.http("b").delete(f"/v1/memories/{ids[0]}").status_code == 404
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        for id in ids:
            answer = http.post("/v1/completions", json={**ask, "memory_ids": [id]})
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "memory_damaged"
            assert str(tmp_path) not in answer.text
        assert http.delete(f"/v1/memories/{ids[0]}").json()["deleted"]
        assert [http.post("/v1/memories", json=one).status_code for one in fields] == [201] * 3
        for id in ids:
            assert http.post("/v1/completions", json={**ask, "memory_ids": [id]}).status_code == 200
        assert {one["name"] for one in http.get("/v1/memories").json()["data"]} == {"Beans", "Peas", "Oats"}


def test_a_server_whose_store_is_gone_says_so(llama: Nugget2D, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with serving(llama, folder) as server, server.http() as http:
        folder.rename(tmp_path / "elsewhere")
        for answer in (http.post("/v1/memories", json={"text": "Beans."}), http.get("/v1/memories")):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "store_gone"
            assert str(tmp_path) not in answer.text
        assert not folder.exists()
        (tmp_path / "elsewhere").rename(folder)
        assert http.post("/v1/memories", json={"text": "Beans."}).status_code == 201
