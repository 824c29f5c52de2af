"""A model for lm-evaluation-harness that reads contexts in full, as memories, or not at all.

    from nugget2d.integrations.lm_eval import NuggetLM

    lm_eval.simple_evaluate(model=NuggetLM("nano", context="memory", ratio=10), tasks=["recall"], task_manager=...)

The harness passes context and question as one string. It is split before the last `separator`: the first part is the
context, the rest is the prompt, which is always read in full.
"""

from typing import Any, Literal, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import MODEL_REGISTRY, register_model

from nugget2d.errors import InputError
from nugget2d.inference.scoring import score_ids
from nugget2d.memory.memory import Memory
from nugget2d.model import Nugget2D
from nugget2d.text.segmentation import split

ContextMode = Literal["full", "memory", "none"]
NAME = "nugget2d"
MAX_NEW_TOKENS = 256


def register() -> None:
    """Make "nugget2d" a model name of the harness: `simple_evaluate(model="nugget2d", model_args="...")`."""
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(NuggetLM)


class NuggetLM(LM):
    """A Nugget2D with the interface of the harness."""

    def __init__(
        self,
        pretrained: str | Nugget2D,
        context: ContextMode = "memory",
        method: str | None = None,
        ratio: float | None = None,
        separator: str = "\nQuestion:",
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        """Load a model, or wrap a loaded one.

        Args:
            pretrained: bundled name, folder, hub id, or the model itself.
            context: "full" reads contexts with the plain LM, "memory" as memories, "none" leaves them out.
            method: how contexts are compressed; None takes the model's default.
            ratio: tokens for each nugget; None takes the method's default.
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
        self.mode, self.separator = context, separator
        self.how: dict[str, Any] = {"method": method, "ratio": None if ratio is None else float(ratio)}
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
        """Log-probability in nats of whole texts, in segments of at most `config.window` tokens.

        Each segment is predicted from the text before it, read as the mode says; the first by the plain LM.
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
        """The memory, and the text that is read after it."""
        place = text.rfind(self.separator)
        context, prompt = (text[:place], text[place:]) if place >= 0 else (text, "")
        if self.mode == "full":
            return None, text
        if self.mode == "none":
            return None, prompt
        return (self._compress(context) if context else None), prompt

    def _compress(self, context: str) -> Memory:
        # consecutive requests, the choices of a question, have the same context
        if context not in self._memories:
            self._memories = {context: self.model.compress(context, **self.how)}
        return self._memories[context]

    def _score(self, memory: Memory | None, prompt: str, continuation: str) -> tuple[float, bool]:
        before = self.model.ids_after(prompt) if memory is not None else self.model.ids(prompt)
        if memory is None and not prompt and self.model.start_token is None:
            raise InputError("the tokenizer has no start token, so an empty context cannot be scored")
        found = score_ids(self.model, memory, before, self.model.ids_after(continuation))
        return -float(found.losses.sum()), found.greedy

    def _rolling(self, text: str) -> float:
        total, before = 0.0, ""
        for segment in split(self.model.tokenizer, text, self.model.config.window):
            shown = "" if self.mode == "none" else before
            memory = self.model.compress(shown, **self.how) if shown and self.mode == "memory" else None
            total += self._score(memory, "" if memory is not None else shown, segment.text)[0]
            before += segment.text
        return total
