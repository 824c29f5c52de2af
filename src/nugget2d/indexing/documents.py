"""Reads the documents of a corpus one at a time; a document that cannot be read becomes a `Failure`."""

import json
import lzma
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from nugget2d.errors import InputError
from nugget2d.files import read_text

SUFFIXES = (".txt", ".md")  # in any case
MAX_BYTES = 1 << 26  # of a document: some 16 million tokens; what is longer may not fit into memory

TOGETHER = 16  # documents that a store is asked for side by side


class Document(NamedTuple):
    """A text and its name in messages and in the store."""

    name: str
    text: str


class Failure(NamedTuple):
    """A document that could not be indexed, and why."""

    name: str
    reason: str


class Done(NamedTuple):
    """A document that is stored: `tokens` were compressed for it, 0 if the store had it before."""

    name: str
    tokens: int


Outcome: TypeAlias = Done | Failure
Batch: TypeAlias = list[Document | Outcome]  # what is decided already passes through the workers


def count(source: Path) -> int:
    """How many documents `documents` will yield; a corpus in one file is read for that.

    Raises:
        InputError: see `documents`.
    """
    return len(_files(source)) if _is_folder(source) else sum(1 for _ in _lines(source))


def documents(source: Path) -> Iterator[Document | Failure]:
    """The .txt and .md files below a folder, by path; or the records of a .jsonl or .jsonl.xz file, in order.

    The name of a file is its path below the folder. Of a record `text` is read; its name is its `name` or `id`, the
    first that is neither missing nor null nor empty, or else its line number.

    Raises:
        InputError: there is no such folder or file, it is of another kind, or cannot be read.
    """
    if _is_folder(source):
        for path in _files(source):
            name = path.relative_to(source).as_posix()
            try:
                yield Document(name, _text(path))
            except InputError as error:
                yield Failure(name, str(error))
    else:
        for number, line in _lines(source):
            yield _document(line, f"{source.name}:{number}")


@dataclass(frozen=True)
class Corpus:
    """The documents of `source` in batches, read again by every iteration, in any process.

    A batch is consecutive documents, together at most `chars` characters; a longer one is alone. Those that are `known`
    become `Done`.
    """

    source: Path
    chars: int
    known: Callable[[Sequence[str]], list[bool]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Batch after batch.

        Raises:
            InputError: see `documents`.
        """
        batch: Batch = []
        size = 0
        for entry in self._entries():
            name, text = entry
            # of a failure the reason, as there may be many of them as well
            length = len(text if isinstance(text, str) else name)
            if batch and size + length > self.chars:
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += length
        if batch:
            yield batch

    def _entries(self) -> Iterator[Document | Outcome]:
        entries = documents(self.source)
        if self.known is None:
            yield from entries
            return
        while part := list(islice(entries, TOGETHER)):
            known = iter(self.known([entry.text for entry in part if isinstance(entry, Document)]))
            for entry in part:
                yield Done(entry.name, 0) if isinstance(entry, Document) and next(known) else entry


def _is_folder(source: Path) -> bool:
    try:
        return source.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error


def _files(folder: Path) -> list[Path]:
    """Paths of documents, and of folders that cannot be listed: reading these will say why."""
    closed: list[Path] = []
    walk = os.walk(folder, onerror=lambda error: closed.append(Path(error.filename)))
    found = [Path(place, name) for place, _, names in walk for name in names if Path(name).suffix.lower() in SUFFIXES]
    return sorted(found + closed)


def _text(path: Path) -> str:
    """The text of a file; a pipe or device would be read forever."""
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if stat.S_ISREG(state.st_mode) and state.st_size > MAX_BYTES:
        raise InputError(f"{path} has {state.st_size:,} bytes, more than {MAX_BYTES:,}; split it")
    if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):
        raise InputError(f"{path} is no ordinary file")
    return read_text(path)


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Lines that are not blank, with their numbers; None in place of one that is too long."""
    if not path.name.lower().endswith((".jsonl", ".jsonl.xz")):
        raise InputError(f"cannot index {path}: give a folder of .txt and .md files, or a .jsonl or .jsonl.xz file")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe cannot be read twice
            raise InputError(f"cannot index {path}: it is no ordinary file")
        with _open(path) as file:
            number = 0
            while line := file.readline(MAX_BYTES + 1):
                number += 1
                if len(line) > MAX_BYTES:
                    while line and not line.endswith(b"\n"):  # the rest of it
                        line = file.readline(MAX_BYTES)
                    yield number, None
                elif line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _open(path: Path) -> BinaryIO | lzma.LZMAFile:
    return lzma.open(path) if path.suffix.lower() == ".xz" else path.open("rb")


def _document(line: bytes | None, place: str) -> Document | Failure:
    if line is None:
        return Failure(place, f"a line of more than {MAX_BYTES:,} bytes; split its document")
    try:
        record = json.loads(line)
        text = record["text"]
        if not isinstance(text, str):
            return Failure(place, f"its `text` is {type(text).__name__}, not a string")
        given = [record.get(key) for key in ("name", "id")]
        return Document(next((str(name) for name in given if name not in (None, "")), place), text)
    except (ValueError, KeyError, TypeError, RecursionError):  # of wrong JSON, or valid JSON that is nested too deeply
        return Failure(place, "not a JSON object with a `text` field")
