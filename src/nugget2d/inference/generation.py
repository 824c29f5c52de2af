"""Generation: continue a prompt, with or without a memory, as one string or as a stream."""

import copy
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from nugget2d.errors import InputError, ModelError
from nugget2d.inference.options import GenerationOptions
from nugget2d.inference.prefix import Prefix, attention_for, prefix, prompt_ids
from nugget2d.inference.prompting import stop_tokens
from nugget2d.inference.sampling import NO_PROBABILITIES
from nugget2d.memory.memory import Memory
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network
from nugget2d.text.detokenizer import Transcript, detokenize_answer


@torch.no_grad()
def generate(
    model: Network,
    prompt: str | Sequence[int],
    memory: Memory | None,
    max_new_tokens: int,
    stream: bool,
    options: Mapping[str, Any],
) -> str | list[str] | Iterator[str]:
    """See `Nugget2D.generate`."""
    how = GenerationOptions.of(max_new_tokens, options)
    if stream and how.copies > 1:
        raise InputError("only one sequence can be streamed; leave out num_beams, or use stream=False")
    before, inputs = _inputs(model, prompt, memory, how)
    own = stop_tokens(model.lm.generation_config, model.tokenizer)
    ends = own if how.ends is None else frozenset(end for end in how.ends if end >= 0)

    @torch.no_grad()
    def run(criteria: Sequence[StoppingCriteria] = (), streamer: BaseStreamer | None = None) -> Tensor:
        with model.parameters_by_role.role(before.role) as lm, attention_for(lm, before.cache):
            try:
                ids = _without_defaults(lm).generate(
                    generation_config=how.config(ends, padding=min(own, default=0)),
                    logits_processor=LogitsProcessorList([*(how.logits_processor or ()), _require_choice]),
                    stopping_criteria=StoppingCriteriaList([*(how.stopping_criteria or ()), *criteria]),
                    prefix_allowed_tokens_fn=how.prefix_allowed_tokens_fn,
                    tokenizer=model.tokenizer,
                    streamer=streamer,
                    **inputs,
                )
            except (TypeError, ValueError, IndexError) as error:
                if not options:
                    raise
                raise InputError(f"transformers cannot generate with these options: {error}") from error
        return cast(Tensor, ids)

    if stream:
        return _stream(run, _TextStreamer(Transcript(model.tokenizer, how.stops), ends))
    # padding follows the end of a sequence
    answers = [takewhile(lambda token: token not in ends, ids) for ids in run().tolist()]
    texts = [detokenize_answer(model.tokenizer, ids, how.stops) for ids in answers]
    return texts[0] if how.num_return_sequences is None else texts


def _without_defaults(lm: PreTrainedModel) -> Any:
    """The same LM without the defaults of its own `generation_config`, under which transformers puts its options."""
    plain = copy.copy(lm)  # shares weights and modules
    plain.generation_config = GenerationConfig()
    return plain


def _require_choice(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that lets scores (B, V) pass if every row leaves a token to choose.

    Raises:
        ModelError: a score is NaN.
        InputError: all scores of a row are -inf: the options forbid every token.
    """
    best = scores.amax(-1)  # NaN if any is
    if best.isnan().any():
        raise ModelError(NO_PROBABILITIES)
    if (best == -torch.inf).any():
        raise InputError("the options leave no token to generate; forbid fewer")
    return scores


class _Abandoned(StoppingCriteria):
    """Ends generation when the stream is no longer read."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        stop = torch.full(input_ids.shape[:1], self.event.is_set(), dtype=torch.bool, device=input_ids.device)
        return cast(torch.BoolTensor, stop)


class _TextStreamer(BaseStreamer):
    """Hands the text of generated tokens to another thread, as it becomes certain."""

    def __init__(self, transcript: Transcript, ends: Collection[int]) -> None:
        self._transcript, self._ends = transcript, ends
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def put(self, value: Tensor) -> None:
        for token in value.flatten().tolist():
            if token not in self._ends:
                self._texts.put(self._transcript.push(token))

    def end(self) -> None:
        try:
            self._texts.put(self._transcript.finish())
        finally:  # the reader waits for it
            self._texts.put(None)

    def __iter__(self) -> Iterator[str]:
        return (text for text in iter(self._texts.get, None) if text)


def _stream(run: Callable[..., Tensor], streamer: _TextStreamer) -> Iterator[str]:
    """Text as a thread generates it; an error of the thread is raised here."""
    abandoned = _Abandoned()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            run([abandoned], streamer)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.event.set()
        thread.join()
    if failure:
        raise failure[0]


def _inputs(
    model: Network, prompt: str | Sequence[int], memory: Memory | None, how: GenerationOptions
) -> tuple[Prefix, dict[str, Any]]:
    """The prefix, and the inputs that transformers' generate needs to continue from its cache.

    These are embeddings, mask AND positions of length K + q. Without the mask or the positions the text is wrong, and
    there is no error; the embeddings of the K cached states are not used.
    """
    ids = prompt_ids(model, memory, prompt)
    if memory is None and not ids.numel():
        raise InputError("nothing to continue: give a prompt or a memory")
    room = ids.shape[1] + how.max_new_tokens - 1  # the last token is not read
    before = prefix(model, memory, room, start=isinstance(prompt, str))
    embeds = torch.cat([before.embeds, model.embed(ids)], dim=1)
    if memory is None:
        return before, {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2]).long()}
    cached = before.cache.get_seq_length()
    positions = before.position + torch.arange(-cached, embeds.shape[1], device=model.device)
    embeds = torch.nn.functional.pad(embeds, (0, 0, cached, 0))
    # transformers repeats embeddings, mask and positions for beams and samples, but not a cache that it is given
    before.cache.batch_repeat_interleave(how.copies)
    return before, {
        "inputs_embeds": embeds,
        "attention_mask": embeds.new_ones(embeds.shape[:2]).long(),
        "position_ids": positions[None],
        **as_cache(model.lm, before.cache),
    }
