"""Rate and distortion: accuracy and size of memories of one window length at one ratio.

Everything is measured through `Nugget2D.compress`, so that windows longer than `config.window` are cut into segments,
as for users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nugget2d.config import SelectionName
from nugget2d.evaluation.coding import coder_bits
from nugget2d.evaluation.continuation import lm_losses, memory_losses, no_memory_losses
from nugget2d.evaluation.fidelity import bleu_counts, bleu_of_counts
from nugget2d.evaluation.intervals import Estimate, Sums, estimate, quotient
from nugget2d.evaluation.teacher_forced import copy_span_profile, read_back
from nugget2d.evaluation.windows import Window
from nugget2d.inference.reconstruction import reconstruct_ids
from nugget2d.memory.memory import Memory
from nugget2d.memory.states import StoreDtype
from nugget2d.model import Nugget2D


@dataclass(frozen=True, eq=False)
class Reference:
    """Losses (N, t) in nats of the targets of N windows, without memories.

    Attributes:
        none: by the plain LM, after nothing.
        full: by the plain LM, after the whole window.
        no_memory: by the decoder, with nothing to read.
    """

    none: Tensor
    full: Tensor
    no_memory: Tensor

    def gain(self, seed: int) -> Estimate:
        """Nats per token by which the whole context lowers the loss."""
        return _mean(self.none - self.full, seed)

    def helps(self, seed: int) -> bool:
        """Whether the whole context lowers the loss significantly; if not, shares of that gain are meaningless."""
        low = self.gain(seed)["low"]
        return low is not None and low > 0


def measure_reference(model: Nugget2D, windows: Sequence[Window]) -> Reference:
    """The reference losses of these windows; the same for all ratios."""
    targets = _targets(windows)
    return Reference(
        none=lm_losses(model, [[] for _ in windows], targets),
        full=lm_losses(model, [window.ids for window in windows], targets),
        no_memory=no_memory_losses(model, len(windows[0].ids), targets),
    )


def describe_reference(windows: Sequence[Window], reference: Reference, *, seed: int = 0) -> dict[str, Any]:
    """The metrics of windows of one length that do not depend on memories."""
    texts = [window.text for window in windows]
    return {
        "length": len(windows[0].ids),
        "windows": len(windows),
        "characters": sum(map(len, texts)),
        "nll_none": _mean(reference.none, seed),
        "nll_full": _mean(reference.full, seed),
        "nll_no_memory": _mean(reference.no_memory, seed),
        "no_memory_retained": _retained(reference, reference.no_memory, seed),
        "context_gain": reference.gain(seed),
        "context_helps": reference.helps(seed),
        "coder_bits_per_char": coder_bits(texts),
    }


def measure_cell(
    model: Nugget2D,
    windows: Sequence[Window],
    ratio: float,
    reference: Reference,
    *,
    selection: SelectionName | None = None,
    dtype: StoreDtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of windows of equal length at one ratio.

    Args:
        model: the compressor.
        windows: N of them; see `sample_windows`.
        ratio: tokens for each nugget.
        reference: from `measure_reference` of the same windows.
        selection: None takes the model's own.
        dtype: how states are kept; None keeps the model's precision.
        seed: of the bootstrap.

    Returns:
        A record for JSON: estimates with 95 % intervals over windows, `nll` in nats per token, sizes in bits per
        character. `retained` is (none - memory) / (none - full) of the targets' losses, `truncation_retained` the same
        for the last k tokens kept as text instead of k nuggets; both None where the whole context does not help.
    """
    start = perf_counter()
    texts, targets = [window.text for window in windows], _targets(windows)
    memories = model.compress(texts, ratio=ratio, selection=selection, dtype=dtype)
    counts = [memory.num_nuggets for memory in memories]
    read = read_back(model, memories, texts)
    tokens = [len(one.hits) for one in read]
    copies = model.reconstruct(memories)
    after = memory_losses(model, memories, targets)
    kept = lm_losses(model, [window.ids[-k:] for window, k in zip(windows, counts, strict=True)], targets)
    characters = sum(map(len, texts))
    cell: dict[str, Any] = {
        "length": len(windows[0].ids),
        "ratio": ratio,
        "windows": len(windows),
        "segments": sum(len(memory.segments) for memory in memories),
        "achieved_ratio": round(sum(tokens) / sum(counts), 3),
        "chars_per_nugget": round(characters / sum(counts), 2),
        "bleu": estimate(bleu_counts(copies, texts), bleu_of_counts, seed=seed),
        "token_accuracy": estimate(_columns([one.hits.sum() for one in read], tokens), seed=seed),
        "exact_windows": estimate(
            _columns([a == b for a, b in zip(copies, texts, strict=True)], [1] * len(texts)), seed=seed
        ),
        "nll": estimate(_columns([one.losses.double().sum() for one in read], tokens), seed=seed),
        "copy_span_profile": copy_span_profile(
            torch.cat([one.hits for one in read]), torch.cat([one.distance for one in read])
        ),
        "nll_memory": _mean(after, seed),
        "nll_truncation": _mean(kept, seed),
        "retained": _retained(reference, after, seed),
        "truncation_retained": _retained(reference, kept, seed),
    }
    # freed before the exact memories are made: at low ratios each set takes gigabytes
    del memories
    cell |= _exact_mode(model, texts, ratio, selection)
    return cell | {"seconds": round(perf_counter() - start, 1)}


def retained(sums: Sums) -> NDArray[Any]:
    """(R, 3) summed losses after none, some and all of the context -> (R,) the share of the gain that is retained."""
    none, some, full = sums.T
    return (none - some) / (none - full)


def _retained(reference: Reference, losses: Tensor, seed: int) -> Estimate | None:
    if not reference.helps(seed):
        return None
    rows = _columns(reference.none.sum(1), losses.sum(1), reference.full.sum(1))
    return estimate(rows, retained, seed=seed)


def _exact_mode(
    model: Nugget2D, texts: Sequence[str], ratio: float, selection: SelectionName | None
) -> dict[str, float]:
    """Bits per character of exact int8 memories: the patch, the nuggets' states, the whole file of each text.

    The file includes the lossless copy; `exact_replays` is the share of texts that are restored without it.
    """
    memories = model.compress(list(texts), ratio=ratio, selection=selection, exact=True, dtype="int8")
    replays = ["".join(map(model.text, segments)) for segments in reconstruct_ids(model, memories)]
    bits = 8 / sum(map(len, texts))
    return {
        "exact_replays": sum(a == b for a, b in zip(replays, texts, strict=True)) / len(texts),
        "patch_bits_per_char": round(bits * sum(m.exact.patch_nbytes for m in memories if m.exact is not None), 5),
        "int8_nugget_bits_per_char": round(bits * sum(memory.nbytes for memory in memories), 4),
        "exact_file_bits_per_char": round(bits * _file_bytes(memories), 4),
    }


def _file_bytes(memories: Sequence[Memory]) -> int:
    with TemporaryDirectory() as folder:
        return sum(memory.save(Path(folder) / "memory.nugget") for memory in memories)


def _targets(windows: Sequence[Window]) -> Tensor:
    return torch.tensor([window.target for window in windows])


def _mean(losses: Tensor, seed: int) -> Estimate:
    return estimate(_columns(losses.sum(1), [losses.shape[1]] * len(losses)), quotient, seed=seed)


def _columns(*columns: Any) -> NDArray[np.float64]:
    """(N, m) from m columns of N numbers."""
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
