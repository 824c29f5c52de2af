"""Keys or values of one layer, kept as float32, bfloat16 or int8 with a scale per token and head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from nugget2d.errors import InputError

StoreDtype = Literal["float32", "bfloat16", "int8"]
STORE_DTYPES: tuple[StoreDtype, ...] = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, eq=False)
class States:
    """`data` (heads, k, head_dim); for int8 also `scale` (heads, k, 1) float16, value = data * scale."""

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
        """The states as float32, shape (heads, k, head_dim)."""
        data = self.data.float()
        return data if self.scale is None else data * self.scale.float()

    def pick(self, tokens: slice | Tensor) -> "States":
        """Those at some places of the token axis."""
        return States(self.data[:, tokens], None if self.scale is None else self.scale[:, tokens])

    @staticmethod
    def store(values: Tensor, dtype: StoreDtype) -> "States":
        """Keep float `values` (heads, k, head_dim) as `dtype`.

        int8 is symmetric: scale = max |value| / 127 over head_dim, rounded to float16 BEFORE the division so that
        the error of a number is at most half a step of the scale that is stored.

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
        return States(torch.cat([part.data for part in parts], dim=1), torch.cat(scales, dim=1) if scales else None)
