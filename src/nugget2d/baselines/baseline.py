"""What baselines share that live in one process, for studies."""

from collections.abc import Mapping
from pathlib import Path

import torch

from nugget2d.errors import ModelError
from nugget2d.model import Nugget2D


class Baseline(Nugget2D):
    """A `Nugget2D` whose memory is something else; `encode` says what.

    It cannot be saved: `nugget2d.json` does not know of baselines, so that a saved one would come back as a `Nugget2D`.
    """

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        base: bool = True,
        figures: Mapping[str, object] | None = None,
    ) -> None:
        """Refuse.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{type(self).__name__} is a baseline for experiments and cannot be saved to {folder}")
