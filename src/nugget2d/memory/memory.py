"""`Memory`: what a context became, and the file it is kept in.

A memory holds, for k chosen tokens of an n-token text, their keys and values at every layer, and enough
provenance to say where each came from. Keys stay rotated at the positions that their own SEGMENT gave them
(0 .. segment length - 1); whoever reads a memory rotates them to where the segment stands in the whole text
(cache.py). So joining is concatenation: nothing is recomputed, nothing loses precision, int8 included.

File: one safetensors file (no pickle). Its metadata carries a JSON header and a checksum over every tensor and
the header; a truncated or damaged file, or another model's memory, is refused by name.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nugget2d.errors import InputError, MemoryFileError, MismatchError
from nugget2d.files import atomic_write
from nugget2d.memory.exact import ExactRecord
from nugget2d.memory.states import States, StoreDtype

FORMAT = "nugget2d.memory"
VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """Which model and tokenizer can read a memory (hexadecimal digests), and the model's name for messages."""

    name: str
    model: str
    tokenizer: str


@dataclass(frozen=True)
class Segment:
    """A stretch of text that was compressed in one pass.

    `start` and `end` are character offsets into the whole text; `num_tokens` of it became `num_nuggets`. `accuracy` is
    the share of its tokens that the model was measured to predict right from the nuggets as they are kept, given the
    true tokens before (no patch); None if nobody measured.
    """

    start: int
    end: int
    num_tokens: int
    num_nuggets: int
    accuracy: float | None = None


