"""Keys and values of memories as tensors for the model, rotated to the positions at which they are read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nugget2d.memory.kv import KVPayload
from nugget2d.memory.memory import Memory
from nugget2d.memory.states import States
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.headwise import HeadwiseStates
from nugget2d.modeling.network import Network

SegmentRef = tuple[Memory, int]  # a memory and the number of one of its segments


def segment_nuggets(model: Network, rows: Sequence[SegmentRef]) -> Nuggets:
    """One segment of one memory in each row, left-padded, keys at segment-local positions."""
    slices = [memory.segment_slices[number] for memory, number in rows]
    widest = max(part.stop - part.start for part in slices)

    def stack(layers: Sequence[Sequence[States]]) -> list[Tensor]:
        stacked = []
        for layer in range(len(layers[0])):
            parts = []
            for states, part in zip((states[layer] for states in layers), slices, strict=True):
                rows = states.pick(part).restore()
                parts.append(torch.nn.functional.pad(rows, (0, 0, widest - rows.shape[1], 0)))
            stacked.append(torch.stack(parts).to(model.device, model.lm.dtype))
        return stacked

    counts = torch.tensor([part.stop - part.start for part in slices], device=model.device)
    valid = torch.arange(widest, device=model.device) >= widest - counts[:, None]
    return Nuggets(
        stack([memory.keys for memory, _ in rows]),
        stack([memory.values for memory, _ in rows]),
        None if bool(valid.all()) else valid,
    )


def placed_nuggets(model: Network, payload: KVPayload, shift: Tensor, first: int = 0) -> Nuggets:
    """The prefix and the tokens from row `first` on as one row of a batch, for a payload of one token set.

    A last token that is to be read again (`KVPayload.last_id`) is left out.

    Args:
        model: reads the result.
        payload: its heads keep the same tokens.
        shift: (rows,) by how many positions the keys of these tokens move; those of the prefix stay.
        first: the first row of the token table that is read.
    """
    device, dtype = model.device, model.lm.dtype
    prefix, total = len(payload.prefix_ids), len(payload.prefix_ids) + len(payload.local_positions)
    index = torch.cat([torch.arange(prefix), torch.arange(prefix + first, total)])
    shift = torch.cat([shift.new_zeros(prefix), shift])
    if payload.last_id is not None:
        index, shift = index[:-1], shift[:-1]
    kept = slice(0, None) if len(index) == total else index
    keys = [states.pick(kept).restore()[None].to(device) for states in payload.keys]
    if shift.any():  # keys that cannot be moved can be read where they are
        keys = model.rotation(keys, shift[None])
    return Nuggets(
        [layer.to(dtype) for layer in keys],
        [states.pick(kept).restore()[None].to(device, dtype) for states in payload.values],
    )


def placed_heads(model: Network, payload: KVPayload, shift: Tensor, first: int = 0) -> HeadwiseStates:
    """The same for heads that keep different tokens."""
    device, dtype = model.device, model.lm.dtype
    moves, prefix = bool(shift.any()), len(payload.prefix_ids)
    table = torch.cat([shift.new_zeros(first), shift])
    all_keys, all_values = [], []
    for layer in range(len(payload.keys)):
        layer_keys, layer_values = [], []
        for rows, (keys, values) in zip(payload.rows_of(layer), payload.per_head(layer), strict=True):
            if payload.last_id is not None:
                rows, keys, values = rows[:-1], keys[:-1], values[:-1]
            kept = torch.cat([torch.ones(prefix, dtype=torch.bool), rows >= first])
            keys, values = keys[kept].to(device), values[kept].to(device)
            if moves:
                moved = torch.cat([table.new_zeros(prefix), table[rows[rows >= first]]])
                keys = model.rotation.layer(layer, keys, moved)
            layer_keys.append(keys.to(dtype))
            layer_values.append(values.to(dtype))
        all_keys.append(layer_keys)
        all_values.append(layer_values)
    return HeadwiseStates(all_keys, all_values)


def join_rows(model: Network, nuggets: Nuggets, batch: int, segments: int, length: int) -> Nuggets:
    """Rows (batch * segments) of equal length as (batch) memories of consecutive segments, keys rotated into place."""
    if segments == 1:
        return nuggets

    def merge(states: Tensor) -> Tensor:
        _, heads, count, width = states.shape
        rows = states.view(batch, segments, heads, count, width).transpose(1, 2)
        return rows.reshape(batch, heads, segments * count, width)

    shift = torch.arange(segments, device=nuggets.keys[0].device).repeat(batch) * length
    keys = model.rotation(nuggets.keys, shift[:, None].expand(-1, nuggets.count))
    valid, bias = (None if one is None else one.reshape(batch, -1) for one in (nuggets.valid, nuggets.bias))
    return Nuggets([merge(k) for k in keys], [merge(v) for v in nuggets.values], valid, bias)
