"""Methods that read the whole context in one prefill and keep some of its keys and values.

A prefix before the context is kept in full: the start token, or the chat template's tokens before a user's message. The
last token of the context is always kept; readers read it again for the logits after it (`KVPayload.last_id`). At
ratio 1 a memory is exactly the full context.
"""

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from nugget2d.errors import InputError
from nugget2d.inference.prompting import Message, split_around
from nugget2d.memory.kv import HeadSelection, KVPayload
from nugget2d.memory.memory import Memory, ReaderSpec, Segment
from nugget2d.memory.states import States, StoreDtype, row_nbytes
from nugget2d.methods.base import KVMethod, Progress, finish, native_dtype
from nugget2d.methods.budget import Budget
from nugget2d.modeling.cache import cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network
from nugget2d.text.segmentation import tokenize, tokenize_after_with_offsets

PREFILL_TOKENS = 2048  # read at a time; the memory that attention needs grows with it
STEP_TOKENS = 256  # read between two pauses of `steps`


@dataclass(frozen=True, eq=False)
class Context:
    """The states after the prefill, to select from; a method may change the states of kept tokens in place.

    Attributes:
        model: the LM.
        ids: (1, p + n) prefix and context.
        prefix: p.
        all_keys: per layer (kv_heads, p + n, head_dim), rotated at positions 0 .. p + n - 1.
        all_values: the same for the values.
    """

    model: Network
    ids: Tensor
    prefix: int
    all_keys: list[Tensor]
    all_values: list[Tensor]

    @property
    def length(self) -> int:
        """Tokens of the context (n)."""
        return self.ids.shape[1] - self.prefix

    @property
    def keys(self) -> list[Tensor]:
        """Per layer (kv_heads, n, head_dim) of the context alone."""
        return [layer[:, self.prefix :] for layer in self.all_keys]

    @property
    def values(self) -> list[Tensor]:
        """Per layer (kv_heads, n, head_dim) of the context alone."""
        return [layer[:, self.prefix :] for layer in self.all_values]


# Indices of the kept tokens of the context, ascending: (k,) for all heads, or per layer and head
Kept = Tensor | Sequence[Sequence[Tensor]]


class WholeContextMethod(KVMethod):
    """Prefills the context, and keeps the tokens that `select` returns.

    Attributes:
        chat: keep the tokens that the chat template puts before a user's message as prefix, instead of the start token:
            for questions in the same message (`prompting.split_around` gives what comes after the context).
    """

    chat: bool = False

    @abstractmethod
    def select(self, context: Context, count: int) -> Kept:
        """Which tokens of the context each head keeps, `count` of them on average over layers and heads."""

    @torch.no_grad()
    def compress(
        self, model: Network, texts: Sequence[str], budget: Budget | None, on_progress: Progress | None = None
    ) -> list[Memory]:
        """See `Method`."""
        budget = budget or Budget(ratio=self.default_ratio)
        memories = []
        for number, text in enumerate(texts):
            memories.append(finish(self._compress(model, text, number, budget, PREFILL_TOKENS)))
            if on_progress is not None:
                on_progress(number + 1, len(texts))
        return memories

    def steps(self, model: Network, texts: Sequence[str], budget: Budget | None) -> Generator[int, None, list[Memory]]:
        """See `Method`: a part of the prefill at a time."""
        budget = budget or Budget(ratio=self.default_ratio)
        memories = []
        for number, text in enumerate(texts):
            memories.append((yield from self._compress(model, text, number, budget, STEP_TOKENS)))
        return memories

    def _compress(
        self, model: Network, text: str, number: int, budget: Budget, step: int
    ) -> Generator[int, None, Memory]:
        if not text:
            raise InputError(f"text {number} is empty; there is nothing to compress")
        ids, offsets = (tokenize_after_with_offsets if self.chat else tokenize)(model.tokenizer, text)
        prefix = self._prefix(model, text)
        context = yield from prefill(model, prefix, ids, step)
        dtype = self.dtype or native_dtype(model)
        heads = context.keys[0].shape[0]
        nbytes = sum(2 * heads * row_nbytes(keys.shape[2], dtype) for keys in context.keys)
        count = budget.count(len(ids), nbytes, fixed=len(prefix))
        payload = _payload(context, self.select(context, count), dtype, offsets)
        segment = Segment(0, len(text), len(ids), len(payload.local_positions))
        numbers = sum(2 * heads * keys.shape[2] for keys in context.keys)
        return Memory(
            payload=payload,
            segments=(segment,),
            fingerprint=model.fingerprint,
            reader=ReaderSpec(),
            method=self.bound(model).record,
            token_nbytes=numbers * model.lm.dtype.itemsize,
        )

    def _prefix(self, model: Network, text: str) -> list[int]:
        if not self.chat:
            return [] if model.start_token is None else [model.start_token]
        if not model.tokenizer.chat_template:
            raise InputError(f"the tokenizer of {model.config.name!r} has no chat template; leave out the option chat")
        # a question follows in the same message: templates trim what ends one
        asked = Message("user", f"{text}?")
        return split_around(model.tokenizer, [asked], 0, (0, len(text))).before


