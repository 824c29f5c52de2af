"""The logits of a stream over a whole text, all chunks in one decoder pass, for training and evaluation.

Three ways to the same logits, none of which touches model code:

- `chunked`: every chunk is a row of its own, whose cache gathers, at every layer, the nuggets and the recent window
  before it from the other rows. A query attends to nuggets + recent_window + chunk keys, by any attention.
- `flex`: one row, and a block mask for FlexAttention, which skips blocks that are masked whole.
- `dense`: one row, and a mask of all queries by all keys: the simple reference for the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from nugget2d.errors import InputError
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.streaming.layout import NEVER, Keys, Layout, Queries, joined

Way = Literal["chunked", "flex", "dense"]
_MASKED = (NEVER, 0, 0)  # as `Keys`: padding, seen by no query


def mixed_logits(
    model: Network,
    nuggets: Nuggets | None,
    ids: Tensor,
    layout: Layout,
    way: Way | None = None,
    *,
    role: Role = "decoder",
) -> Tensor:
    """The decoder's logits, from uncompressed recent tokens and the nuggets of older segments.

    `Stream` computes the same, except that there the base reads until the first segment is compressed. With adapters
    base and decoder differ, with copies they do not.

    Args:
        model: encoder and decoder.
        nuggets: (B, segments * count) unpadded, keys at their positions in the text; None with one step.
        ids: (B, layout.length) tokens.
        layout: how the text is divided.
        way: None takes flex on CUDA, chunked elsewhere, without nuggets (short texts, which FlexAttention may have no
            kernel for) and where a gradient has to reach the scorer.
        role: whose weights; the base has no sinks.

    Returns:
        (B, n, V): row t predicts ids[t + 1].

    Raises:
        InputError: the layout does not fit the tokens, or needs more positions than the model has.
    """
    if ids.shape[1] != layout.length:
        raise InputError(f"{ids.shape[1]} tokens, but the layout is one of {layout.length}")
    model.require_positions(layout.length + 1, states=layout.length + 1)
    if way is None:
        way = "flex" if ids.is_cuda and nuggets is not None and nuggets.bias is None else "chunked"
    if way == "chunked":
        return _by_rows(model, nuggets, ids, layout, role)
    return _in_one_row(model, nuggets, ids, layout, way, role)


def parted(states: Tensor, batch: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """(rows, inputs, d) of any module in `mixed_logits` -> (batch, steps, d) of sinks, (batch, n, d) of tokens."""
    if len(states) == batch:  # in one row
        return states[:, : layout.steps], states[:, layout.steps :]
    rows = _Rows(layout)
    states = states.unflatten(0, (batch, rows.count))
    return states[:, rows.lead :, 0], states[:, :, 1:].flatten(1, 2)[:, rows.padding :]


# ---- one row: [sinks | tokens] ----


def _in_one_row(model: Network, nuggets: Nuggets | None, ids: Tensor, layout: Layout, way: Way, role: Role) -> Tensor:
    device = ids.device
    sinks, sink_keys = _sink_places(model, layout, role)
    tokens, token_keys = layout.tokens(device)
    queries = Queries(*(torch.cat(fields) for fields in zip(sinks, tokens, strict=True)))
    keys = joined([*_nugget_keys(nuggets, layout, device), sink_keys, token_keys])
    embeds = torch.cat([_sinks(model, layout).expand(len(ids), -1, -1), model.embed(ids)], dim=1)
    positions = torch.cat([sinks.step * layout.chunk, tokens.order])
    cache = DynamicCache(config=model.lm.config) if nuggets is None else nuggets.to_cache(model.lm.config)
    with model.parameters_by_role.role(role) as lm:
        if way == "dense":
            bias = None if nuggets is None else nuggets.bias
            mask = _additive(keys.seen_by(Queries(*(field[:, None] for field in queries))), bias, len(ids), embeds)
            logits = _logits(lm, embeds, positions[None], cache, mask)
        else:
            with _attending(lm, "flex_attention"):
                logits = _logits(lm, embeds, positions[None], cache, _block_mask(queries, keys))
    return parted(logits, len(ids), layout)[1]


def _block_mask(queries: Queries, keys: Keys) -> BlockMask:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return Keys(*(field[key] for field in keys)).seen_by(Queries(*(field[query] for field in queries)))

    return create_block_mask(seen, None, None, len(queries.step), len(keys.first), device=queries.step.device)


@contextmanager
def _attending(lm: PreTrainedModel, name: str) -> Iterator[None]:
    before = lm.config._attn_implementation
    lm.set_attn_implementation(name)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


# ---- a row for each chunk: [sink | chunk] ----


def _by_rows(model: Network, nuggets: Nuggets | None, ids: Tensor, layout: Layout, role: Role) -> Tensor:
    batch, device = len(ids), ids.device
    rows = _Rows(layout)
    sink_keys = _sink_places(model, layout, role)[1]
    token_keys = layout.tokens(device)[1]
    step = rows.steps(device)  # (C,)
    own = rows.split(token_keys.order, 0)  # (C, chunk); the padding has a place before the first token
    queries = Queries(step[:, None, None], torch.cat([torch.zeros_like(step)[:, None], own], dim=1)[..., None])
    nugget_keys = _nugget_keys(nuggets, layout, device)
    parts = [Keys(*(rows.nuggets(f, fill) for f, fill in zip(part, _MASKED, strict=True))) for part in nugget_keys]
    padded = list(zip(token_keys, _MASKED, strict=True))
    parts.append(Keys(*(rows.before(rows.pad(field, fill), fill) for field, fill in padded)))
    parts.append(Keys(*(field[step][:, None] for field in sink_keys)))
    parts.append(Keys(*(rows.split(field, fill) for field, fill in padded)))
    seen = joined(parts)
    mask = Keys(*(field[:, None] for field in seen)).seen_by(queries)  # (C, 1 + chunk, keys)
    embeds = torch.cat(
        [
            _sinks(model, layout)[:, step, None].expand(batch, -1, -1, -1),
            model.embed(rows.split(ids, 0)),
        ],
        dim=2,
    )
    positions = torch.cat([(step * layout.chunk)[:, None], own], dim=1).repeat(batch, 1)
    cache = _RowCache(model.lm.config, nuggets, rows, batch)
    bias = None
    if nuggets is not None and nuggets.bias is not None:
        bias = rows.nuggets(nuggets.bias, 0).flatten(0, 1)
    with model.parameters_by_role.role(role) as lm:
        additive = _additive(mask, bias, batch, embeds)
        logits = _logits(lm, embeds.flatten(0, 1), positions, cache, additive)
    return parted(logits, batch, layout)[1]


class _Rows:
    """Tokens of a text as rows of one chunk each, padded on the left so that step 0 ends with one."""

    def __init__(self, layout: Layout) -> None:
        self.recent_window, self.chunk, self.layout = layout.recent_window, layout.chunk, layout
        self.lead = -(-layout.recent_window // layout.chunk)  # chunks before the first that has a full window before it
        self.padding = self.lead * layout.chunk - layout.recent_window
        self.count = self.lead + layout.steps

    def steps(self, device: torch.device) -> Tensor:
        """(C,) the step of each row."""
        return (torch.arange(self.count, device=device) - self.lead).clamp(min=0)

    def pad(self, values: Tensor, fill: int) -> Tensor:
        """(..., n) -> (..., C * chunk)."""
        return F.pad(values, (self.padding, 0), value=fill)

    def split(self, values: Tensor, fill: int) -> Tensor:
        """(..., n) -> (..., C, chunk)."""
        return self.pad(values, fill).unflatten(-1, (self.count, self.chunk))

    def before(self, values: Tensor, fill: int) -> Tensor:
        """(..., C * chunk) -> (..., C, recent_window): the tokens before each row."""
        padded = F.pad(values, (self.recent_window, 0), value=fill)
        return padded.unfold(-1, self.recent_window, self.chunk)[..., : self.count, :]

    def nuggets(self, values: Tensor, fill: int) -> Tensor:
        """(..., nuggets) -> (..., C, those that are visible to a row)."""
        visible, segments = self.layout.visible_segments, self.layout.segments
        if visible is None or visible >= segments:
            return values[..., None, :].expand(*values.shape[:-1], self.count, -1)
        count = values.shape[-1] // segments
        windows = F.pad(values, (visible * count, 0), value=fill).unfold(-1, visible * count, count)
        return windows[..., self.steps(values.device), :]


class _RowCache(DynamicCache):
    """Gives every row its keys and values, [nuggets | window from the rows before | own], and keeps none."""

    def __init__(self, config: PreTrainedConfig, nuggets: Nuggets | None, rows: _Rows, batch: int) -> None:
        super().__init__(config=config)
        self._nuggets, self._rows, self._batch = nuggets, rows, batch

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Nothing is kept: keys and values for every row; see `DynamicCache.update`."""
        if self._nuggets is None:
            return self._gather([], key_states), self._gather([], value_states)
        keys, values = self._nuggets.keys[layer_idx], self._nuggets.values[layer_idx]
        return self._gather([keys], key_states), self._gather([values], value_states)

    def _gather(self, memory: Sequence[Tensor], states: Tensor) -> Tensor:
        """(B * C, heads, 1 + chunk, d) -> (B * C, heads, visible nuggets + recent_window + 1 + chunk, d)."""
        rows = self._rows
        tokens = states[:, :, 1:].unflatten(0, (self._batch, rows.count))  # (B, C, heads, chunk, d)
        text = tokens.permute(0, 2, 4, 1, 3).flatten(-2)  # (B, heads, d, C * chunk)
        parts = [*(rows.nuggets(part.to(states.dtype).transpose(2, 3), 0) for part in memory), rows.before(text, 0)]
        # (B, heads, d, C, keys) -> (B * C, heads, keys, d)
        return torch.cat([*(part.permute(0, 3, 1, 4, 2).flatten(0, 1) for part in parts), states], dim=2)


