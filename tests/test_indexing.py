"""`nugget2d index`: names and lines of all kinds, resuming without workers, and workers without a parent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import tiny
from cli_fixtures import save_tiny_model
from nugget2d.errors import InputError
from nugget2d.indexing import documents as reading
from nugget2d.indexing import processes
from nugget2d.indexing import run as indexing
from nugget2d.indexing.documents import Corpus, Document, Failure, Outcome, count, documents
from nugget2d.indexing.work import Job, Worker
from nugget2d.store import MemoryStore
from test_cli import fails, run

LATIN = os.fsdecode(b"caf\xe9.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing without starting processes, which takes seconds."""

    def engine(job: Job, corpus: Corpus, workers: int) -> Iterator[list[Outcome]]:
        yield from map(Worker(job), corpus)

    monkeypatch.setitem(indexing.ENGINES, "process", engine)


def names(store: Path) -> set[str]:
    with MemoryStore(store) as opened:
        return {record.name for record in opened.records()}


# ---- names ----


def test_names_that_utf8_cannot_hold_are_escaped(tmp_path: Path, model: str, in_this_process: None) -> None:
    """A file name with a Latin-1 byte, half of a surrogate pair from JSON: one rule, wherever a name comes from."""
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    corpus.mkdir()
    (corpus / LATIN).write_text("one")
    (corpus / "café.txt").write_text("two")
    (tmp_path / "c.jsonl").write_text(
        '{"text": "three", "name": "b \\ud83d"}\n{"text": "four", "name": "\\ud83d\\ude00"}'
    )
    for source in (corpus, tmp_path / "c.jsonl", corpus):
        run("index", source, "--store", store, "--model", model)
    assert names(store) == {"caf\\xe9.txt", "café.txt", "b \\ud83d", "😀"}
    (corpus / LATIN).write_text("five")
    run("store", "add", corpus / LATIN, "--tag", LATIN, "--store", store, "--model", model)
    assert f"{corpus}/caf\\xe9.txt" in names(store)
    listed = run("store", "list", "--tag", LATIN, "--store", store, "--json").stdout
    assert [record["tags"] for record in json.loads(listed)] == [["caf\\xe9.txt"]]


def test_a_name_is_what_is_given(tmp_path: Path) -> None:
    given = [
        '"id": 0',
        '"name": "", "id": 1',
        '"name": null, "id": "two"',
        '"name": 0, "id": 9',
        '"name": ""',
        '"id": null',
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(f'{{"text": "a", {one}}}\n' for one in given))
    assert [document.name for document in documents(path)] == ["0", "1", "two", "0", "c.jsonl:5", "c.jsonl:6"]


def test_suffixes_in_any_case(tmp_path: Path) -> None:
    for name in ("a.TXT", "b.Md", "c.txt", "d.TEXT", ".txt"):
        (tmp_path / name).write_text("a")
    assert [document.name for document in documents(tmp_path)] == ["a.TXT", "b.Md", "c.txt"] and count(tmp_path) == 3
    (tmp_path / "c.JSONL").write_text('{"text": "a"}')
    assert list(documents(tmp_path / "c.JSONL")) == [("c.JSONL:1", "a")]


def test_a_corpus_without_documents_says_so(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.pdf").write_text("a")
    (tmp_path / "c.jsonl").write_text("\n \n")
    for source in ("corpus", "c.jsonl"):
        fails("index", tmp_path / source, "--store", tmp_path / "store", saying="there is nothing to index in")
    assert not (tmp_path / "store").exists()


def test_what_is_no_ordinary_file_is_reported(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("nowhere")
    (tmp_path / "c.txt").write_text("c")
    pipe, link, file = documents(tmp_path)
    assert isinstance(pipe, Failure) and "no ordinary file" in pipe.reason
    assert isinstance(link, Failure) and "No such file" in link.reason
    assert file == ("c.txt", "c")


def test_records_in_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no ordinary file"):
        count(tmp_path / "a.jsonl")


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir, read = os.scandir, Path.read_bytes

    def refuse(place: Path | str) -> None:  # to root nothing is closed
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", lambda place: refuse(place) or scandir(place))
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path) or read(path))
    assert count(tmp_path) == 2
    file, folder = documents(tmp_path)
    assert file == ("a.txt", "a")
    assert folder == ("closed", f"cannot read {tmp_path / 'closed'}: Permission denied")


