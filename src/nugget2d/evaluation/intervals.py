"""Confidence intervals of metrics, by the percentile bootstrap over windows.

Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95

Sums = NDArray[np.float64]
# (R, m) sums over windows, one row a sample -> (R,) metrics
Statistic = Callable[[Sums], NDArray[Any]]


class Estimate(TypedDict):
    """A metric and its 95 % interval; the bounds are None for a single window."""

    value: float
    low: float | None
    high: float | None


def quotient(sums: Sums) -> NDArray[Any]:
    """(R, 2) sums -> (R,) the first over the second: a mean that weighs every token alike."""
    return sums[:, 0] / sums[:, 1]


def estimate(rows: ArrayLike, statistic: Statistic = quotient, *, seed: int = 0) -> Estimate:
    """A metric over all windows, with its interval from resampling the windows with replacement.

    Args:
        rows: (N, m) what each of N windows adds to m sums; sums of a window stay together, so differences are paired.
        statistic: the metric from the sums.
        seed: of the draws.
    """
    table = np.asarray(rows, dtype=np.float64)
    value = float(statistic(table.sum(0, keepdims=True))[0])
    count = len(table)
    if count < 2:
        return {"value": round(value, 6), "low": None, "high": None}
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(draws @ table), [tail, 1 - tail])
    return {"value": round(value, 6), "low": round(float(low), 6), "high": round(float(high), 6)}
