"""Greedy answers to a question about a context in three ways: from its text, from its kept KV cache, from its memory.

Each yields the answer's (1, 1) token ids one by one and starts work when the first is asked for, so that a caller can
time the first token and the rest. All run the same loop to the same length; end of text does not stop it.
The caches are preallocated: transformers' own copy all keys and values at every token, which takes about as long as
attention and would favour the memory, whose copies are shorter.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from nugget2d.inference.decoding import decode, greedy
from nugget2d.inference.placement import placed_nuggets
from nugget2d.memory.memory import Memory
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer at the start of tensors that are longer: `room` tokens more than the first ones."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, kv_heads, q, head_dim) states after those in the cache; see `DynamicLayer.update`."""
        first, count = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shapes = ((*states.shape[:2], count + self._room, states.shape[3]) for states in (key_states, value_states))
            self._buffers = [key_states.new_empty(shape) for shape in shapes]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, first : first + count] = states
        self.keys, self.values = (buffer[:, :, : first + count] for buffer in self._buffers)
        return self.keys, self.values


def preallocated_cache(model: Network, room: int) -> Cache:
    """An empty cache for what is read first, and `room` tokens more.

    Sliding windows get a full layer as well: they mask nothing within the positions at which nuggets can be read
    (modeling/compatibility.py).
    """
    layers = model.lm.config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[_PreallocatedLayer(room) for _ in range(layers)])


@torch.no_grad()
def answer_from_text(model: Network, context: str, question: Tensor, length: int) -> Iterator[Tensor]:
    """`length` tokens after `context` and the (1, q) ids of `question`, all of it read by the plain LM."""
    embeds = model.embed(torch.cat([model.after_start(model.ids(context)), question], dim=1))
    yield from _generate(model, "base", preallocated_cache(model, length), embeds, 0, length)


@torch.no_grad()
def keep_cache(model: Network, context: str, room: int) -> Cache:
    """What the plain LM has read: keys and values of every token of `context`, with room for question and answer."""
    cache = preallocated_cache(model, room)
    list(_generate(model, "base", cache, model.embed(model.after_start(model.ids(context))), 0, 1))
    return cache


@torch.no_grad()
def answer_from_cache(model: Network, cache: Cache, question: Tensor, length: int) -> Iterator[Tensor]:
    """The same tokens, from the cache of `keep_cache`; question and answer are added to it."""
    yield from _generate(model, "base", cache, model.embed(question), cache.get_seq_length(), length)


@torch.no_grad()
def answer_from_memory(model: Network, file: Path, question: Tensor, length: int) -> Iterator[Tensor]:
    """`length` tokens after the memory in `file` and the (1, q) ids of `question`.

    Reads all nuggets, also those that `generate` would leave out because the context is longer than `config.context`:
    the seconds are those of the whole memory.
    """
    memory = Memory.load(file)
    nuggets = placed_nuggets(model, memory.kv, memory.offsets)
    embeds = model.embed(question)
    embeds = torch.cat([model.prompt("continue", 1).to(embeds.dtype), embeds], dim=1)
    cache = preallocated_cache(model, embeds.shape[1] + length)
    for layer, (keys, values) in enumerate(zip(nuggets.keys, nuggets.values, strict=True)):
        cache.update(keys, values, layer)
    yield from _generate(model, "decoder", cache, embeds, memory.num_tokens, length)


def _generate(model: Network, role: Role, cache: Cache, embeds: Tensor, position: int, length: int) -> Iterator[Tensor]:
    """`length` greedy tokens after (1, q, d) inputs at positions from `position` on."""

    def read(embeds: Tensor) -> Tensor:
        nonlocal position
        end = position + embeds.shape[1]
        logits = lm(
            inputs_embeds=embeds,
            position_ids=torch.arange(position, end, device=model.device)[None],
            **as_cache(lm, cache),
            use_cache=True,
            logits_to_keep=1,
        ).logits
        position = end
        return logits[:, -1]

    with model.parameters_by_role.role(role) as lm:
        for token in decode(read(embeds), lambda token: read(model.embed(token[:, None])), greedy, length):
            yield token[:, None]