def prefill(
    model: Network, prefix: Sequence[int], ids: Sequence[int], step: int = PREFILL_TOKENS
) -> Generator[int, None, Context]:
    """Keys and values of every token, by the base; after every `step` tokens it yields how many are left.

    Raises:
        InputError: more tokens than the model was trained to read at once, or has positions for.
    """
    whole = torch.tensor([[*prefix, *ids]], device=model.device)
    if whole.shape[1] > model.config.context:
        raise InputError(
            f"the text has {len(ids):,} tokens, {model.config.name!r} was trained on contexts of "
            f"{model.config.context:,}, its start included; compress it in parts"
        )
    model.require_positions(whole.shape[1], states=whole.shape[1])
    config = model.lm.config.get_text_config(decoder=True)
    # full layers also for sliding windows, which mask nothing within the positions that were just checked
    cache = Cache(layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])
    for start in range(0, whole.shape[1], step):
        part = whole[:, start : start + step]
        positions = torch.arange(start, start + part.shape[1], device=whole.device)
        with model.parameters_by_role.role("base"):  # others may read in other roles between two parts
            body = model.parameters_by_role.body
            body(input_ids=part, position_ids=positions[None], **as_cache(body, cache), use_cache=True)
        if start + step < whole.shape[1]:
            yield whole.shape[1] - start - step
    keys, values = ([layer[0] for layer in states] for states in cached_states(cache))
    return Context(model, whole, len(prefix), keys, values)


def highest(scores: Tensor, count: int) -> list[Tensor]:
    """(kv_heads, n) scores -> of each head the `count` tokens that score highest, in text order; the last always."""
    scores = scores.clone()
    scores[:, -1] = torch.inf
    return list(scores.topk(count).indices.sort().values)


# ---- from selection to payload ----


def _payload(context: Context, kept: Kept, dtype: StoreDtype, offsets: Sequence[tuple[int, int]]) -> KVPayload:
    if isinstance(kept, Tensor):
        table = _with_last(kept.cpu(), context.length)
        scores, heads = torch.ones(len(table)), None
        rows = [[table] * len(layer) for layer in context.all_keys]
    else:
        rows = [[_with_last(head.cpu(), context.length) for head in layer] for layer in kept]
        often = torch.bincount(torch.cat([head for layer in rows for head in layer]), minlength=context.length)
        table = often.nonzero().flatten()
        scores = often[table] / sum(map(len, rows))
        heads = _selection(rows, table, context.length)

    def gather(states: Sequence[Tensor]) -> tuple[States, ...]:
        return tuple(
            _gather(layer, mine, context.prefix, dtype, heads is None) for layer, mine in zip(states, rows, strict=True)
        )

    return KVPayload(
        keys=gather(context.all_keys),
        values=gather(context.all_values),
        local_positions=table.int(),
        token_spans=torch.tensor([offsets[index] for index in table.tolist()], dtype=torch.int32),
        scores=scores.float(),
        heads=heads,
        prefix_ids=tuple(context.ids[0, : context.prefix].tolist()),
        last_id=int(context.ids[0, -1]),
    )


def _with_last(rows: Tensor, length: int) -> Tensor:
    """`rows` with the last token, in place of the last selected one if it is not among them."""
    if not len(rows) or rows[-1] != length - 1:
        rows = torch.cat([rows[:-1], rows.new_tensor([length - 1])])
    return rows


def _selection(rows: Sequence[Sequence[Tensor]], table: Tensor, length: int) -> HeadSelection:
    place = torch.zeros(length, dtype=torch.int32)
    place[table] = torch.arange(len(table), dtype=torch.int32)
    counts = torch.tensor([[len(head) for head in layer] for layer in rows], dtype=torch.int32)
    return HeadSelection(counts[None], tuple(torch.cat([place[head] for head in layer]) for layer in rows))


def _gather(states: Tensor, rows: Sequence[Tensor], prefix: int, dtype: StoreDtype, shared: bool) -> States:
    """States of the prefix and the kept tokens: (kv_heads, p + k, head_dim) if shared, else head after head."""
    heads = []
    for head, kept in zip(states, rows, strict=True):
        index = torch.cat([torch.arange(prefix), prefix + kept]).to(head.device)
        heads.append(head[index].cpu())
    return States.store(torch.stack(heads) if shared else torch.cat(heads), dtype)
