"""Exact mode: what is stored beside the nuggets so that reconstruction returns the identical string.

Greedy decoding from nuggets misses some tokens. One teacher-forced pass finds where; the record keeps those tokens
(the patch), a digest of every segment, and a lossless copy. Replay decodes greedily, takes the patch's token where
there is one, and is checked against the digest. A teacher-forced pass and a step-by-step one round differently, so
tokens with a tiny margin over the second-best are patched too (a near tie). If a segment still does not verify, its
text is taken from the copy, with a warning.
"""

import hashlib
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Logits closer than this may swap between devices, kernels and batch shapes. Noise in float32 is about 1e-4; half
# precision rounds logits of ten to steps of 2**-4 (bfloat16).
NEAR_TIE = 1e-2
HALF_NEAR_TIE = 0.25

# One segment's patch: index of the token within the segment -> token id.
SegmentPatch = dict[int, int]


@dataclass(frozen=True)
class ExactRecord:
    """Patches and digests, one per segment, and the lossless copy of the whole text (xz)."""

    patches: tuple[SegmentPatch, ...]
    digests: tuple[str, ...]
    copy: bytes

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
        text = "".join(segments)
        return ExactRecord(tuple(patches), tuple(map(digest, segments)), lzma.compress(text.encode(), preset=6))

    def text(self) -> str:
        """The whole text, from the lossless copy."""
        return lzma.decompress(self.copy).decode()

    @staticmethod
    def join(records: Sequence["ExactRecord"]) -> "ExactRecord":
        """The record of consecutive texts."""
        copy = lzma.compress("".join(record.text() for record in records).encode(), preset=6)
        return ExactRecord(
            tuple(patch for record in records for patch in record.patches),
            tuple(value for record in records for value in record.digests),
            copy,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Byte tensors for a memory file."""
        return {"exact.patch": _bytes_tensor(_pack(self.patches)), "exact.copy": _bytes_tensor(self.copy)}

    def header(self) -> dict[str, Any]:
        """The JSON part for a memory file."""
        return {"digests": list(self.digests)}

    @staticmethod
    def from_parts(tensors: dict[str, Tensor], header: dict[str, Any]) -> "ExactRecord":
        """The inverse of `tensors` and `header`."""
        digests = tuple(header["digests"])
        patches = _unpack(tensors["exact.patch"].numpy().tobytes(), len(digests))
        return ExactRecord(patches, digests, tensors["exact.copy"].numpy().tobytes())


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


def _unpack(data: bytes, count: int) -> tuple[SegmentPatch, ...]:
    numbers = iter(_numbers(zlib.decompress(data)))
    patches = []
    for _ in range(count):
        patch: SegmentPatch = {}
        index = -1
        for _ in range(next(numbers)):
            index += next(numbers) + 1
            patch[index] = next(numbers)
        patches.append(patch)
    return tuple(patches)


def _put(stream: bytearray, number: int) -> None:
    while number >= 0x80:
        stream.append(number & 0x7F | 0x80)
        number >>= 7
    stream.append(number)


def _numbers(data: bytes) -> list[int]:
    numbers, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number, shift = 0, 0
    return numbers


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
