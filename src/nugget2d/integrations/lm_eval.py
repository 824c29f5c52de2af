"""lm-evaluation-harness scores a Nugget2D by what it reads: the whole context, a memory of it, or nothing.

    from nugget2d.integrations.lm_eval import NuggetLM

    lm_eval.simple_evaluate(model=NuggetLM("nano", context="memory", ratio=10), tasks=["recall"], task_manager=...)

The harness hands over context and question as one string. It is divided before the last `separator`: what stands before
is the context, the rest is the prompt and always read in full.
"""

from typing import Literal, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import MODEL_REGISTRY, register_model
from torch import Tensor

from nugget2d.errors import InputError
from nugget2d.inference.reading import text_nuggets
from nugget2d.memory.memory import Memory
from nugget2d.methods.nugget.compressing import DEFAULT_RATIO
from nugget2d.model import Nugget2D
from nugget2d.modeling.losses import token_losses
from nugget2d.text.segmentation import split

ContextMode = Literal["full", "memory", "none"]
NAME = "nugget2d"
MAX_NEW_TOKENS = 256


def register() -> None:
    """Make "nugget2d" a model name of the harness: `simple_evaluate(model="nugget2d", model_args="...")`."""
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(NuggetLM)


class NuggetLM(LM):
    """A Nugget2D as the harness wants its models."""

    def __init__(
        self,
        pretrained: str | Nugget2D,
        context: ContextMode = "memory",
        ratio: float = DEFAULT_RATIO,
        separator: str = "\nQuestion:",
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        """Load a model, or take one that is there.

        Args:
            pretrained: bundled name, folder, hub id, or the model itself.
            context: "full" reads contexts by the plain LM, "memory" as nuggets, "none" leaves them out.
            ratio: tokens for each nugget.
            separator: begins the prompt.
            device: where to load; None is the CPU.
            batch_size: passed by the harness; requests are scored one by one.
            max_batch_size: likewise.

        Raises:
            InputError: an unknown `context`, or no separator.
            ModelError: see `Nugget2D.from_pretrained`.
        """
        super().__init__()
        if context not in ("full", "memory", "none") or not separator:
            raise InputError(f"context is full, memory or none, got {context!r}; the separator must not be empty")
        if not isinstance(pretrained, Nugget2D):
            pretrained = Nugget2D.from_pretrained(pretrained, device=device or "cpu")
        self.model = pretrained
        self.mode, self.ratio, self.separator = context, float(ratio), separator
        self._memories: dict[str, Memory] = {}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation after its context, and whether it is the greedy one."""
        results = []
        for request in requests:
            text, continuation = request.args
            memory, prompt = self._read(text)
            results.append(self._score(memory, prompt, continuation))
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability in nats of whole texts, in pieces of at most `config.window` tokens.

        Each piece is predicted from what the mode shows of all before it; the first by the plain LM.
        """
        return [self._rolling(request.args[0]) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to the first stop string."""
        texts = []
        for request in requests:
            text, options = request.args[0], dict(request.args[1])
            until = options.pop("until", [])
            new_tokens = int(options.pop("max_gen_toks", MAX_NEW_TOKENS))
            memory, prompt = self._read(text)
            answer = cast(str, self.model.generate(prompt, memory=memory, max_new_tokens=new_tokens, **options))
            for stop in [until] if isinstance(until, str) else until:
                answer = answer.split(stop)[0] if stop else answer
            texts.append(answer)
        return texts

    def _read(self, text: str) -> tuple[Memory | None, str]:
        """What is read of a context as memory, and what as text."""
        place = text.rfind(self.separator)
        context, prompt = (text[:place], text[place:]) if place >= 0 else (text, "")
        if self.mode == "full":
            return None, text
        if self.mode == "none":
            return None, prompt
        return (self._compress(context) if context else None), prompt

    def _compress(self, context: str) -> Memory:
        # the choices of a question come with the same context, one after the other
        if context not in self._memories:
            self._memories = {context: self.model.compress(context, ratio=self.ratio)}
        return self._memories[context]

    @torch.no_grad()
    def _score(self, memory: Memory | None, prompt: str, continuation: str) -> tuple[float, bool]:
        before, target = self._ids(memory, prompt), self.model.ids_after(continuation)
        ids = torch.cat([before, target], dim=1)
        if memory is None:
            logits = self.model.decode(None, ids[:, :-1], prompt=None)
        else:
            nuggets, end = text_nuggets(self.model, memory, room=ids.shape[1])
            logits = self.model.decode(nuggets, ids[:, :-1], prompt="continue", start=end)
        logits = logits[:, -target.shape[1] :].float()
        return -float(token_losses(logits, target).sum()), bool((logits.argmax(-1) == target).all())

    def _ids(self, memory: Memory | None, prompt: str) -> Tensor:
        """(1, n) tokens before the continuation; something must stand before the first token of a plain LM."""
        if memory is not None:
            return self.model.ids_after(prompt)
        ids, start = self.model.ids(prompt), self.model.start_token
        if start is not None:
            return torch.cat([ids.new_full((1, 1), start), ids], dim=1)
        if not prompt:
            raise InputError("the tokenizer has no start token, so nothing can stand before an empty context")
        return ids

    def _rolling(self, text: str) -> float:
        total, before = 0.0, ""
        for piece in split(self.model.tokenizer, text, self.model.config.window):
            shown = "" if self.mode == "none" else before
            memory = self.model.compress(shown, ratio=self.ratio) if shown and self.mode == "memory" else None
            total += self._score(memory, "" if memory is not None else shown, piece.text)[0]
            before += piece.text
        return total
