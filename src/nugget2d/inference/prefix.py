"""`prefix`: puts a memory in front of a prompt, as a cache, inputs, weights and position.

Everything that reads memories (generate, score, the server, lm-eval, benchmarks) starts from it and reads its own
tokens after it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from nugget2d.errors import ContextWarning, InputError, warn
from nugget2d.inference.placement import placed_heads, placed_nuggets
from nugget2d.inference.prompting import Message, around_context
from nugget2d.memory.kv import KVPayload
from nugget2d.memory.memory import Memory
from nugget2d.memory.payload import TextPayload
from nugget2d.modeling.cache import Nuggets
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.headwise import HeadwiseCache, HeadwiseStates
from nugget2d.modeling.headwise_attention import headwise_attention
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import Role
from nugget2d.text.segmentation import require_tokens


@dataclass(frozen=True, eq=False)
class Prefix:
    """What is before a prompt.

    Attributes:
        cache: keys and values of the memory, in a new cache, to which reading appends.
        embeds: (1, m, d) inputs to be read before the prompt: a soft prompt, a start token, a text; m may be 0.
        role: the weights to read with.
        position: of the first of `embeds`.
        skipped: tokens at the start of the context that are not read, as the model has no positions for them.
    """

    cache: Cache
    embeds: Tensor
    role: Role
    position: int
    skipped: int = 0

    @property
    def next_position(self) -> int:
        """Where the prompt begins."""
        return self.position + self.embeds.shape[1]


def prefix(model: Network, memory: Memory | None, room: int = 0, *, start: bool = True) -> Prefix:
    """Put a memory, or only the start token, in front of what follows.

    Models are unreliable at positions beyond those of training, so of a longer memory only the last segments are read,
    the first of them at position 0.

    Args:
        model: the reader.
        memory: None is plain language modelling.
        room: tokens that will follow the memory; with a limited number of positions, fewer segments may be read.
        start: whether the start token stands before what follows, where there is no memory; rendered chat templates
            bring their own.

    Warns:
        ContextWarning: the memory stands for more tokens than `config.context`, or than there is room for.

    Raises:
        MismatchError: the memory was made by another model.
        InputError: the model has too few positions (`Network.require_positions`).
    """
    if memory is None:
        return _as_text(model, [], room, start=start)
    _require_memory(memory)
    model.require(memory)
    payload = memory.payload
    if isinstance(payload, TextPayload):
        return _as_text(model, model.ids(payload.text)[0].tolist(), room, start=True)
    if isinstance(payload, KVPayload):
        return _after_states(model, memory, payload, room)
    embeds = payload.vectors.restore()[None].to(model.device, model.lm.dtype)
    model.require_positions(embeds.shape[1] + room)
    return Prefix(DynamicCache(config=model.lm.config), embeds, memory.reader.role, 0)


def prompt_ids(model: Network, memory: Memory | None, prompt: str | Sequence[int]) -> Tensor:
    """(1, q) tokens of a prompt.

    A text after a memory made with `chat=True` is a question: it follows the context in the same user message, and the
    chat template continues. Ids, e.g. of `prompting.split_around`, are taken as they are.

    Raises:
        InputError: the chat template cannot be put around that question; ids that are no tokens of this model.
    """
    if isinstance(prompt, str):
        if memory is None:
            return model.ids(prompt)
        _require_memory(memory)
        if not memory.method.config.get("chat"):
            return model.ids_after(prompt)
        prompt = around_context(model.tokenizer, [Message("user", prompt)], memory.kv.prefix_ids)
    ids = require_tokens(prompt, model.lm.config.vocab_size)
    return torch.tensor([ids], dtype=torch.long, device=model.device)


@torch.no_grad()
def read(model: Network, before: Prefix, embeds: Tensor, *, logits_to_keep: int = 0) -> Tensor:
    """(1, m + q or `logits_to_keep`, V) logits of `before.embeds` and inputs (1, q, d) after it; its cache is filled.

    Tokens read later have positions from `Prefix.next_position` + q on.
    """
    embeds = torch.cat([before.embeds, embeds], dim=1)
    positions = before.position + torch.arange(embeds.shape[1], device=embeds.device)
    with model.parameters_by_role.role(before.role) as lm, attention_for(lm, before.cache):
        return lm(
            inputs_embeds=embeds,
            position_ids=positions[None],
            **as_cache(lm, before.cache),
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits


def attention_for(lm: PreTrainedModel, cache: Cache) -> AbstractContextManager[None]:
    """A context in which `lm` can read `cache`, whose heads may differ in length."""
    return headwise_attention(lm) if isinstance(cache, HeadwiseCache) else nullcontext()


def _require_memory(memory: object) -> None:
    if not isinstance(memory, Memory):
        raise InputError(f"memory is {type(memory).__name__}, not a Memory; read a file with Memory.load(path)")


def _as_text(model: Network, ids: list[int], room: int, *, start: bool) -> Prefix:
    """Tokens that are read like any text, after the start token if there shall be one."""
    first = [model.start_token] if start and model.start_token is not None else []
    embeds = model.embed(torch.tensor([[*first, *ids]], dtype=torch.long, device=model.device))
    model.require_positions(embeds.shape[1] + room)
    return Prefix(DynamicCache(config=model.lm.config), embeds, "base", 0)


def _after_states(model: Network, memory: Memory, payload: KVPayload, room: int) -> Prefix:
    again = [] if payload.last_id is None else [payload.last_id]
    embeds = model.embed(torch.tensor([again], dtype=torch.long, device=model.device))
    if memory.reader.soft_prompt:
        embeds = torch.cat([embeds, model.prompt("continue", 1).to(embeds.dtype)], dim=1)
    room += embeds.shape[1] - len(again)
    before = len(payload.prefix_ids)
    limit = model.config.context
    if model.max_positions is not None:
        limit = min(limit, model.max_positions - room - before)
    first = _first_within(memory, limit)
    if first:
        warn(
            f"the memory stands for {memory.num_tokens:,} tokens, model {model.config.name!r} continues from "
            f"{limit:,} at most: only the last {len(memory.segments) - first} of its "
            f"{len(memory.segments)} segments are read",
            ContextWarning,
        )
    skipped = sum(segment.num_tokens for segment in memory.segments[:first])
    row = memory.segment_slices[first].start
    shift = memory.offsets[row:] - skipped
    cache: Cache
    end = before + memory.num_tokens - skipped
    longest = max(count for layer in payload.head_counts for count in layer)
    model.require_positions(end + room, states=longest + room)
    if payload.heads is None:
        cache = placed_nuggets(model, payload, shift, row).to_cache(model.lm.config)
    else:
        cache = _cache_of(model, placed_heads(model, payload, shift, row), room + len(again))
    return Prefix(cache, embeds, memory.reader.role, end - len(again), skipped)


def _cache_of(model: Network, states: HeadwiseStates, room: int) -> Cache:
    """One row; in an ordinary cache where all heads hold as many states, though of other tokens."""
    lengths = {len(head) for layer in states.keys for head in layer}
    if len(lengths) > 1:
        return HeadwiseCache([states], room)
    keys, values = ([torch.stack(list(layer))[None] for layer in side] for side in (states.keys, states.values))
    return Nuggets(keys, values).to_cache(model.lm.config)


def _first_within(memory: Memory, limit: int) -> int:
    """The first of the last segments that together stand for at most `limit` tokens; at least one is taken."""
    tokens = 0
    for number in range(len(memory.segments) - 1, -1, -1):
        tokens += memory.segments[number].num_tokens
        if tokens > limit:
            return min(number + 1, len(memory.segments) - 1)
    return 0
