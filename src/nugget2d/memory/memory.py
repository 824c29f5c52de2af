"""`Memory`: a compressed context.

A memory holds a payload (keys and values, a text, or embeddings), where its parts come from, which model reads it and
how, and the method that made it. Keys are rotated at positions within their SEGMENT (prefix + 0 .. segment length - 1);
reading rotates them to the position of the segment in the whole text (modeling/cache.py). So joining memories is
concatenation: nothing is recomputed or loses precision, int8 included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from nugget2d.deprecation import RenamedAttribute
from nugget2d.errors import InputError, MismatchError
from nugget2d.files import atomic_write
from nugget2d.memory import file
from nugget2d.memory.exact import ExactRecord
from nugget2d.memory.fingerprint import Fingerprint
from nugget2d.memory.kv import KVPayload, join_kv
from nugget2d.memory.payload import EmbeddingsPayload, Kind, TextPayload
from nugget2d.memory.records import MethodRecord, ReaderSpec, Segment
from nugget2d.memory.states import States, StoreDtype

__all__ = ["Fingerprint", "Memory", "MethodRecord", "ReaderSpec", "Segment"]


@dataclass(frozen=True, eq=False)
class Memory:
    """A compressed text of n tokens.

    Attributes:
        payload: what the model reads.
        segments: the stretches that were compressed, in text order.
        fingerprint: the base LM and tokenizer that can read this.
        reader: the weights to read with, and whether a soft prompt follows.
        method: what made it.
        token_nbytes: bytes of one token in the model's ordinary KV cache, for `full_nbytes`.
        exact: the patch and lossless copy of `compress(..., exact=True)`, else None.
    """

    payload: KVPayload | TextPayload | EmbeddingsPayload
    segments: tuple[Segment, ...]
    fingerprint: Fingerprint
    reader: ReaderSpec
    method: MethodRecord
    token_nbytes: int
    exact: ExactRecord | None = None

    def __repr__(self) -> str:
        """Tokens, nuggets, ratio, bytes, method and model on one line."""
        return (
            f"Memory({self.num_tokens} tokens -> {self.num_nuggets} nuggets, {self.ratio:.1f}x, "
            f"{self.nbytes:,} bytes as {self.dtype if self.kind != 'text' else 'text'}, "
            f"method {self.method.name!r}, model {self.fingerprint.name!r})"
        )

    # ---- size ----

    @property
    def kind(self) -> Kind:
        """What the payload is: "kv", "text" or "embeddings"."""
        return self.payload.kind

    @property
    def num_tokens(self) -> int:
        """Tokens of the text (n)."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_nuggets(self) -> int:
        """Tokens kept (k); where heads keep different numbers, their mean, rounded up."""
        return self.payload.count

    @property
    def num_chars(self) -> int:
        """Characters of the text."""
        return self.segments[-1].end if self.segments else 0

    @property
    def ratio(self) -> float:
        """n / k."""
        return self.num_tokens / max(self.num_nuggets, 1)

    @property
    def accuracy(self) -> float | None:
        """Measured accuracy over all tokens (see `Segment`), or None where some segment was not measured."""
        hits = 0.0
        for segment in self.segments:
            if segment.accuracy is None:
                return None
            hits += segment.accuracy * segment.num_tokens
        return hits / max(self.num_tokens, 1)

    quality = RenamedAttribute("accuracy")

    @property
    def dtype(self) -> StoreDtype:
        """How the numbers are kept: "float32", "bfloat16" or "int8"."""
        return self.payload.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the payload: of keys, values and their scales, of the vectors, or of the text."""
        return self.payload.nbytes

    @cached_property
    def total_nbytes(self) -> int:
        """Bytes of the file that `save` writes: payload, provenance, header, exact record."""
        return len(self.to_bytes())

    @property
    def full_nbytes(self) -> int:
        """Bytes of the ordinary KV cache of all n tokens, in the model's own dtype."""
        return self.num_tokens * self.token_nbytes

    # ---- keys and values ----

    @property
    def kv(self) -> KVPayload:
        """The payload, if it is keys and values.

        Raises:
            InputError: it is not.
        """
        if not isinstance(self.payload, KVPayload):
            raise InputError(f"this memory holds {self.kind}, not keys and values; it was made by {self.method.name!r}")
        return self.payload

    @property
    def keys(self) -> tuple[States, ...]:
        """Of every layer, see `KVPayload`."""
        return self.kv.keys

    @property
    def values(self) -> tuple[States, ...]:
        """Of every layer, see `KVPayload`."""
        return self.kv.values

    @property
    def local_positions(self) -> Tensor:
        """(u,) int32, index of each kept token within its segment."""
        return self.kv.local_positions

    @property
    def token_spans(self) -> Tensor:
        """(u, 2) int32, character offsets [start, end) of each kept token in the whole text."""
        return self.kv.token_spans

    @property
    def scores(self) -> Tensor:
        """(u,) float32, see `KVPayload`."""
        return self.kv.scores

    @property
    def offsets(self) -> Tensor:
        """(u,) int32, where the segment of each kept token begins, in tokens of the whole text."""
        starts = [0, *accumulate(segment.num_tokens for segment in self.segments)][:-1]
        counts = torch.tensor([segment.num_nuggets for segment in self.segments])
        return torch.tensor(starts, dtype=torch.int32).repeat_interleave(counts, output_size=len(self.local_positions))

    @property
    def positions(self) -> list[int]:
        """Index of each kept token in the whole text."""
        return cast(list[int], (self.local_positions + self.offsets).tolist())

    @cached_property
    def segment_slices(self) -> tuple[slice, ...]:
        """Where the kept tokens of each segment are, among all."""
        ends = list(accumulate(segment.num_nuggets for segment in self.segments))
        return tuple(slice(start, end) for start, end in pairwise([0, *ends]))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Source spans: character offsets [start, end), in the whole text, of each kept token, vector or stretch."""
        spans = self.kv.token_spans if isinstance(self.payload, KVPayload) else self.payload.spans
        return [(start, end) for start, end in spans.tolist()]

    def head_spans(self, layer: int, head: int) -> list[tuple[int, int]]:
        """Source spans of the tokens that one key-value head keeps, in text order."""
        return [(start, end) for start, end in self.token_spans[self.kv.rows_of(layer)[head]].tolist()]

    # ---- other memories ----

    def to(self, dtype: StoreDtype) -> "Memory":
        """The same memory with its numbers kept as `dtype`; int8 has one scale per token and head.

        Its accuracies are dropped: they were measured on the states as they were.

        Raises:
            InputError: an unknown dtype, or an exact memory, whose patch fits the states as they are.
        """
        if dtype == self.dtype:
            return self
        if self.exact is not None:
            raise InputError(
                f"an exact memory cannot change from {self.dtype} to {dtype}, its patch would no longer fit; "
                f"compress again with exact=True, dtype={dtype!r}"
            )
        segments = tuple(replace(segment, accuracy=None) for segment in self.segments)
        return replace(self, payload=self.payload.to(dtype), segments=segments)

    def with_states(self, keys: Sequence[States], values: Sequence[States]) -> "Memory":
        """Other keys and values of the same tokens."""
        return replace(self, payload=self.kv.with_states(keys, values))

    def segment(self, number: int) -> "Memory":
        """One segment alone, as a memory of its text.

        Raises:
            InputError: heads keep different tokens, or there is a prefix.
        """
        segment = self.segments[number]
        payload = self.kv.pick(self.segment_slices[number], chars=-segment.start)
        return replace(
            self, payload=payload, segments=(replace(segment, start=0, end=segment.end - segment.start),), exact=None
        )

    @staticmethod
    def join(memories: Sequence["Memory"]) -> "Memory":
        """One memory of consecutive texts, in order: positions and spans re-based, states untouched.

        Raises:
            InputError: nothing to join, no keys and values, states kept as different dtypes, only some exact, made or
                read in different ways.
            MismatchError: the memories come from different models.
        """
        if not memories:
            raise InputError("cannot join an empty list of memories; give at least one")
        first = memories[0]
        if len(memories) == 1:
            return first
        for memory in memories[1:]:
            _require_same_model(memory.fingerprint, first.fingerprint)
            if memory.reader != first.reader:
                raise InputError(
                    f"cannot join memories of methods {first.method.name!r} and {memory.method.name!r}, which are read "
                    "in different ways; compress both texts with one method"
                )
        *chars, total = [0, *accumulate(memory.num_chars for memory in memories)]
        if max(total, sum(memory.num_tokens for memory in memories)) >= 1 << 31:
            raise InputError("cannot join memories of more than 2**31 characters or tokens; join fewer")
        payload = join_kv([memory.kv for memory in memories], chars)
        records = [memory.exact for memory in memories if memory.exact is not None]
        if records and len(records) < len(memories):
            raise InputError("cannot join exact and ordinary memories; compress all of them with exact=True")
        return replace(
            first,
            payload=payload,
            segments=tuple(
                replace(segment, start=segment.start + start, end=segment.end + start)
                for memory, start in zip(memories, chars, strict=True)
                for segment in memory.segments
            ),
            exact=ExactRecord.join(records) if records else None,
        )

    # ---- files ----

    def save(self, path: Path | str, *, dtype: StoreDtype | None = None, force: bool = True) -> int:
        """Write the memory to `path` (atomically) and return the size of the file in bytes.

        Args:
            path: where to.
            dtype: convert the states first; None keeps them as they are.
            force: replace an existing file.

        Raises:
            OutputError: the file exists and `force` is false, or it cannot be written.
        """
        data = (self if dtype is None else self.to(dtype)).to_bytes()
        with atomic_write(path, force=force) as target:
            target.write(data)
        return len(data)

    @property
    def checksum(self) -> str:
        """32 hexadecimal digits over all of the memory. Files may differ: safetensors do not order metadata."""
        return file.checksum(*self._packed())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        return file.to_bytes(*self._packed())

    @staticmethod
    def load(path: Path | str) -> "Memory":
        """Read a memory that `save` wrote, here or with an earlier version.

        Raises:
            MemoryFileError: missing, not a memory, of a newer format, truncated, damaged, or not valid.
        """
        return Memory(**file.read_file(path))

    @staticmethod
    def from_bytes(data: bytes, source: Path | str, *, checksum: str | None = None) -> "Memory":
        """The memory that `to_bytes` made `data` of; `source` is its name in errors.

        Args:
            data: of a file written by `save`.
            source: its name in errors.
            checksum: of the memory that is expected; None takes any.

        Raises:
            MemoryFileError: not a memory, another one, of a newer format, truncated, damaged, or not valid.
        """
        return Memory(**file.from_bytes(data, source, checksum))

    @staticmethod
    def map(path: Path | str, *, verify: bool = True, checksum: str | None = None) -> "Memory":
        """The same as `load`, but the tensors stay in the file and are paged in as they are touched.

        Only for files that are not changed in place: truncating a mapped file ends the process. Writes to the tensors
        do not reach the file.

        Args:
            path: of a file written by `save`.
            verify: False leaves out the checksum, which would read the whole file: then a layer is read when it is
                first looked at, and damage in it goes unnoticed.
            checksum: of the memory that is expected; None takes any.

        Raises:
            MemoryFileError: missing, not a memory, another one, of a newer format, truncated, damaged, or not valid.
        """
        return Memory(**file.map_file(path, checksum, verify=verify))

    def _packed(self) -> tuple[dict[str, Tensor], str]:
        return file.pack(
            self.payload, self.segments, self.fingerprint, self.reader, self.method, self.token_nbytes, self.exact
        )


def _require_same_model(mine: Fingerprint, theirs: Fingerprint) -> None:
    if (mine.model, mine.tokenizer, mine.scheme) != (theirs.model, theirs.tokenizer, theirs.scheme):
        raise MismatchError(
            f"cannot join memories made by models {theirs.name!r} ({theirs.model[:12]}) and {mine.name!r} "
            f"({mine.model[:12]}); compress both texts with one model"
        )
