"""Rotates stored keys to other positions, as the model's own rotary embedding would."""

import inspect
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from nugget2d.errors import ModelError
from nugget2d.modeling.cache import LayerStates, cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.positions import find_rotary


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
    """Rotates stored keys to other positions, exactly as the model's own rotary embedding would.

    Which layers rotate, and how, is MEASURED: a single token is run at two positions. Its attention sees only itself,
    so a layer's two keys differ by exactly the rotation (rotary layers) or not at all (layers without positions).
    Anything else is refused: learned positions are added to the input and so part of the hidden state that a key is
    computed from; only encoding the text again could move it.
    """

    def __init__(self, body: PreTrainedModel, num_layers: int) -> None:
        """Probe `body` (a transformers decoder without head), which has `num_layers` layers.

        Raises:
            ModelError: the keys of some layer depend on the position in another way.
        """
        self._rotary = find_rotary(body)
        # in some models each type of layer has its own frequencies
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

    def layer(self, number: int, keys: Tensor, shift: Tensor) -> Tensor:
        """Keys (N, head_dim) of one layer, of any of its heads, moved by `shift` (N,) positions."""
        layout = self._layouts[number]
        if layout is None:
            return keys
        return layout.rotate(keys[None, None], *self._angles(shift[None], keys.device, self._types[number]))[0, 0]

    def _angles(self, shift: Tensor, device: torch.device, kind: str | None) -> tuple[Tensor, Tensor]:
        if self._rotary is None:
            raise ModelError("this model has no rotary embedding whose keys could be moved")
        options = {} if kind is None else {"layer_type": kind}
        shift = shift.to(device)
        cos, sin = self._rotary(torch.zeros(1, device=device), shift, **options)
        # some embeddings also scale; the scale, seen at position 0, is in the stored keys already
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
