"""Which language models can be wrapped; the others are refused at load, with the reason."""

import inspect

from transformers import PreTrainedModel

from nugget2d.config import NuggetConfig
from nugget2d.errors import ModelError

_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def check_supported(lm: PreTrainedModel, config: NuggetConfig) -> None:
    """Refuse a model whose cache could not be cut down to chosen tokens.

    Raises:
        ModelError: not a decoder-only LM, sliding-window or state-space layers, or rotary frequencies that depend on
            the length of the input.
    """
    name = type(lm).__name__
    text = lm.config.get_text_config(decoder=True)
    if lm.config.is_encoder_decoder or not lm.can_generate():
        raise ModelError(f"{name} is not a decoder-only language model; use a causal LM")
    accepts = inspect.signature(lm.forward).parameters
    if getattr(lm, "_is_stateful", False) or not {"past_key_values", "position_ids", "inputs_embeds"} <= set(accepts):
        raise ModelError(
            f"{name} does not keep one key and value per token at a position of the caller's choice (past_key_values, "
            "position_ids, inputs_embeds); use an attention model with rotary positions"
        )
    if getattr(text, "alibi", False):
        raise ModelError(
            f"{name} uses ALiBi, which counts cache slots instead of positions; nuggets would be misplaced"
        )
    others = set(getattr(text, "layer_types", None) or []) - {"full_attention"}
    if not getattr(text, "layer_types", None) and getattr(text, "sliding_window", None):
        others = {"sliding_attention"}
    if others:
        raise ModelError(
            f"{name} has layers of type {', '.join(sorted(others))}, whose cache drops or mixes tokens by slot; "
            "only full attention can read nuggets"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT:
        raise ModelError(
            f"{name} uses {rope['rope_type']} rotary embeddings, whose frequencies change with the length of the "
            "input, so stored keys would not fit; set another rope_type"
        )
    if config.scorer_layer > text.num_hidden_layers:
        raise ModelError(
            f"scorer_layer is {config.scorer_layer}, but {name} has {text.num_hidden_layers} layers; lower it"
        )