# ---- shared ----


def _sinks(model: Network, layout: Layout) -> Tensor:
    """(1, steps, d) embeddings of the sinks: the start token (any, where there is none), then soft prompts."""
    start = model.embed(torch.tensor([[model.start_token or 0]], device=model.device))
    prompts = model.prompt("continue", layout.segments).transpose(0, 1).to(start.dtype)
    return torch.cat([start, prompts], dim=1)


def _sink_places(model: Network, layout: Layout, role: Role) -> tuple[Queries, Keys]:
    decodes = role == "decoder"
    return layout.sinks(model.device, start=decodes and model.start_token is not None, prompts=decodes)


def _nugget_keys(nuggets: Nuggets | None, layout: Layout, device: torch.device) -> list[Keys]:
    return [] if nuggets is None else [layout.nuggets(nuggets.count // layout.segments, device)]


def _additive(seen: Tensor, bias: Tensor | None, batch: int, like: Tensor) -> Tensor:
    """A float mask (B * rows, 1, q, k) from `seen` ([rows,] q, k), plus `bias` (B * rows, nuggets)."""
    seen = seen.reshape(-1, *seen.shape[-2:])
    like = Network.mask_like(like)
    lowest = torch.finfo(like.dtype).min
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, lowest)
    mask = mask.repeat(batch, 1, 1)
    if bias is not None:
        mask = mask + F.pad(bias.to(like.dtype), (0, seen.shape[-1] - bias.shape[-1]))[:, None]
    return mask[:, None]


def _logits(lm: PreTrainedModel, embeds: Tensor, positions: Tensor, cache: DynamicCache, mask: Any) -> Tensor:
    return lm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions.expand(len(embeds), -1),
        **as_cache(lm, cache),
        use_cache=True,
    ).logits