# ---- lines ----


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"text": "a", "id": ' + b"9" * 1_000_000 + b"}",
        b'{"text": "a\xff"}',
        b'{"text": "a"',
        b'{"text": NaN}',
        b"NaN",
        b'"text"',
        b"\x00",
        b"\xff\xfe{\x00",
    ],
    ids=lambda line: repr(line[:12]),
)
def test_a_line_that_cannot_be_read_ends_nothing(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(line + b'\n{"text": "next"}\n')
    first, second = documents(path)
    assert isinstance(first, Failure) and first.name == "c.jsonl:1"
    assert second == ("c.jsonl:2", "next") and count(path) == 2


def test_lenient_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "text": "b", "id": 1, "score": NaN}\n')
    assert list(documents(path)) == [("1", "b")]


def test_too_long_a_document_is_reported_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 30)
    path = tmp_path / "c.jsonl"
    lines = [json.dumps({"text": "x" * size}) for size in (3, 17, 18, 100, 4)]
    for end in ("", "\n"):
        path.write_text("\n".join(lines) + end)
        kinds = [type(document) for document in documents(path)]
        assert kinds == [Document, Document, Failure, Failure, Document] and count(path) == 5
    (tmp_path / "a.txt").write_text("x" * 31)
    (tmp_path / "b.txt").write_text("x" * 30)
    long, short = documents(tmp_path)
    assert isinstance(long, Failure) and "31 bytes, more than 30; split it" in long.reason
    assert isinstance(short, Document)


def test_a_text_that_no_model_takes_leaves_the_others(tmp_path: Path, model: str, in_this_process: None) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one", "id": 1}\n{"text": "\\ud83d", "id": 2}\n{"text": "three", "id": 3}\n')
    result = run("index", path, "--store", tmp_path / "store", "--model", model, code=1)
    assert result.stderr.startswith("error: 2: the text has a lone surrogate") and result.stderr.count("\n") == 1
    assert names(tmp_path / "store") == {"1", "3"}


# ---- processes ----


def test_no_worker_is_started_for_nothing_new(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = tmp_path / "c.jsonl", tmp_path / "store"
    texts = [f"{number}. {tiny.TEXT[:99]}" for number in range(9)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*texts, *texts]) + "\nnone\n")
    job = Job(store=str(store), model=model, options={"ratio": 4})
    Worker(job)([Document("", text) for text in texts[:8]])
    submitted: list[Document] = []

    def submit(pool: object, work: object, job: Job, batch: list[Document | Outcome]) -> NoReturn:
        submitted.extend(entry for entry in batch if isinstance(entry, Document))
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        indexing.index(path, job, 1)
    assert [document.text for document in submitted] == [texts[8]] * 2  # only what is new
    Worker(job)(submitted)
    summary = indexing.index(path, job, 1)
    assert (summary.added, summary.known, len(summary.failures), len(submitted)) == (0, 18, 1, 2)
    with pytest.raises(KeyboardInterrupt):  # made in another way, all is new
        indexing.index(path, job.model_copy(update={"options": {"ratio": 5}}), 1)


def test_an_option_that_is_wrong_is_one_error(tmp_path: Path, model: str, in_this_process: None) -> None:
    (tmp_path / "a.txt").write_text("a")
    run("index", tmp_path, "--store", tmp_path / "store", "--model", model)
    for options, saying in ((["--ratio", "0.5"], "at least 1"), (["--set", "size=1"], "no option size")):
        fails("index", tmp_path, "--store", tmp_path / "store", "--model", model, *options, saying=saying)
    with pytest.raises(InputError, match="cannot index"):
        indexing.index(tmp_path / "a.txt", Job(store=str(tmp_path / "store"), model=model), 1)


def _processes(*which: str) -> list[int]:
    """Workers of a pool that run still."""
    command = ["ps", "-ww", "-o", "pid=,stat=,args=", *which]
    rows = [row.split(None, 2) for row in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()]
    return [int(number) for number, state, line in rows if "spawn_main" in line and not state.startswith("Z")]


@pytest.mark.e2e
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, model: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} {tiny.TEXT}" * 9}) + "\n" for number in range(5000)))
    command = ["index", path, "--store", tmp_path / "store", "--model", model, "--workers", "1"]
    parent = subprocess.Popen([sys.executable, "-m", "nugget2d", *command], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (workers := _processes("--ppid", str(parent.pid))) and time.monotonic() < until:
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert workers
    while (alive := _processes("-p", ",".join(map(str, workers)))) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive
