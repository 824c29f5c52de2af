"""One set of figures on held-out windows: what training logs on its way, and what studies compare at its end."""

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


def held_out_figures(model: Network, windows: Tensor, context: int, ratios: Sequence[int]) -> dict[str, Any]:
    """Measure a compressor on (N, n) ids whose first `context` tokens are compressed.

    Returns:
        accuracy_4x, ...: share of the first `context` tokens predicted right from their nuggets, teacher-forced.
        profile_20x: the same by distance from a token to its nugget.
        continue_none, continue_10x, continue_full: nats per token of the last n - `context` tokens, shown nothing,
            nuggets, or all of the tokens before them.
        lm_loss: nats per token of all but the first token by plain language modelling.
    """
    figures: dict[str, Any] = {}
    texts = windows[:, :context]
    for ratio in ratios:
        hits, distance = reconstruction_hits(model, texts, ratio)
        figures[f"accuracy_{ratio}x"] = float(hits.float().mean())
        if ratio == PROFILED:
            figures[f"profile_{ratio}x"] = copy_span_profile(hits, distance)
    figures["continue_none"] = continuation_loss(model, windows, context, None)
    figures["continue_10x"] = continuation_loss(model, windows, context, 10)
    figures["continue_full"] = lm_loss_per_token(model, windows, context)
    figures["lm_loss"] = lm_loss_per_token(model, windows, 0)
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
