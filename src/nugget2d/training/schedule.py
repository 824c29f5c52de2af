"""Schedules of learning rate and compression ratio by the progress of a run (0 at the start, 1 at the end)."""

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch

from nugget2d.training.recipe import OptimConfig, RatioConfig

Key = TypeVar("Key", bound=Hashable)


def learning_rate_factor(step: int, progress: float, config: OptimConfig) -> float:
    """Factor on the peak rate: linear warm-up, constant, linear decay over the last `config.decay`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cool = min(1.0, (1.0 - progress) / config.decay) if config.decay else 1.0
    return warm * max(cool, 0.0)


def sample_ratio(progress: float, config: RatioConfig, generator: torch.Generator) -> float:
    """A ratio, log-uniform within the bounds of this moment."""
    begin, finish = config.moves
    moved = min(1.0, max(0.0, (progress - begin) / max(finish - begin, 1e-9)))
    low, high = (
        math.log(a) + (math.log(b) - math.log(a)) * moved for a, b in zip(config.start, config.end, strict=True)
    )
    return math.exp(low + float(torch.rand(1, generator=generator)) * (high - low))


def choose(weights: Mapping[Key, float], generator: torch.Generator) -> Key:
    """A key of `weights`, drawn in proportion to its weight."""
    keys = list(weights)
    values = torch.tensor([weights[key] for key in keys], dtype=torch.float)
    return keys[int(torch.multinomial(values, 1, generator=generator))]
