"""Exact mode: what is stored beside the nuggets so that reconstruction returns the identical string.

Greedy decoding from nuggets misses some tokens. One teacher-forced pass finds where; the record keeps those tokens
(the patch), a digest of every segment, and a lossless copy. Replay decodes greedily, takes the patch's token where
there is one, and is checked against the digest. A teacher-forced pass and a step-by-step one round differently, so
tokens with a tiny margin over the second-best are patched too (a near tie). If a segment still does not verify, its
text is taken from the copy, with a warning.
"""

import codecs
import hashlib
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nugget2d.errors import MemoryFileError
from nugget2d.memory.records import Segment

# Logits closer than this may swap between devices, kernels and batch shapes. Noise in float32 is about 1e-4; half
# precision rounds logits of ten to steps of 2**-4 (bfloat16).
NEAR_TIE = 1e-2
HALF_NEAR_TIE = 0.25

# One segment's patch: index of the token within the segment -> token id.
SegmentPatch = dict[int, int]

# xz: what is expanded at a time, and the most that its dictionary may take, whatever its header asks for
_PIECE, _DICTIONARY = 1 << 20, 1 << 27
# bytes of a varint below 2**31, at most
_VARINT = 5
_DAMAGED_COPY, _AGAIN = "the lossless copy in this exact memory is damaged", "compress the text again"


@dataclass(frozen=True)
class ExactRecord:
    """Patches and digests, one per segment, and the lossless copy (xz) of the whole text of `num_chars` characters."""

    patches: tuple[SegmentPatch, ...]
    digests: tuple[str, ...]
    copy: bytes
    num_chars: int

    @property
    def patch_nbytes(self) -> int:
        """Bytes that the patches take in a file."""
        return len(_pack(self.patches))

    @property
    def copy_nbytes(self) -> int:
        """Bytes that the lossless copy takes in a file."""
        return len(self.copy)

    @staticmethod
    def make(segments: Sequence[str], patches: Sequence[SegmentPatch]) -> "ExactRecord":
        """The record of consecutive `segments` of a text and their patches."""
        return ExactRecord(tuple(patches), tuple(map(digest, segments)), *_copy("".join(segments)))

    def text(self) -> str:
        """The whole text, from the lossless copy; no more of it is expanded than the text that it stands for has.

        Raises:
            MemoryFileError: the copy is damaged, or that of another text.
        """
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DICTIONARY)
        decoder = codecs.getincrementaldecoder("utf-8")()
        parts: list[str] = []
        data, left = self.copy, self.num_chars
        try:
            while not unpacker.eof and left >= 0:
                piece, data = unpacker.decompress(data, _PIECE), b""
                if not piece and unpacker.needs_input:
                    break  # truncated
                parts.append(decoder.decode(piece))
                left -= len(parts[-1])
            decoder.decode(b"", final=True)
        except (lzma.LZMAError, UnicodeDecodeError) as error:
            raise MemoryFileError(f"{_DAMAGED_COPY} ({error}); {_AGAIN}") from error
        if left or not unpacker.eof or unpacker.unused_data:
            raise MemoryFileError(f"{_DAMAGED_COPY} (it is not of {self.num_chars:,} characters); {_AGAIN}")
        return "".join(parts)

    @staticmethod
    def join(records: Sequence["ExactRecord"]) -> "ExactRecord":
        """The record of consecutive texts.

        Raises:
            MemoryFileError: see `text`.
        """
        return ExactRecord(
            tuple(patch for record in records for patch in record.patches),
            tuple(value for record in records for value in record.digests),
            *_copy("".join(record.text() for record in records)),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Byte tensors for a memory file."""
        return {"exact.patch": _bytes_tensor(_pack(self.patches)), "exact.copy": _bytes_tensor(self.copy)}

    def header(self) -> dict[str, Any]:
        """The JSON part for a memory file."""
        return {"digests": list(self.digests)}

    @staticmethod
    def from_parts(tensors: dict[str, Tensor], digests: tuple[str, ...], segments: Sequence[Segment]) -> "ExactRecord":
        """The inverse of `tensors` and `header`.

        Raises:
            ValueError: patch or digests are not those of a text of these segments.
            KeyError: a tensor is missing.
        """
        if len(digests) != len(segments):
            raise ValueError(f"there are {len(digests)} digests of {len(segments)} segments")
        for name in ("exact.patch", "exact.copy"):
            if tensors[name].dtype != torch.uint8 or tensors[name].dim() != 1:
                raise ValueError(f"{name} is no row of bytes")
        patches = _unpack(tensors["exact.patch"].numpy().tobytes(), [segment.num_tokens for segment in segments])
        return ExactRecord(patches, digests, tensors["exact.copy"].numpy().tobytes(), segments[-1].end)


def digest(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def find_patch(logits: Tensor, ids: Tensor) -> SegmentPatch:
    """The tokens that greedy decoding would miss, or might.

    Args:
        logits: (n, vocabulary), row t predicts token t, from a teacher-forced pass.
        ids: (n,) the true tokens.
    """
    margin = NEAR_TIE if logits.dtype == torch.float32 else HALF_NEAR_TIE
    top = logits.float().topk(2, dim=-1)
    missed = (top.indices[:, 0] != ids) | (top.values[:, 0] - top.values[:, 1] < margin)
    return {int(index): int(ids[index]) for index in missed.nonzero().flatten()}


def _pack(patches: Sequence[SegmentPatch]) -> bytes:
    """Count, then gap and id of each entry, as LEB128 varints of all segments, deflated."""
    stream = bytearray()
    for patch in patches:
        _put(stream, len(patch))
        previous = -1
        for index, token in sorted(patch.items()):
            _put(stream, index - previous - 1)
            _put(stream, token)
            previous = index
    return zlib.compress(bytes(stream), 9)


def _unpack(data: bytes, tokens: Sequence[int]) -> tuple[SegmentPatch, ...]:
    """The patches of segments of so many tokens; no more is expanded than their largest patches take."""
    limit = _VARINT * sum(1 + 2 * count for count in tokens)
    unpacker = zlib.decompressobj()
    try:
        stream = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"the patch cannot be expanded: {error}") from error
    if len(stream) > limit or not unpacker.eof or unpacker.unused_data:
        raise ValueError("the patch is truncated, or larger than that of any text of this length")
    numbers = _numbers(stream)
    try:
        patches = tuple(_segment_patch(numbers, count) for count in tokens)
    except StopIteration as error:
        raise ValueError("the patch ends early") from error
    if next(numbers, None) is not None:
        raise ValueError("the patch has more segments than the text")
    return patches


def _segment_patch(numbers: Iterator[int], tokens: int) -> SegmentPatch:
    patch: SegmentPatch = {}
    index = -1
    for _ in range(next(numbers)):
        index += next(numbers) + 1
        if index >= tokens:
            raise ValueError(f"the patch has a token {index} of a segment of {tokens}")
        patch[index] = next(numbers)
    return patch


def _put(stream: bytearray, number: int) -> None:
    while number >= 0x80:
        stream.append(number & 0x7F | 0x80)
        number >>= 7
    stream.append(number)


def _numbers(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if number >= 1 << 31:
                raise ValueError("the patch has a number beyond 31 bits")
            yield number
            number = shift = 0
        elif shift >= 7 * _VARINT:
            raise ValueError("the patch has a number beyond 31 bits")
    if shift:
        raise ValueError("the patch ends inside a number")


def _copy(text: str) -> tuple[bytes, int]:
    """Lossless copy and characters of a text."""
    return lzma.compress(text.encode(), preset=6), len(text)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