@dataclass(frozen=True, eq=False)
class Memory:
    """k nuggets that stand for n tokens.

    Attributes:
        keys: one `States` of shape (kv_heads, k, head_dim) per layer, rotated at segment-local positions.
        values: the same for the values.
        local_positions: (k,) int32, index of each chosen token within its segment.
        token_spans: (k, 2) int32, character offsets [start, end) of each chosen token in the whole text.
        scores: (k,) float32, the scorer's value of each chosen token, whether or not the selection looked.
        segments: the stretches, in text order.
        fingerprint: who can read this.
        cache_itemsize: bytes of one number of the model's ordinary KV cache, for `full_nbytes`.
        exact: the patch and lossless copy of `compress(..., exact=True)`, else None.
    """

    keys: tuple[States, ...]
    values: tuple[States, ...]
    local_positions: Tensor
    token_spans: Tensor
    scores: Tensor
    segments: tuple[Segment, ...]
    fingerprint: Fingerprint
    cache_itemsize: int = 4
    exact: ExactRecord | None = None

    def __repr__(self) -> str:
        """Tokens, nuggets, ratio, bytes and model on one line."""
        return (
            f"Memory({self.num_tokens} tokens -> {self.num_nuggets} nuggets, {self.ratio:.1f}x, "
            f"{self.nbytes:,} bytes as {self.dtype}, model {self.fingerprint.name!r})"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the text that this memory stands for (n)."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_nuggets(self) -> int:
        """Tokens kept (k)."""
        return sum(segment.num_nuggets for segment in self.segments)

    @property
    def num_chars(self) -> int:
        """Characters of the text that this memory stands for."""
        return self.segments[-1].end if self.segments else 0

    @property
    def ratio(self) -> float:
        """n / k."""
        return self.num_tokens / max(self.num_nuggets, 1)

    @property
    def quality(self) -> float | None:
        """Measured accuracy over all tokens (see `Segment`), or None where some segment was not measured."""
        hits = 0.0
        for segment in self.segments:
            if segment.accuracy is None:
                return None
            hits += segment.accuracy * segment.num_tokens
        return hits / max(self.num_tokens, 1)

    @property
    def dtype(self) -> StoreDtype:
        """How the states are kept: "float32", "bfloat16" or "int8"."""
        return self.keys[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and their scales (what takes the place of the KV cache)."""
        return sum(states.nbytes for states in (*self.keys, *self.values))

    @property
    def full_nbytes(self) -> int:
        """Bytes of the ordinary KV cache of all n tokens, in the model's own dtype."""
        numbers = sum(states.data.shape[0] * states.data.shape[2] for states in (*self.keys, *self.values))
        return self.num_tokens * numbers * self.cache_itemsize

    @property
    def positions(self) -> list[int]:
        """Index of each nugget's token in the whole text."""
        offsets: list[int] = []
        start = 0
        for segment in self.segments:
            offsets += [start] * segment.num_nuggets
            start += segment.num_tokens
        return (self.local_positions + torch.tensor(offsets, dtype=torch.int32)).tolist()

    @cached_property
    def segment_slices(self) -> tuple[slice, ...]:
        """Where the nuggets of each segment are, among all nuggets."""
        ends = list(accumulate(segment.num_nuggets for segment in self.segments))
        return tuple(slice(start, end) for start, end in pairwise([0, *ends]))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Source span of each nugget: character offsets [start, end) of its token in the whole text.

        A nugget speaks for its token and the tokens since the nugget before it.
        """
        return [(start, end) for start, end in self.token_spans.tolist()]

    def to(self, dtype: StoreDtype) -> "Memory":
        """The same memory with its states kept as `dtype`; int8 has one scale per token and head.

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
        return replace(
            self,
            keys=tuple(States.store(states.restore(), dtype) for states in self.keys),
            values=tuple(States.store(states.restore(), dtype) for states in self.values),
            segments=tuple(replace(segment, accuracy=None) for segment in self.segments),
        )

    def require(self, fingerprint: Fingerprint) -> None:
        """Check that a model with `fingerprint` can read this memory.

        Raises:
            MismatchError: it cannot; the message names both models.
        """
        mine, theirs = self.fingerprint, fingerprint
        if (mine.model, mine.tokenizer) != (theirs.model, theirs.tokenizer):
            raise MismatchError(
                f"this memory was made by model {mine.name!r} ({mine.model[:12]}) and cannot be read by "
                f"{theirs.name!r} ({theirs.model[:12]}); load that model, or compress the text again"
            )

    @staticmethod
    def join(memories: Sequence["Memory"]) -> "Memory":
        """One memory of consecutive texts, in order: positions and spans re-based, states untouched.

        Raises:
            InputError: nothing to join, or states kept as different dtypes, or only some are exact.
            MismatchError: the memories come from different models.
        """
        if not memories:
            raise InputError("cannot join an empty list of memories; give at least one")
        first = memories[0]
        if len(memories) == 1:
            return first
        for memory in memories[1:]:
            memory.require(first.fingerprint)
            if memory.dtype != first.dtype:
                raise InputError(f"cannot join memories kept as {first.dtype} and {memory.dtype}; convert with .to()")
        records = [memory.exact for memory in memories if memory.exact is not None]
        if records and len(records) < len(memories):
            raise InputError("cannot join exact and ordinary memories; compress all of them with exact=True")
        segments: list[Segment] = []
        spans: list[Tensor] = []
        chars = 0
        for memory in memories:
            segments += [replace(s, start=s.start + chars, end=s.end + chars) for s in memory.segments]
            spans.append(memory.token_spans + chars)
            chars += memory.num_chars
        return replace(
            first,
            keys=tuple(map(States.concatenate, zip(*(memory.keys for memory in memories), strict=True))),
            values=tuple(map(States.concatenate, zip(*(memory.values for memory in memories), strict=True))),
            local_positions=torch.cat([memory.local_positions for memory in memories]),
            token_spans=torch.cat(spans),
            scores=torch.cat([memory.scores for memory in memories]),
            segments=tuple(segments),
            exact=ExactRecord.join(records) if records else None,
        )

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
        with atomic_write(path, force=force) as file:
            file.write(data)
        return len(data)

    @property
    def checksum(self) -> str:
        """32 hexadecimal digits of everything in this memory. Its files may differ: safetensors shuffle metadata."""
        return _checksum(self._tensors(), json.dumps(self._header(), sort_keys=True))

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        tensors, header = self._tensors(), json.dumps(self._header(), sort_keys=True)
        metadata = {"format": FORMAT, "version": str(VERSION), "header": header}
        return save_tensors(tensors, {**metadata, "checksum": _checksum(tensors, header)})

    @staticmethod
    def load(path: Path | str) -> "Memory":
        """Read a memory written by `save`, states in the dtype they were kept in.

        Raises:
            MemoryFileError: missing, not a memory, of a newer format, truncated or damaged.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise MemoryFileError(f"cannot read memory {path}: {error.strerror or error}") from error
        return Memory.from_bytes(data, path)

    @staticmethod
    def from_bytes(data: bytes, source: Path | str) -> "Memory":
        """The memory that `to_bytes` made `data` of; `source` is what errors call it.

        Raises:
            MemoryFileError: not a memory, of a newer format, truncated or damaged.
        """
        metadata = _metadata(data, source)
        try:
            tensors = load_tensors(data)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise MemoryFileError(_damaged(source)) from error
        return Memory._checked(tensors, metadata, source, verify=True)

    @staticmethod
    def map(path: Path | str, *, verify: bool = True) -> "Memory":
        """The same as `load`, but the tensors stay in the file and are paged in as they are touched.

        Only for files that nobody changes in place: one that is cut short while it is mapped ends the process. What
        is written to the tensors stays private.

        Args:
            path: of a file written by `save`.
            verify: False leaves out the checksum, which would read the whole file: then a layer is read when it is
                first looked at, and damage in it goes unnoticed.

        Raises:
            MemoryFileError: missing, not a memory, of a newer format, truncated or damaged.
        """
        try:
            with Path(path).open("rb") as file:
                length = file.read(8)
                header = min(int.from_bytes(length, "little"), Path(path).stat().st_size)  # damaged, it may be anything
                metadata = _metadata(length + file.read(header), path)
            with safe_open(path, "pt") as tensors:
                named = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
        except OSError as error:
            raise MemoryFileError(f"cannot read memory {path}: {error.strerror or error}") from error
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise MemoryFileError(_damaged(path)) from error
        return Memory._checked(named, metadata, path, verify=verify)

    @staticmethod
    def _checked(tensors: dict[str, Tensor], metadata: dict[str, str], source: Path | str, *, verify: bool) -> "Memory":
        if verify and metadata.get("checksum") != _checksum(tensors, metadata.get("header", "")):
            raise MemoryFileError(_damaged(source))
        try:
            return Memory._from_parts(tensors, json.loads(metadata["header"]))
        except (ValueError, KeyError, TypeError) as error:  # what only an unverified header can hold
            raise MemoryFileError(_damaged(source)) from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "local_positions": self.local_positions,
            "token_spans": self.token_spans,
            "scores": self.scores,
        }
        for name, layers in (("keys", self.keys), ("values", self.values)):
            for layer, states in enumerate(layers):
                tensors[f"{name}.{layer}"] = states.data
                if states.scale is not None:
                    tensors[f"{name}.{layer}.scale"] = states.scale
        if self.exact is not None:
            tensors |= self.exact.tensors()
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def _header(self) -> dict[str, Any]:
        return {
            "num_layers": len(self.keys),
            "segments": [[s.start, s.end, s.num_tokens, s.num_nuggets] for s in self.segments],
            "accuracies": [s.accuracy for s in self.segments],
            "fingerprint": vars(self.fingerprint),
            "cache_itemsize": self.cache_itemsize,
            "exact": None if self.exact is None else self.exact.header(),
        }

    @staticmethod
    def _from_parts(tensors: dict[str, Tensor], header: dict[str, Any]) -> "Memory":
        def layers(name: str) -> tuple[States, ...]:
            return tuple(
                States(tensors[f"{name}.{layer}"], tensors.get(f"{name}.{layer}.scale"))
                for layer in range(header["num_layers"])
            )

        # older files have none
        accuracies = header.get("accuracies") or [None] * len(header["segments"])
        return Memory(
            keys=layers("keys"),
            values=layers("values"),
            local_positions=tensors["local_positions"],
            token_spans=tensors["token_spans"],
            scores=tensors["scores"],
            segments=tuple(
                replace(Segment(*row), accuracy=a) for row, a in zip(header["segments"], accuracies, strict=True)
            ),
            fingerprint=Fingerprint(**header["fingerprint"]),
            cache_itemsize=header["cache_itemsize"],
            exact=None if header["exact"] is None else ExactRecord.from_parts(tensors, header["exact"]),
        )


def _metadata(data: bytes, path: Path | str) -> dict[str, str]:
    """The string metadata of a memory: safetensors begin with 8 bytes of length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not data[8:9] == b"{":
        raise MemoryFileError(f"{path} is not a memory file; make one with `nugget2d compress`")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise MemoryFileError(_damaged(path)) from error
    if metadata.get("format") != FORMAT:
        raise MemoryFileError(f"{path} is not a memory file; make one with `nugget2d compress`")
    if not metadata.get("version", "").isdigit():
        raise MemoryFileError(_damaged(path))
    if metadata["version"] != str(VERSION):
        raise MemoryFileError(
            f"{path} has format version {metadata['version']}, this package reads {VERSION}; upgrade it"
        )
    return metadata


def _checksum(tensors: dict[str, Tensor], header: str) -> str:
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path | str) -> str:
    return f"memory {path} is truncated or damaged (its checksum does not match); make it again from the text"
