"""How many positions a model has, and whether they are enough for an input."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nugget2d.errors import InputError


def sliding_window(lm: PreTrainedModel) -> int | None:
    """How many tokens the sliding-window layers of `lm` see, the current one included; None without such layers."""
    text = lm.config.get_text_config(decoder=True)
    return text.sliding_window if "sliding_attention" in layer_types(text) else None


def position_table(lm: PreTrainedModel) -> int | None:
    """How many positions `lm` has vectors for; None for rotary models, which compute them."""
    if find_rotary(lm) is not None:
        return None
    return getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None)


def max_positions(lm: PreTrainedModel) -> int | None:
    """Positions of `lm` while nuggets are read; None without a limit (rotary models without sliding windows)."""
    return min([limit for limit in (position_table(lm), sliding_window(lm)) if limit is not None], default=None)


def require_positions(lm: PreTrainedModel, name: str, end: int, states: int | None) -> None:
    """See `Network.require_positions`; `name` is that of the model in the error."""
    limit = position_table(lm) if states is None else max_positions(lm)
    needed = end if sliding_window(lm) is None else max(end, states or 0)
    if limit is not None and needed > limit:
        raise InputError(
            f"{needed} positions are needed, but {name!r} has {limit}: compress less text, shorten the prompt, or ask "
            "for fewer tokens"
        )


def find_rotary(lm: nn.Module) -> nn.Module | None:
    """The module that computes a model's rotary angles, shared by all its layers."""
    return next((module for name, module in lm.named_modules() if name.split(".")[-1] == "rotary_emb"), None)


def layer_types(text: Any) -> set[str]:
    """Kinds of attention in an LM of this configuration."""
    if "local" in (getattr(text, "attention_layers", None) or []):
        return {"local"}
    if types := getattr(text, "layer_types", None):
        return set(types)
    return {"sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"}
