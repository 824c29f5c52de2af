"""`nugget2d store` and `nugget2d index`: what they print, and one clear line for what goes wrong."""

import json
import lzma
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from cli_fixtures import save_tiny_model
from nugget2d import Memory
from nugget2d.errors import InputError, ModelError, StoreError
from nugget2d.indexing import processes
from nugget2d.indexing import run as indexing
from nugget2d.indexing.clusters import run_on_cluster
from nugget2d.indexing.documents import Corpus, Document, Failure, Outcome, count, documents
from nugget2d.indexing.work import Job, Worker
from nugget2d.store import MemoryStore
from test_cli import fails, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(f"{number}. {tiny.TEXT[:200]}")
    return paths


@pytest.fixture
def store(tmp_path: Path, model: str, texts: list[Path]) -> Path:
    """A store of three memories."""
    folder = tmp_path / "store"
    run("store", "add", *texts, "--store", folder, "--model", model, "--ratio", 4, "--tag", "sea", "--tag", "log")
    return folder


# ---- store ----


def test_add_list_show(store: Path, texts: list[Path], model: str) -> None:
    records = json.loads(run("store", "list", "--store", store, "--json").stdout)
    assert [record["name"] for record in records] == [str(path) for path in texts]
    assert all(record["tags"] == ["sea", "log"] for record in records)
    lines = run("store", "list", "--store", store).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["id", *(record["id"][:12] for record in records)]
    shown = json.loads(run("store", "show", records[1]["id"][:6], "--store", store, "--json").stdout)
    file = shown.pop("file")
    assert shown == records[1]
    assert Memory.load(file).num_tokens == shown["num_tokens"]
    printed = run("store", "show", records[1]["id"], "--store", store).stdout
    for value in (records[1]["id"], str(texts[1]), "sea, log", file, "ratio 4.0"):
        assert value in printed
    assert run("store", "list", "--store", store, "--tag", "land").stdout.count("\n") == 1


def test_adding_again_says_so(store: Path, texts: list[Path], model: str) -> None:
    again = run("store", "add", texts[0], "-", "--store", store, "--model", model, "--ratio", 4, stdin=b"new")
    first, second = again.stdout.splitlines()
    assert first.endswith("(was there)") and not second.endswith("(was there)")
    assert len(json.loads(run("store", "list", "--store", store, "--json").stdout)) == 4


def test_rm_takes_beginnings_that_are_clear(store: Path, texts: list[Path]) -> None:
    ids = [record.id for record in MemoryStore(store).records()]
    fails("store", "rm", "", "--store", store, saying="3 ids begin with ''")
    fails("store", "rm", ids[0], "xyz", "--store", store, saying="no id in this store begins with 'xyz'")
    fails("store", "rm", "0" * 32, "--store", store, saying="no id in this store")
    assert len(MemoryStore(store).records()) == 3
    run("store", "rm", ids[0][:8], ids[1], "--store", store)
    assert [record.id for record in MemoryStore(store).records()] == [ids[2]]


def test_search_prints_spans(store: Path, model: str, texts: list[Path]) -> None:
    arguments = ["store", "search", "the LIGHTHOUSE keeper", "--store", store, "--top", 2]
    hits = json.loads(run(*arguments, "--json").stdout)
    assert len(hits) == 2 and hits[0]["score"] >= hits[1]["score"]
    lines = run(*arguments).stdout.splitlines()
    assert (
        len(lines) == 3 and f"{hits[0]['start']}:{hits[0]['end']}" in lines[1] and hits[0]["record"]["name"] in lines[1]
    )


def test_search_names_what_it_leaves_out(store: Path, model: str) -> None:
    with MemoryStore(store) as opened:
        record = opened.put(opened.get(opened.records()[0].id), name="without words")
    arguments = ["store", "search", "lighthouse", "--store", store, "--top", 9, "--json"]
    result = run(*arguments)
    assert len(json.loads(result.stdout)) == 3
    assert f"warning: not searched: {record.id}: only their model" in result.stderr and result.stderr.count("\n") == 1
    assert len(json.loads(run(*arguments, "--model", model).stdout)) >= 3
    assert run(*arguments).stderr == ""
    assert json.loads(run("store", "search", "?!", "--store", store, "--json").stdout) == []


