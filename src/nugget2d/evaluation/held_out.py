"""The metrics on held-out windows that training logs and studies compare."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nugget2d.evaluation.teacher_forced import (
    continuation_loss,
    copy_span_profile,
    lm_loss_per_token,
    reconstruction_hits,
)
from nugget2d.modeling.network import Network

PROFILED = 20


def held_out_metrics(model: Network, windows: Tensor, context: int, ratios: Sequence[int]) -> dict[str, Any]:
    """Measure a compressor on (N, n) ids whose first `context` tokens are compressed.

    Returns:
        accuracy_4x, ...: share of the first `context` tokens predicted right from their nuggets, teacher-forced.
        profile_20x: the same by distance from a token to its nugget.
        continue_none, continue_10x, continue_full: nats per token of the last n - `context` tokens, shown nothing,
            nuggets, or all of the tokens before them.
        lm_loss: nats per token of all but the first token by plain language modelling.
    """
    metrics: dict[str, Any] = {}
    texts = windows[:, :context]
    for ratio in ratios:
        hits, distance = reconstruction_hits(model, texts, ratio)
        metrics[f"accuracy_{ratio}x"] = float(hits.float().mean())
        if ratio == PROFILED:
            metrics[f"profile_{ratio}x"] = copy_span_profile(hits, distance)
    metrics["continue_none"] = continuation_loss(model, windows, context, None)
    metrics["continue_10x"] = continuation_loss(model, windows, context, 10)
    metrics["continue_full"] = lm_loss_per_token(model, windows, context)
    metrics["lm_loss"] = lm_loss_per_token(model, windows, 0)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in metrics.items()}
