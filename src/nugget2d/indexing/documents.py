"""Reads the documents of a corpus one at a time; a document that cannot be read becomes a `Failure`."""

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from nugget2d.errors import InputError
from nugget2d.files import read_text

SUFFIXES = (".txt", ".md")


class Document(NamedTuple):
    """A text and its name in messages and in the store."""

    name: str
    text: str


class Failure(NamedTuple):
    """A document that could not be indexed, and why."""

    name: str
    reason: str


Batch: TypeAlias = list[Document | Failure]


def count(source: Path) -> int:
    """How many documents `documents` will yield; a corpus in one file is read for that.

    Raises:
        InputError: see `documents`.
    """
    return len(_files(source)) if source.is_dir() else sum(1 for _ in _lines(source))


def documents(source: Path) -> Iterator[Document | Failure]:
    """The .txt and .md files below a folder, by path; or the records of a .jsonl or .jsonl.xz file, in order.

    The name of a file is its path below the folder. Of a record `text` is read; its name is its `name` or `id`, or else
    its line number.

    Raises:
        InputError: there is no such folder or file, it is of another kind, or cannot be read.
    """
    if source.is_dir():
        for path in _files(source):
            name = path.relative_to(source).as_posix()
            try:
                yield Document(name, read_text(path))
            except InputError as error:
                yield Failure(name, str(error))
    else:
        for number, line in _lines(source):
            yield _document(line, f"{source.name}:{number}")


@dataclass(frozen=True)
class Corpus:
    """The documents of `source` in batches, read again by every iteration, in any process.

    A batch is consecutive documents, together at most `chars` characters; a longer one is alone.
    """

    source: Path
    chars: int

    def __iter__(self) -> Iterator[Batch]:
        """Batch after batch.

        Raises:
            InputError: see `documents`.
        """
        batch: Batch = []
        size = 0
        for entry in documents(self.source):
            _, text = entry  # of a failure, the reason: there may be many of them as well
            if batch and size + len(text) > self.chars:
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += len(text)
        if batch:
            yield batch


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    if not path.name.endswith((".jsonl", ".jsonl.xz")):
        raise InputError(f"cannot index {path}: give a folder of .txt and .md files, or a .jsonl or .jsonl.xz file")
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _open(path: Path) -> BinaryIO | lzma.LZMAFile:
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")


def _document(line: bytes, place: str) -> Document | Failure:
    try:
        record = json.loads(line)
        text = record["text"]
    except (ValueError, KeyError, TypeError):
        return Failure(place, "not a JSON object with a `text` field")
    if not isinstance(text, str):
        return Failure(place, f"its `text` is {type(text).__name__}, not a string")
    return Document(str(record.get("name") or record.get("id") or place), text)