def test_verify_and_gc(store: Path) -> None:
    result = run("store", "verify", "--store", store)
    assert "3 memories, nothing is damaged" in result.stderr
    record = MemoryStore(store).records()[1]
    file = next(store.rglob(f"{record.checksum}.nugget"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    fails("store", "verify", "--store", store, saying=record.id)
    assert "removed: 0 files" in run("store", "gc", "--store", store).stderr


def test_a_store_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUGGET2D_STORE", str(tmp_path / "none"))
    for command in (["list"], ["show", "a"], ["rm", "a"], ["verify"], ["gc"]):
        fails("store", *command, saying="there is no store at")
    assert not list(tmp_path.iterdir())


def test_names_command_no_terminal(tmp_path: Path, model: str) -> None:
    with MemoryStore(tmp_path) as store:
        store.put(tiny.trained("llama", "copies").compress("The dog.", ratio=2), name="\x1b[31mred\n\rtwo")
    for command in (["list"], ["show", MemoryStore(tmp_path).records()[0].id]):
        printed = run("store", *command, "--store", tmp_path).stdout
        assert "\x1b" not in printed and "red two" in " ".join(printed.replace("\u240d", " ").split())


# ---- documents ----


def test_documents_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("bé\r\n", newline="")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.pdf").write_bytes(b"%PDF")
    read = list(documents(tmp_path))
    assert [document.name for document in read] == ["a.txt", "c.txt", "sub/b.md"]
    assert [type(document) for document in read] == [Failure, Failure, Document]
    assert read[2].text == "bé\r\n" and count(tmp_path) == 3


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.xz"])
def test_documents_of_records(tmp_path: Path, name: str) -> None:
    lines = [
        b'{"text": "one", "id": 7}',
        b"",
        b'{"text": "two", "name": "second", "id": 8}',
        b'{"text": "three"}',
        b"not json",
        b'{"words": 1}',
        b'["text"]',
        b'{"text": 5}',
        b'{"text": "\xff"}',
    ]
    path = tmp_path / name
    data = b"\n".join(lines)
    path.write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    read = list(documents(path))
    assert read[:3] == [("7", "one"), ("second", "two"), (f"{name}:4", "three")]
    assert [failure.name for failure in read[3:]] == [f"{name}:{line}" for line in range(5, 10)]
    assert all(isinstance(failure, Failure) for failure in read[3:]) and count(path) == 8


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 99)[:-20])
    (tmp_path / "a.txt").write_text("a")
    for name, saying in (("a.jsonl.xz", "cannot read"), ("b.jsonl", "No such file"), ("a.txt", "give a folder")):
        with pytest.raises(InputError, match=saying):
            list(documents(tmp_path / name))


def test_batches_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * size}) + "\n" for size in [3, 3, 3, 20, 1, 9, 1]))
    corpus = Corpus(path, 10)
    for _ in range(2):  # it can be read again
        sizes = [[len(entry[1]) for entry in batch] for batch in corpus]
        assert sizes == [[3, 3, 3], [20], [1, 9], [1]]
    path.write_text("")
    assert list(corpus) == []
    path.write_text("none\n" * 5)
    assert [len(batch) for batch in corpus] == [1] * 5


