"""Nuggets as a transformers KV cache: padding, masks, and where everything stands.

Positions, the choice of this project:
- A nugget keeps the position of its token. Within a segment that is 0 .. n-1; a memory of several segments is read
  with each segment's keys rotated to where the segment stands in the text (`KeyRotation`).
- Reconstruction REWINDS: the input that predicts token t of a segment stands at position t, so a token meets the
  nugget that carries it at a small, fixed relative distance. It learns faster than going on after the text
  (docs/LOG.md).
- Continuation goes on at n, as if the text were there.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nugget2d.errors import ModelError
from nugget2d.modeling.compatibility import as_cache, find_rotary

LayerStates = Sequence[Tensor]  # one tensor (B, kv_heads, K, head_dim) per layer


@dataclass(frozen=True, eq=False)
class Nuggets:
    """A batch of memories as tensors, LEFT-padded to K nuggets with zeros.

    Attributes:
        keys: per layer (B, kv_heads, K, head_dim), rotated; carries gradient in training.
        values: the same shape.
        valid: (B, K) bool, False on the padding; None when nothing is padded.
        bias: (B, K) float or None: s - stop_gradient(s), the straight-through term of the scorer.
    """

    keys: LayerStates
    values: LayerStates
    valid: Tensor | None = None
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        """K."""
        return self.keys[0].shape[2]

    def to_cache(self, config: PreTrainedConfig) -> DynamicCache:
        """A fresh cache: forward passes append to it, so one is made for every reading."""
        cache = DynamicCache(config=config)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache


class AllCollected(Exception):
    """The cache has the keys and values of the last layer that is wanted: nothing after that is of use."""


class CollectingCache(DynamicCache):
    """A cache for the encoder, whose pass ends with the last layer's keys and values.

    That layer's attention and feed-forward block would only feed a head that is not there. It ends by `AllCollected`.
    """

    def __init__(self, config: PreTrainedConfig, layers: int | None = None) -> None:
        """Empty; the pass ends with the first so many layers, if that is given."""
        super().__init__(config=config)
        self._wanted = len(self.layers) if layers is None else layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what a layer computed; see `DynamicCache.update`."""
        kept = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._wanted - 1:
            raise AllCollected
        return kept


def gather_nuggets(cache: DynamicCache, index: Tensor, valid: Tensor, bias: Tensor | None = None) -> Nuggets:
    """The states of the tokens at `index` (B, K) at every layer of `cache`; padding becomes zero."""
    full = bool(valid.all())
    rows = torch.arange(len(index), device=index.device)[:, None]

    def pick(states: Tensor) -> Tensor:
        # indexing, not `gather`: that one keeps all of `states` for its backward pass
        picked = states[rows, :, index].transpose(1, 2).contiguous()
        return picked if full else picked * valid[:, None, :, None].to(picked.dtype)

    keys, values = cached_states(cache)
    return Nuggets(list(map(pick, keys)), list(map(pick, values)), None if full else valid, bias)


