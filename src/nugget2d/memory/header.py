"""The JSON header of a memory file as typed records. A file with a valid checksum may still come from anybody."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from nugget2d.config import Frozen
from nugget2d.memory.fingerprint import Fingerprint
from nugget2d.memory.records import MethodRecord, ReaderSpec

# positions, offsets and ids are kept as int32
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# start, end, num_tokens, num_nuggets
Row = tuple[Count, Count, Annotated[int, Field(ge=1, lt=1 << 31)], Count]


class _Strict(Frozen):
    """Types as JSON has them: a number in quotes is no number."""

    model_config = ConfigDict(strict=True)


class ExactPart(_Strict):
    """Of an `ExactRecord`."""

    digests: tuple[Sha256, ...]


class KVPart(_Strict):
    """Of a `KVPayload`."""

    num_layers: Annotated[int, Field(ge=1, lt=1 << 31)]
    prefix_ids: tuple[Count, ...] = ()
    last_id: Count | None = None


class TextPart(_Strict):
    """Of a `TextPayload`."""

    count: Count


class EmbeddingsPart(_Strict):
    """Of an `EmbeddingsPayload`, which has nothing but tensors."""


class _Memory(_Strict):
    segments: Annotated[tuple[Row, ...], Field(min_length=1)]
    accuracies: tuple[Share | None, ...]
    fingerprint: Fingerprint
    reader: ReaderSpec
    method: MethodRecord
    token_nbytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    exact: ExactPart | None


class _KV(_Memory):
    kind: Literal["kv"]
    payload: KVPart


class _Text(_Memory):
    kind: Literal["text"]
    payload: TextPart


class _Embeddings(_Memory):
    kind: Literal["embeddings"]
    payload: EmbeddingsPart


class _Version1(_Strict):
    num_layers: Annotated[int, Field(ge=1, lt=1 << 31)]
    segments: Annotated[tuple[Row, ...], Field(min_length=1)]
    accuracies: tuple[Share | None, ...] | None = None  # the first files had none
    fingerprint: Fingerprint
    cache_itemsize: Annotated[int, Field(ge=1, le=8)]
    exact: ExactPart | None

    def renewed(self, tensors: Mapping[str, Tensor]) -> _KV:
        """As a header of version 2."""
        states = [tensor for name, tensor in tensors.items() if name.startswith(("keys.", "values."))]
        # the scale of int8 is no number of the cache
        numbers = sum(one.shape[0] * one.shape[2] for one in states if one.dim() == 3 and one.dtype != torch.float16)
        return _KV(
            kind="kv",
            payload=KVPart(num_layers=self.num_layers),
            segments=self.segments,
            accuracies=self.accuracies or (None,) * len(self.segments),
            fingerprint=self.fingerprint,
            reader=ReaderSpec("decoder", soft_prompt=True),
            method=MethodRecord("nugget2d"),
            token_nbytes=numbers * self.cache_itemsize,
            exact=self.exact,
        )


Header = _KV | _Text | _Embeddings
_HEADER: TypeAdapter[Header] = TypeAdapter(Annotated[Header, Field(discriminator="kind")])


def read_header(text: str, version: str, tensors: Mapping[str, Tensor]) -> Header:
    """The header of a file of that version.

    Raises:
        ValueError: it is not one; the message says what is wrong in it.
    """
    try:
        if version == "1":
            return _Version1.model_validate_json(text).renewed(tensors)
        return _HEADER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:80]
        raise ValueError(f"in its header {place!r}: {first['msg']}" if place else first["msg"]) from error
