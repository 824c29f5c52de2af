"""How faithfully texts come back: BLEU, exact windows, token accuracy, copy-span profile."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from nugget2d.config import SelectionName
from nugget2d.errors import InputError
from nugget2d.evaluation.teacher_forced import copy_span_profile, reconstruction_hits
from nugget2d.model import Nugget2D
from nugget2d.segmentation import detokenize, tokenize


def sample_windows(model: Nugget2D, texts: Sequence[str], count: int, length: int, seed: int = 0) -> list[str]:
    """One window of exactly `length` tokens from each of the first `count` texts that are long enough.

    A window stands at a random place; where its text would not tokenize to `length` tokens by itself, the next place is
    taken.

    Raises:
        InputError: fewer than `count` texts have one.
    """
    draw = random.Random(seed)
    windows: list[str] = []
    for text in texts:
        ids, _ = tokenize(model.tokenizer, text)
        if len(ids) < 2 * length:
            continue
        first = draw.randrange(len(ids) - 2 * length + 1)
        for start in range(first, first + length):
            window = detokenize(model.tokenizer, ids[start : start + length])
            if len(tokenize(model.tokenizer, window)[0]) == length and window in text:
                windows.append(window)
                break
        if len(windows) == count:
            return windows
    raise InputError(f"only {len(windows)} of {len(texts)} texts have a window of {length} tokens; {count} are needed")


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU (sacrebleu's defaults: 13a tokenization, exponential smoothing), 0 to 100."""
    from sacrebleu import corpus_bleu

    return corpus_bleu(list(hypotheses), [list(references)]).score


def measure_fidelity(
    model: Nugget2D, windows: Sequence[str], ratio: float, *, selection: SelectionName | None = None
) -> dict[str, Any]:
    """Greedy reconstruction and teacher-forced accuracy of windows of equal length at one ratio."""
    memories = model.compress(list(windows), ratio=ratio, selection=selection)
    texts = model.reconstruct(memories)
    ids = torch.tensor([tokenize(model.tokenizer, window)[0] for window in windows])
    hits, distance = reconstruction_hits(model, ids, ratio, selection=selection)
    return {
        "ratio": ratio,
        "achieved_ratio": round(sum(m.num_tokens for m in memories) / sum(m.num_nuggets for m in memories), 3),
        "windows": len(windows),
        "chars_per_nugget": round(sum(map(len, windows)) / sum(m.num_nuggets for m in memories), 2),
        "bleu": round(bleu(texts, windows), 2),
        "exact_windows": round(sum(a == b for a, b in zip(texts, windows, strict=True)) / len(windows), 4),
        "token_accuracy": round(float(hits.float().mean()), 4),
        "copy_span_profile": copy_span_profile(hits, distance),
    }
