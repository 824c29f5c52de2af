"""Which language models are supported; the others are refused with the reason."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from transformers import Cache, PreTrainedModel

from nugget2d.config import NuggetConfig
from nugget2d.errors import ModelError
from nugget2d.modeling.adapters import refuse_adapted
from nugget2d.modeling.positions import layer_types, position_table, sliding_window

_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def check_supported(lm: PreTrainedModel, config: NuggetConfig) -> None:
    """Refuse a model whose cache cannot be reduced to selected tokens, or that has foreign adapters.

    Raises:
        ModelError: adapters; not a decoder-only LM; state-space layers, or others that mix tokens; sliding windows or a
            table of positions too short for `config`; rotary frequencies that depend on the length of the input.
    """
    refuse_adapted(lm)
    name = type(lm).__name__
    text = lm.config.get_text_config(decoder=True)
    if lm.config.is_encoder_decoder or not lm.can_generate():
        raise ModelError(f"{name} is not a decoder-only language model; use a causal LM")
    if text is not lm.config:
        raise ModelError(f"{name} is more than a language model; load its text part alone, e.g. as *ForCausalLM")
    needed = {*as_cache(lm, None), "position_ids", "inputs_embeds"}
    if getattr(lm, "_is_stateful", False) or not needed <= _accepted(type(lm).forward):
        raise ModelError(
            f"{name} does not keep one key and value per token at a position of the caller's choice (cache, "
            "position_ids, inputs_embeds); use an attention model with rotary positions"
        )
    if getattr(text, "alibi", False):
        raise ModelError(
            f"{name} uses ALiBi, which counts cache entries instead of positions; nuggets would be misplaced"
        )
    if "reuse" in (getattr(text, "kv_sharing_modes", None) or []) or getattr(text, "num_kv_shared_layers", None):
        raise ModelError(f"{name} has layers that share the keys of others; a nugget needs its own at every layer")
    others = layer_types(text) - {"full_attention", "sliding_attention"}
    if others:
        raise ModelError(
            f"{name} has layers of type {', '.join(sorted(others))}, whose cache mixes tokens or drops them by "
            "cache index; only attention layers can read nuggets"
        )
    _check_reach(lm, config)
    for kind in _rope_types(text) & _LENGTH_DEPENDENT:
        raise ModelError(
            f"{name} uses {kind} rotary embeddings, whose frequencies change with the length of the "
            "input, so stored keys would not fit; set another rope_type"
        )
    if config.scorer_layer > text.num_hidden_layers:
        raise ModelError(
            f"scorer_layer is {config.scorer_layer}, but {name} has {text.num_hidden_layers} layers; lower it"
        )


def as_cache(lm: PreTrainedModel, cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument by which the forward pass of `lm` takes its cache.

    "cache" since transformers 5.24, if the model's code knows that name; before it was "past_key_values".
    """
    return {"cache" if "cache" in _accepted(type(lm).forward) else "past_key_values": cache}


@lru_cache
def _accepted(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def fitting_fields(lm: PreTrainedModel) -> dict[str, int]:
    """Fields for a new `NuggetConfig`: the published values, or the largest that `lm` allows."""
    published = NuggetConfig()
    longest = getattr(lm.config, "max_position_embeddings", None) or published.window
    hard = [limit for limit in (sliding_window(lm), position_table(lm)) if limit is not None]
    # half: room for as many tokens again after a full segment, or in reconstruction beside its nuggets
    return {
        "window": min([published.window, longest, *(limit // 2 for limit in hard)]),
        "context": min([longest, *hard]),
        "scorer_layer": min(published.scorer_layer, getattr(lm.config, "num_hidden_layers", published.scorer_layer)),
    }


def _check_reach(lm: PreTrainedModel, config: NuggetConfig) -> None:
    """A window of W tokens is full attention while fewer than W states are in the cache, whatever their positions.

    Continuation never has more states than positions. Reconstruction, which rewinds, has the tokens of a segment and
    its nuggets: up to twice `config.window` states. Beyond W, tokens would be dropped by cache index instead of
    position.
    """
    name, window, table = type(lm).__name__, sliding_window(lm), position_table(lm)
    if window is not None and (2 * config.window > window or config.context > window):
        raise ModelError(
            f"{name} has sliding_attention layers that see {window} tokens, which drop nuggets by cache index instead "
            f"of position: it can be used with window up to {window // 2} and context up to {window}, "
            f"got {config.window} and {config.context}"
        )
    if table is not None and max(config.window, config.context) > table:
        raise ModelError(
            f"{name} has {table} positions: window ({config.window}) and context ({config.context}) cannot be longer"
        )


def _rope_types(text: Any) -> set[str]:
    """One for all layers, or one for each type of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
