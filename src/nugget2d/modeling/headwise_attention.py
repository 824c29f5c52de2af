"""Attention over a `HeadwiseCache`: block by block, registered with transformers as one of its implementations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from nugget2d.errors import InputError, ModelError
from nugget2d.modeling.headwise_layer import Block, Unpadded

_NAME = "nugget2d_headwise"


@contextmanager
def headwise_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Within the block `lm` reads a `HeadwiseCache`, and nothing else; afterwards it computes as before.

    Layers with a sliding window see all that their block keeps: use them where the window hides nothing.

    Raises:
        ModelError: the attention of `lm` cannot be chosen.
    """
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _no_mask)
    before = lm.config._attn_implementation
    lm.set_attn_implementation(_NAME)
    try:
        if lm.config._attn_implementation != _NAME:
            raise ModelError(
                f"the attention of {type(lm).__name__} cannot be chosen, so it cannot read memories whose length "
                "differs by layer or head; compress to the same number of nuggets everywhere"
            )
        yield
    finally:
        lm.set_attn_implementation(before)


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """The mask function for transformers: there is no mask, as a block holds no padding."""
    if attention_mask is not None and not attention_mask.all():
        raise InputError("a HeadwiseCache holds no padding: read prompts of different lengths each by itself")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Unpadded | Tensor,
    value: Unpadded | Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (B, heads, q, head_dim) queries -> (B, q, heads, head_dim)."""
    if not isinstance(key, Unpadded):
        raise ModelError(
            "within `headwise_attention` a model reads a HeadwiseCache only: give it one, or leave the block"
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} gets a 4D mask or a position bias, which do not fit a HeadwiseCache: its heads "
            "differ in length; give a mask of ones, or none"
        )
    layer = key.layer
    queries = query.unflatten(1, (layer.heads, -1))  # (B, kv_heads, group of heads that share it, q, head_dim)
    out = queries.new_empty(*queries.shape[:-1], layer.blocks[0].values.shape[-1])
    for block in layer.blocks:
        own = queries[block.where]
        if softcap is None and s_aux is None:
            out[block.where] = _sdpa(own, block, scaling)
        else:
            sinks = None if s_aux is None else s_aux.view(layer.heads, -1)[list(block.heads)]
            out[block.where] = _capped(own, block, scaling, softcap, sinks)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def _sdpa(queries: Tensor, block: Block, scaling: float | None) -> Tensor:
    """(rows, heads, group, q, head_dim) -> the same, by torch's fused attention."""
    group, count = queries.shape[2:4]
    if count == 1:  # every head a task of its own, for as many threads
        attended = F.scaled_dot_product_attention(
            queries.flatten(1, 2), block.keys, block.values, scale=scaling, enable_gqa=True
        )
        return attended.unflatten(1, (-1, group))
    # a group as more queries of one head: with a mask and `enable_gqa` CUDA has no fused kernel
    mask = _causal(count, block).repeat(group, 1)
    attended = F.scaled_dot_product_attention(
        queries.flatten(2, 3), block.keys, block.values, attn_mask=mask, scale=scaling
    )
    return attended.unflatten(2, (group, count))


def _capped(
    queries: Tensor, block: Block, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The same step by step: scores stay below `softcap`, and a sink of each (heads, group) takes its part of 1."""
    keys, values = block.keys[:, :, None], block.values[:, :, None]
    scores = queries @ keys.transpose(-1, -2) * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_causal(queries.shape[3], block), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[..., None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return weights[..., : block.length] @ values


def _causal(count: int, block: Block) -> Tensor:
    """(q, length) bool: the last `count` tokens are the queries, and each sees itself and all before it."""
    return torch.ones(count, block.length, dtype=torch.bool, device=block.keys.device).tril(block.length - count)
