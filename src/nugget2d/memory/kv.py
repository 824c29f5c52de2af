"""The KV payload: keys and values of selected tokens, the same tokens for all heads or different ones per head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from nugget2d.errors import InputError
from nugget2d.memory.header import KVPart
from nugget2d.memory.payload import Kind
from nugget2d.memory.states import States, StoreDtype

# heads and head_dim
LayerShape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class HeadSelection:
    """Which rows of the token table each head keeps, where heads differ.

    Attributes:
        counts: (segments, layers, kv_heads) int32, tokens kept of each segment.
        rows: per layer (N,) int32, rows of the table: head after head, each in text order.
    """

    counts: Tensor
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class KVPayload:
    """Keys and values of p prefix tokens and of the tokens that were kept of the context.

    Provenance is a table of the u tokens that at least one head keeps. If all heads keep the same tokens, `heads` is
    None; else it has the rows of the table that each head keeps.

    Attributes:
        keys: per layer, rotated at prefix + segment-local positions. With one token set for all heads `States`
            (kv_heads, p + u, head_dim); else (N, head_dim), head after head, each with its prefix first, without
            padding.
        values: the same for the values.
        local_positions: (u,) int32, index of each token within its segment.
        token_spans: (u, 2) int32, character offsets [start, end) of each token in the whole text.
        scores: (u,) float32, of each token: its scorer's value, or the share of heads that keep it.
        heads: which head keeps which token; None if all keep all.
        prefix_ids: tokens before the context (start token, chat template) that every head keeps.
        last_id: the last token of the context, kept by every head, where no soft prompt follows: a reader drops its
            states and reads it again, for the logits after it. None where a soft prompt follows.
    """

    kind: ClassVar[Kind] = "kv"

    keys: tuple[States, ...]
    values: tuple[States, ...]
    local_positions: Tensor
    token_spans: Tensor
    scores: Tensor
    heads: HeadSelection | None = None
    prefix_ids: tuple[int, ...] = ()
    last_id: int | None = None

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of a layer."""
        return self.keys[0].data.shape[0] if self.heads is None else self.heads.counts.shape[2]

    @property
    def num_states(self) -> int:
        """Pairs of key and value, of all layers and heads, the prefix left out."""
        if self.heads is None:
            return len(self.keys) * self.num_kv_heads * len(self.local_positions)
        return int(self.heads.counts.sum())

    @property
    def count(self) -> int:
        """Tokens of the context that a head keeps, on average, rounded up."""
        return ceil(self.num_states / (len(self.keys) * self.num_kv_heads))

    @property
    def dtype(self) -> StoreDtype:
        """How the states are kept."""
        return self.keys[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales, prefix included: what takes the place of the KV cache."""
        return sum(states.nbytes for states in (*self.keys, *self.values))

    @property
    def shapes(self) -> list[tuple[LayerShape, LayerShape]]:
        """Heads and head_dim of the keys and of the values of each layer."""
        return [(self._shape(keys), self._shape(values)) for keys, values in zip(self.keys, self.values, strict=True)]

    def _shape(self, states: States) -> LayerShape:
        heads = states.data.shape[0] if self.heads is None else self.num_kv_heads
        return heads, states.data.shape[-1]

    @cached_property
    def head_counts(self) -> list[list[int]]:
        """States of every head of every layer, prefix included."""
        prefix = len(self.prefix_ids)
        if self.heads is None:
            return [[states.data.shape[1]] * self.num_kv_heads for states in self.keys]
        return (self.heads.counts.sum(0) + prefix).tolist()

    def per_head(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each head of a layer, (k, head_dim) float32, prefix first."""
        both = (states[layer].restore() for states in (self.keys, self.values))
        keys, values = (one.flatten(0, 1) if one.dim() == 3 else one for one in both)
        counts = self.head_counts[layer]
        return list(zip(keys.split(counts), values.split(counts), strict=True))

    def rows_of(self, layer: int) -> list[Tensor]:
        """The rows of the token table that each head of a layer keeps, in text order."""
        if self.heads is None:
            return [torch.arange(len(self.local_positions))] * self.num_kv_heads
        return list(self.heads.rows[layer].long().split(self.heads.counts.sum(0)[layer].tolist()))

    def to(self, dtype: StoreDtype) -> "KVPayload":
        """The same with its states stored as `dtype`; int8 has one scale per token and head."""
        return self.with_states(
            [States.store(states.restore(), dtype) for states in self.keys],
            [States.store(states.restore(), dtype) for states in self.values],
        )

    def with_states(self, keys: Sequence[States], values: Sequence[States]) -> "KVPayload":
        """The same tokens with these states."""
        return replace(self, keys=tuple(keys), values=tuple(values))

    def pick(self, tokens: slice | Tensor, *, chars: int = 0) -> "KVPayload":
        """Only some rows of the table, their spans moved by `chars` characters.

        Raises:
            InputError: heads keep different tokens.
        """
        if self.heads is not None or self.prefix_ids:
            raise InputError("only a memory with one token set for all heads, and no prefix, can be cut into parts")
        return replace(
            self.with_states([one.pick(tokens) for one in self.keys], [one.pick(tokens) for one in self.values]),
            local_positions=self.local_positions[tokens],
            token_spans=self.token_spans[tokens] + chars,
            scores=self.scores[tokens],
        )

    # ---- files ----

    def tensors(self) -> dict[str, Tensor]:
        """See `Payload`."""
        tensors = {name: getattr(self, name) for name in ("local_positions", "token_spans", "scores")}
        for name, layers in (("keys", self.keys), ("values", self.values)):
            for layer, states in enumerate(layers):
                tensors |= states.tensors(f"{name}.{layer}")
        if self.heads is not None:
            tensors["heads.counts"] = self.heads.counts
            tensors |= {f"heads.rows.{layer}": rows for layer, rows in enumerate(self.heads.rows)}
        return tensors

    def header(self) -> dict[str, Any]:
        """See `Payload`."""
        return {"num_layers": len(self.keys), "prefix_ids": self.prefix_ids, "last_id": self.last_id}

    @staticmethod
    def from_parts(tensors: dict[str, Tensor], header: KVPart) -> "KVPayload":
        """The inverse of `tensors` and `header`.

        Raises:
            KeyError: a tensor is missing.
        """
        layers = range(header.num_layers)
        heads = None
        if "heads.counts" in tensors:
            heads = HeadSelection(tensors["heads.counts"], tuple(tensors[f"heads.rows.{layer}"] for layer in layers))
        return KVPayload(
            keys=tuple(States.from_tensors(tensors, f"keys.{layer}") for layer in layers),
            values=tuple(States.from_tensors(tensors, f"values.{layer}") for layer in layers),
            local_positions=tensors["local_positions"],
            token_spans=tensors["token_spans"],
            scores=tensors["scores"],
            heads=heads,
            prefix_ids=header.prefix_ids,
            last_id=header.last_id,
        )


def join_kv(payloads: Sequence[KVPayload], chars: Sequence[int]) -> KVPayload:
    """One payload of consecutive texts, with unchanged states; of the equal prefixes the first is kept.

    Args:
        payloads: of texts that follow each other.
        chars: where each text begins in the whole, in characters.

    Raises:
        InputError: different dtypes, prefixes, layers or heads, or one token set in some and tokens per head in others.
    """
    first = payloads[0]
    for payload in payloads[1:]:
        if payload.dtype != first.dtype:
            raise InputError(f"cannot join memories kept as {first.dtype} and {payload.dtype}; convert with .to()")
        if payload.prefix_ids != first.prefix_ids:
            raise InputError("cannot join memories with different prefixes; compress all texts with the same prefix")
        if (payload.heads is None) != (first.heads is None):
            raise InputError("cannot join a memory of one token set with one whose heads differ; use one method")
        if payload.shapes != first.shapes:
            raise InputError("cannot join memories with other layers or heads; compress all texts with one model")
    sides = zip(*((payload.keys, payload.values) for payload in payloads), strict=True)
    keys, values = (
        [_join_layer(payloads, layer, states) for layer, states in enumerate(zip(*side, strict=True))] for side in sides
    )
    return replace(
        first.with_states(keys, values),
        local_positions=torch.cat([payload.local_positions for payload in payloads]),
        token_spans=torch.cat([payload.token_spans + start for payload, start in zip(payloads, chars, strict=True)]),
        scores=torch.cat([payload.scores for payload in payloads]),
        heads=None if first.heads is None else _join_heads(payloads),
        last_id=payloads[-1].last_id,
    )


def _join_layer(payloads: Sequence[KVPayload], layer: int, states: Sequence[States]) -> States:
    prefix = len(payloads[0].prefix_ids)
    if payloads[0].heads is None:
        later = [one.pick(slice(prefix, None)) for one in states[1:]] if prefix else states[1:]
        return States.concatenate([states[0], *later])
    split = [one.split(payload.head_counts[layer]) for payload, one in zip(payloads, states, strict=True)]
    parts = [
        part if number == 0 else part.pick(slice(prefix, None))
        for head in zip(*split, strict=True)
        for number, part in enumerate(head)
    ]
    return States.concatenate(parts)


def _join_heads(payloads: Sequence[KVPayload]) -> HeadSelection:
    """Rows of each head one after the other, moved to where its table begins in the joined one."""
    selections = [payload.heads for payload in payloads if payload.heads is not None]
    begins = [0]
    for payload in payloads[:-1]:
        begins.append(begins[-1] + len(payload.local_positions))
    rows = []
    for layer in range(len(payloads[0].keys)):
        heads = zip(*(payload.rows_of(layer) for payload in payloads), strict=True)
        parts = [part + begin for head in heads for part, begin in zip(head, begins, strict=True)]
        rows.append(torch.cat(parts).int())
    return HeadSelection(torch.cat([one.counts for one in selections]), tuple(rows))
