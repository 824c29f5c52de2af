"""Tensors of one layer, stored as float32, bfloat16 or int8 with a scale for each row of head_dim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor

from nugget2d.errors import InputError

StoreDtype = Literal["float32", "bfloat16", "int8"]
STORE_DTYPES: tuple[StoreDtype, ...] = ("float32", "bfloat16", "int8")


def row_nbytes(head_dim: int, dtype: StoreDtype) -> int:
    """Bytes of one row, its scale included."""
    return head_dim + 2 if dtype == "int8" else head_dim * getattr(torch, dtype).itemsize


@dataclass(frozen=True, eq=False)
class States:
    """`data` (..., k, head_dim); for int8 also `scale` (..., k, 1) float16, value = data * scale."""

    data: Tensor
    scale: Tensor | None = None

    @property
    def dtype(self) -> StoreDtype:
        """The name of the dtype of `data`."""
        return cast(StoreDtype, str(self.data.dtype).removeprefix("torch."))

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def restore(self) -> Tensor:
        """The states as float32, in the shape of `data`."""
        data = self.data.float()
        return data if self.scale is None else data * self.scale.float()

    def pick(self, tokens: slice | Tensor) -> "States":
        """Those at some places of the token axis, the last but one."""
        return States(self.data[..., tokens, :], None if self.scale is None else self.scale[..., tokens, :])

    def split(self, counts: Sequence[int]) -> list["States"]:
        """Parts of so many tokens each, in order."""
        ends = list(accumulate(counts))
        return [self.pick(slice(end - count, end)) for count, end in zip(counts, ends, strict=True)]

    @staticmethod
    def store(values: Tensor, dtype: StoreDtype) -> "States":
        """Keep float `values` (..., k, head_dim) as `dtype`.

        int8 is symmetric: scale = max |value| / 127 over head_dim, rounded to float16 BEFORE the division so that
        the error of a number is at most half a step of the stored scale.

        Raises:
            InputError: an unknown dtype.
        """
        if dtype not in STORE_DTYPES:
            raise InputError(f"unknown dtype {dtype!r}; choose one of {', '.join(STORE_DTYPES)}")
        if dtype != "int8":
            return States(values.to(getattr(torch, dtype)))
        peak = values.float().abs().amax(dim=-1, keepdim=True)
        # the smallest normal float16 keeps all-zero rows from dividing by zero
        scale = (peak / 127).clamp(2.0**-14, 65504.0).half()
        data = (values.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        return States(data, scale)

    @staticmethod
    def concatenate(parts: Sequence["States"]) -> "States":
        """One `States` of all parts in order, along the token axis."""
        scales = [part.scale for part in parts if part.scale is not None]
        return States(torch.cat([part.data for part in parts], dim=-2), torch.cat(scales, dim=-2) if scales else None)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Data and scale under names for a file."""
        return {name: self.data} | ({} if self.scale is None else {f"{name}.scale": self.scale})

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], name: str) -> "States":
        """The inverse of `tensors`."""
        return States(tensors[name], tensors.get(f"{name}.scale"))
