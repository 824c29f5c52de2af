"""What memories share that live in one process, for studies: they cannot be saved."""

from collections.abc import Mapping
from pathlib import Path

import torch

from nugget2d.errors import ModelError
from nugget2d.model import Nugget2D


class UnsavedMemory(Nugget2D):
    """A `Nugget2D` whose memory is something else; `encode` says what.

    `nugget2d.json` does not know of it: saved, it would come back as a `Nugget2D`.
    """

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        base: bool = True,
        metrics: Mapping[str, object] | None = None,
    ) -> None:
        """Refuse.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{type(self).__name__} is a memory for studies and cannot be saved to {folder}")
