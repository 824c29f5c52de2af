"""How learning rate and compression ratio move with the progress of a run (0 at the start, 1 at the end)."""

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
    """A ratio, log-uniform between `low` and a ceiling that rises from `start` to `high` over `ramp`."""
    risen = min(1.0, progress / config.ramp) if config.ramp else 1.0
    high = max(config.low, config.start + (config.high - config.start) * risen)
    draw = float(torch.rand(1, generator=generator))
    return math.exp(math.log(config.low) + draw * math.log(high / config.low))


def choose(weights: Mapping[Key, float], generator: torch.Generator) -> Key:
    """A key of `weights`, drawn in proportion to its weight."""
    keys = list(weights)
    values = torch.tensor([weights[key] for key in keys], dtype=torch.float)
    return keys[int(torch.multinomial(values, 1, generator=generator))]
