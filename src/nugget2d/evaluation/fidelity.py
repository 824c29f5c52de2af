"""Corpus BLEU of reconstructed texts (sacrebleu's defaults: 13a tokenization, exponential smoothing)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nugget2d.evaluation.intervals import Sums

_ORDERS = 4


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100."""
    from sacrebleu import corpus_bleu

    return corpus_bleu(list(hypotheses), [list(references)]).score


def bleu_counts(hypotheses: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """(N, 10) what each pair adds to corpus BLEU: n-grams matched, n-grams in all (n = 1 to 4), both lengths."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    scores = [metric.corpus_score([h], [[r]]) for h, r in zip(hypotheses, references, strict=True)]
    return [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]


def bleu_of_counts(sums: Sums) -> NDArray[Any]:
    """(R, 10) sums of `bleu_counts` -> (R,) corpus BLEU, 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    counts = sums.astype(int)
    matched, total, lengths = counts[:, :_ORDERS], counts[:, _ORDERS:-2], counts[:, -2:]
    rows = zip(matched.tolist(), total.tolist(), lengths.tolist(), strict=True)
    return np.array([BLEU.compute_bleu(m, t, both[0], both[1], smooth_method="exp").score for m, t, both in rows])