def cached_states(cache: Cache) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer of a filled cache of full-attention layers."""
    layers = [cast(DynamicLayer, layer) for layer in cache.layers]
    return [cast(Tensor, layer.keys) for layer in layers], [cast(Tensor, layer.values) for layer in layers]


def reading_mask(nuggets: Nuggets, batch: int, queries: int, like: Tensor) -> Tensor | None:
    """The attention mask of `queries` new tokens over [nuggets, new tokens]; None when nothing must be hidden.

    Without bias a 2D mask (B, K + queries) of ones and zeros. With bias a 4D ADDITIVE FLOAT mask
    (B, 1, queries, K + queries): the one form through which a gradient reaches the scorer without touching any
    model code, and the one that both sdpa and eager attention read right.
    """
    if nuggets.valid is None and nuggets.bias is None:
        return None
    count, device = nuggets.count, like.device
    valid = torch.ones(batch, count, dtype=torch.bool, device=device) if nuggets.valid is None else nuggets.valid
    if nuggets.bias is None:
        return torch.cat([valid, valid.new_ones(batch, queries)], dim=1).long()
    lowest = torch.finfo(like.dtype).min
    memory = nuggets.bias.to(like.dtype).masked_fill(~valid, lowest)
    causal = torch.full((queries, queries), lowest, dtype=like.dtype, device=device).triu(1)
    return torch.cat([memory[:, None, None, :].expand(-1, 1, queries, -1), causal.expand(batch, 1, -1, -1)], dim=3)


@dataclass(frozen=True)
class _Layout:
    """How a model rotates: which dimensions of a key are a pair, and how its rotary embedding lists their angles.

    Attributes:
        neighbours: dimensions 2i and 2i + 1 are a pair (GPT-J, Cohere, GLM); else i and i + half (Llama and its kin).
        angles: one angle for each pair, out of those listed: the first half, every second, or all.
    """

    neighbours: bool
    angles: Literal["half", "alternate", "all"]

    def rotate(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first dimensions of keys (B, kv_heads, K, head_dim); those beyond have no angle."""
        cos, sin = self._once(cos), self._once(sin)
        width = 2 * cos.shape[-1]
        turned, kept = keys[..., :width].float(), keys[..., width:]
        first, second = (turned[..., ::2], turned[..., 1::2]) if self.neighbours else turned.chunk(2, dim=-1)
        parts = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(parts, dim=-1).flatten(-2) if self.neighbours else torch.cat(parts, dim=-1)
        return torch.cat([turned.to(keys.dtype), kept], dim=-1)

    def explains(self, before: Tensor, after: Tensor, cos: Tensor, sin: Tensor, limit: float) -> bool:
        """Whether keys `before` become `after` by this rotation."""
        if 2 * self._once(cos).shape[-1] > before.shape[-1]:
            return False
        return bool((self.rotate(before, cos, sin) - after).abs().max() < limit)

    def _once(self, listed: Tensor) -> Tensor:
        if self.angles == "half":
            return listed[..., : listed.shape[-1] // 2]
        return listed[..., ::2] if self.angles == "alternate" else listed


_LAYOUTS = (
    _Layout(neighbours=False, angles="half"),  # Llama and most others
    _Layout(neighbours=True, angles="half"),  # GLM, Ernie
    _Layout(neighbours=True, angles="alternate"),  # Cohere
    _Layout(neighbours=False, angles="all"),  # gpt-oss
)


class KeyRotation:
    """Moves stored keys to other positions, exactly as the model's own rotary embedding would.

    Which layers rotate, and how, is FOUND OUT rather than assumed: one token alone is run at two positions. Its
    attention sees only itself, so a layer's two keys differ by exactly the rotation (rotary layers) or not at all
    (layers without positions). Anything else is refused: learned positions, added to the input, are mixed into the
    hidden state that a key is made of, so only encoding the text again could move it.
    """

    def __init__(self, body: PreTrainedModel, num_layers: int) -> None:
        """Probe `body` (a transformers decoder without head), which has `num_layers` layers.

        Raises:
            ModelError: the keys of some layer depend on the position in another way.
        """
        self._rotary = find_rotary(body)
        # some models turn each type of layer by its own frequencies
        typed = self._rotary is not None and "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._types: list[str | None] = list(body.config.layer_types) if typed else [None] * num_layers
        self._layouts = self._probe(body)

    def __call__(self, keys: LayerStates, shift: Tensor) -> list[Tensor]:
        """Keys (B, kv_heads, K, head_dim) of every layer moved by `shift` (B, K) positions."""
        device = keys[0].device
        angles = {kind: self._angles(shift, device, kind) for kind in set(self._types)} if any(self._layouts) else {}
        return [
            key if layout is None else layout.rotate(key, *angles[kind])
            for key, layout, kind in zip(keys, self._layouts, self._types, strict=True)
        ]

    def _angles(self, shift: Tensor, device: torch.device, kind: str | None) -> tuple[Tensor, Tensor]:
        if self._rotary is None:
            raise ModelError("this model has no rotary embedding whose keys could be moved")
        options = {} if kind is None else {"layer_type": kind}
        shift = shift.to(device)
        cos, sin = self._rotary(torch.zeros(1, device=device), shift, **options)
        # some embeddings also scale: what they give at position 0, the stored keys have already
        scale = self._rotary(torch.zeros(1, device=device), torch.zeros_like(shift), **options)[0]
        return (cos / scale)[:, None], (sin / scale)[:, None]

    @torch.no_grad()
    def _probe(self, body: PreTrainedModel) -> list[_Layout | None]:
        config, device = body.config, next(body.parameters()).device

        def keys_at(position: int) -> list[Tensor]:
            cache = DynamicCache(config=config)
            ids = torch.ones(1, 1, dtype=torch.long, device=device)
            body(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.full_like(ids, position),
                **as_cache(body, cache),
                use_cache=True,
            )
            return [keys.float() for keys in cached_states(cache)[0]]

        shift = 37
        tolerance = 1e-4 if next(body.parameters()).dtype == torch.float32 else 5e-2
        layouts: list[_Layout | None] = []
        for layer, (before, after) in enumerate(zip(keys_at(0), keys_at(shift), strict=True)):
            limit = tolerance * max(1.0, float(before.abs().max()))
            if (before - after).abs().max() < limit:
                layouts.append(None)
                continue
            layout = None
            if self._rotary is not None:
                cos, sin = self._angles(torch.tensor([[shift]]), device, self._types[layer])
                layout = next((one for one in _LAYOUTS if one.explains(before, after, cos, sin, limit)), None)
            if layout is None:
                raise ModelError(
                    f"the keys of layer {layer} depend on the position in a way that cannot be re-based; "
                    "this model can read memories of one segment only: compress shorter texts"
                )
            layouts.append(layout)
        return layouts