# ---- index ----


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve documents, one of them twice, and two that are none."""
    path = tmp_path / "corpus.jsonl"
    records = [{"text": f"{number}. {tiny.TEXT[:150]}", "id": f"d{number}"} for number in range(12)]
    lines = [json.dumps(record) for record in [*records, {**records[0], "id": "again"}]]
    path.write_text("\n".join([*lines, "{}", json.dumps({"text": "", "id": "empty"})]))
    return path


@pytest.mark.e2e
@pytest.mark.parametrize("engine", indexing.ENGINES)
def test_workers_do_what_one_process_does(
    corpus: Path, tmp_path: Path, model: str, engine: indexing.EngineName, monkeypatch
) -> None:
    monkeypatch.setattr(indexing, "BATCH_CHARS", 500)  # several batches for each worker
    seen: list[tuple[int, int]] = []
    job = Job(store=str(tmp_path / "store"), model=model, options={"ratio": 4}, tags=("c",))
    summary = indexing.index(corpus, job, 2, lambda done, total: seen.append((done, total)), engine)
    # one text comes twice: two workers that are at it at once both compress it, and it is kept once
    assert (summary.added + summary.known, summary.documents) == (13, 15) and summary.added in (12, 13)
    assert sorted(failure.name for failure in summary.failures) == ["corpus.jsonl:14", "empty"]
    assert seen[-1] == (15, 15) and len(seen) >= 5
    with MemoryStore(job.store) as store:
        assert store.verify() == []
        kept = {record.name: record for record in store.records()}
        assert len(kept) == 12 and all(record.tags == ("c",) for record in kept.values())
        tokens = sum(record.num_tokens for record in kept.values())
        assert summary.tokens == tokens if summary.added == 12 else summary.tokens > tokens
        alone = MemoryStore(tmp_path / "alone")
        one = Worker(job.model_copy(update={"store": str(tmp_path / "alone")}))
        one([document for document in documents(corpus) if isinstance(document, Document)])
        assert {record.id for record in alone.records()} == {record.id for record in kept.values()}
        # a memory does not depend on which texts shared its batch beyond rounding
        for record in alone.records():
            mine, theirs = alone.get(record.id), store.get(record.id)
            assert mine.positions == theirs.positions
            assert (mine.keys[-1].data - theirs.keys[-1].data).abs().max() < 1e-4


@pytest.mark.e2e
def test_index_goes_on_where_it_stopped(corpus: Path, tmp_path: Path, model: str, monkeypatch) -> None:
    """Interrupted once something is kept, then run again by the command."""
    store = tmp_path / "store"

    def interrupted(job: Job, corpus: Corpus, workers: int) -> Iterator[list[Outcome]]:
        """An engine like any other, in this process."""
        yield Worker(job)(next(iter(corpus)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(indexing, "BATCH_CHARS", 500)
        patched.setitem(indexing.ENGINES, "process", interrupted)
        indexing.index(corpus, Job(store=str(store), model=model, options={"ratio": 4}), 1)
    with MemoryStore(store) as opened:
        kept = len(opened.records())
        assert 0 < kept < 12 and opened.verify() == []
    result = run("index", corpus, "--store", store, "--model", model, "--ratio", 4, "--workers", 1, code=1)
    metrics = dict(line.rsplit(None, 1) for line in result.stdout.splitlines())
    assert metrics["added"] == str(12 - kept) and metrics["in the store before"] == str(kept + 1)
    assert metrics["failed"] == "2" and result.stderr.count("error: ") == 2
    assert "error: corpus.jsonl:14: not a JSON object" in result.stderr


def test_a_store_or_corpus_that_cannot_be_used_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.db").write_bytes(b"something else " * 100)
    fails("index", corpus, "--store", tmp_path / "store", saying="index.db")
    fails("index", tmp_path / "none", "--store", tmp_path / "x", saying="give a folder")


@pytest.mark.e2e
def test_a_worker_that_dies_is_one_clear_error(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(processes, "_follow_the_parent", os.abort)
    with pytest.raises(StoreError, match="a worker process was ended"):
        indexing.index(corpus, Job(store=str(tmp_path / "store"), model="nano"), 1)


# ---- a cluster ----


class Poison:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


class Batches:
    """A corpus that goes wrong, wherever it is read."""

    def __init__(self, *wrong: str) -> None:
        self.wrong = wrong

    def __iter__(self) -> Iterator[Any]:
        yield []
        for wrong in self.wrong:
            if wrong == "unreadable":
                raise InputError("cannot read a corpus")
            yield Poison()


@pytest.mark.e2e
def test_what_goes_wrong_on_a_cluster_is_one_clear_error(tmp_path: Path, model: str) -> None:
    import ray

    job = Job(store=str(tmp_path / "store"), model=model)
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # its processes are to find this module
    ray.init(num_cpus=2, log_to_driver=False, runtime_env={"env_vars": paths})
    try:
        with pytest.raises(ModelError, match="unknown model 'none'"):
            list(run_on_cluster(job.model_copy(update={"model": "none"}), Batches(), 1))
        with pytest.raises(InputError, match="cannot read a corpus"):
            list(run_on_cluster(job, Batches("unreadable"), 1))
        with pytest.raises(StoreError, match=r"a worker was ended .* run the same command again"):
            list(run_on_cluster(job, Batches("deadly"), 1))
        assert list(run_on_cluster(job, Batches(), 5)) == [[]]  # more workers than there is room for
        assert ray.is_initialized()  # whose cluster it is ends it
    finally:
        ray.shutdown()


def test_without_ray_its_engine_says_what_to_install(corpus: Path, tmp_path: Path, model: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ("index", corpus, "--store", tmp_path / "store", "--model", model, "--engine", "ray")
    fails(*command, saying="pip install 'nugget2d[ray]'")
