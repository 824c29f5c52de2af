"""Generation: continue a prompt, with or without a memory, as one string or as a stream."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from nugget2d.errors import InputError
from nugget2d.inference.prefix import Prefix, attention_for, prefix, prompt_ids
from nugget2d.inference.prompting import stop_tokens
from nugget2d.memory.memory import Memory
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.network import Network
from nugget2d.text.detokenizer import IncrementalDetokenizer, detokenize_answer


@torch.no_grad()
def generate(
    model: Network,
    prompt: str | Sequence[int],
    memory: Memory | None,
    max_new_tokens: int,
    stream: bool,
    options: dict[str, Any],
) -> str | list[str] | Iterator[str]:
    """See `Nugget2D.generate`."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    # transformers repeats embeddings, mask and positions for beams and samples, but not a cache that it is given
    copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
    if stream and copies > 1:
        raise InputError("only one sequence can be streamed; leave out num_beams, or use stream=False")
    before, inputs = _inputs(model, prompt, memory, copies, max_new_tokens)
    ends = sorted(stop_tokens(model.lm.generation_config, model.tokenizer))
    arguments = {"do_sample": False, "max_new_tokens": max_new_tokens, **inputs}
    if ends:  # else transformers would warn, and pad by a token of its own choice
        arguments |= {"eos_token_id": ends, "pad_token_id": ends[0]}
    arguments |= options

    @torch.no_grad()
    def run(**extra: Any) -> Tensor:
        with model.parameters_by_role.role(before.role) as lm, attention_for(lm, before.cache):
            try:
                return cast(Tensor, cast(Any, lm).generate(**arguments, **extra))
            except (TypeError, ValueError) as error:
                if not options:
                    raise
                raise InputError(f"transformers cannot generate with these options: {error}") from error

    if stream:
        return _stream(run, model)
    texts = [detokenize_answer(model.tokenizer, ids.tolist()) for ids in run()]
    return texts if "num_return_sequences" in options else texts[0]


class _Abandoned(StoppingCriteria):
    """Ends generation when the stream is no longer read."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        stop = torch.full(input_ids.shape[:1], self.event.is_set(), dtype=torch.bool, device=input_ids.device)
        return cast(torch.BoolTensor, stop)


class _TextStreamer(BaseStreamer):
    """Hands the text of generated tokens to another thread, as it becomes certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def put(self, value: Tensor) -> None:
        for token in value.flatten().tolist():
            self._texts.put(self._detokenizer.push(token))

    def end(self) -> None:
        try:
            self._texts.put(self._detokenizer.finish())
        finally:  # the reader waits for it
            self._texts.put(None)

    def __iter__(self) -> Iterator[str]:
        return (text for text in iter(self._texts.get, None) if text)


def _stream(run: Callable[..., Tensor], model: Network) -> Iterator[str]:
    """Text as a thread generates it; an error of the thread is raised here."""
    streamer = _TextStreamer(model.tokenizer)
    abandoned = _Abandoned()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            run(streamer=streamer, stopping_criteria=StoppingCriteriaList([abandoned]))
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
    model: Network, prompt: str | Sequence[int], memory: Memory | None, copies: int, new_tokens: int
) -> tuple[Prefix, dict[str, Any]]:
    """The prefix, and the inputs that transformers' generate needs to continue from its cache.

    These are embeddings, mask AND positions of length K + q. Without the mask or the positions the text is wrong, and
    there is no error; the embeddings of the K cached states are not used.
    """
    ids = prompt_ids(model, memory, prompt)
    if memory is None and not ids.numel():
        raise InputError("nothing to continue: give a prompt or a memory")
    room = ids.shape[1] + new_tokens - 1  # the last token is not read
    before = prefix(model, memory, room, start=isinstance(prompt, str))
    embeds = torch.cat([before.embeds, model.embed(ids)], dim=1)
    if memory is None:
        return before, {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2]).long()}
    cached = before.cache.get_seq_length()
    positions = before.position + torch.arange(-cached, embeds.shape[1], device=model.device)
    embeds = torch.nn.functional.pad(embeds, (0, 0, cached, 0))
    before.cache.batch_repeat_interleave(copies)
    return before, {
        "inputs_embeds": embeds,
        "attention_mask": embeds.new_ones(embeds.shape[:2]).long(),
        "position_ids": positions[None],
        **as_cache(model.lm, before.cache),
    }
