"""`Nugget2D`: compress a text into a memory, and read memories back (Nugget2D, arXiv 2310.02409).

This class holds the weights and the tensor-level passes (`encode`, `decode`, `token_scores`), which training and
evaluation use too. What users call is built from them: `compress` (compressing.py), `reconstruct` (reading.py),
`generate` and `score`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from nugget2d import compressing, generation, reading
from nugget2d.cache import KeyRotation, Nuggets, gather_nuggets, reading_mask
from nugget2d.config import Adapters, NuggetConfig, SelectionName
from nugget2d.errors import InputError
from nugget2d.fingerprint import fingerprint
from nugget2d.hidden import find_layers, hidden_after
from nugget2d.memory import Fingerprint, Memory
from nugget2d.parameters import make_parameters
from nugget2d.segmentation import detokenize, tokenize
from nugget2d.selection import SCORED, Scorer, select
from nugget2d.states import StoreDtype
from nugget2d.support import check_supported

PromptName = Literal["reconstruct", "continue"]


class Nugget2D(nn.Module):
    """A causal LM with an encoder, a decoder, a scorer and soft prompts.

    Make one with `from_pretrained` or `from_base`. All tensors below are batch-first; B rows, n tokens,
    K nuggets, d hidden size.
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: NuggetConfig) -> None:
        """Wrap `lm`; it is changed in place (adapters are injected, or it becomes the decoder).

        Raises:
            ModelError: the architecture cannot be supported; the message says why.
        """
        super().__init__()
        check_supported(lm, config)
        self.config = config
        self.tokenizer = tokenizer
        self.parameters_by_role = make_parameters(lm, config)
        embeddings = self._embeddings.weight.detach()
        width = embeddings.shape[1]
        self.scorer = Scorer(width).to(embeddings.device)
        # A soft prompt starts like an average token; the flag at zero, so that it disturbs nothing until trained.
        start = embeddings.float().mean(0)
        self.prompts = nn.ParameterDict({name: start.clone() for name in ("reconstruct", "continue")})
        self.flag = nn.Parameter(torch.zeros_like(start)) if config.flag else None
        self.eval()

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu") -> "Nugget2D":
        """Load a bundled model ("nano"), a folder written by `save_pretrained`, or a hub id.

        Raises:
            ModelError: there is no such model, or its files are incomplete.
        """
        from nugget2d.pretrained import load

        return load(name).to(device)

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write configuration, weights and tokenizer to `folder`, for `from_pretrained`; `dtype` rounds weights."""
        from nugget2d.pretrained import save

        save(self, folder, dtype)

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | Path | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        adapters: Adapters = "lora",
        **options: Any,
    ) -> "Nugget2D":
        """Wrap any decoder-only LM (object, folder or hub id) with fresh, untrained compressor weights.

        Args:
            base: the LM; an object is changed in place.
            tokenizer: needed with an object; read from the same place otherwise.
            adapters: "lora" (frozen base, two adapters) or "copies" (two full sets of layers).
            options: other fields of `NuggetConfig`.

        Raises:
            ModelError: the LM cannot be loaded or is of a kind that cannot be supported.
            InputError: an object came without a tokenizer.
        """
        from nugget2d.pretrained import load_base

        if isinstance(base, PreTrainedModel):
            if tokenizer is None:
                raise InputError("from_base(model object) needs its tokenizer: from_base(model, tokenizer)")
            lm, default_name = base, base.config.name_or_path or type(base).__name__
        else:
            lm, loaded = load_base(base)
            tokenizer = tokenizer or loaded
            default_name = str(base)
        limit = getattr(lm.config, "max_position_embeddings", None) or 512
        fields = {"name": default_name, "window": min(512, limit), "adapters": adapters} | options
        return cls(lm, tokenizer, NuggetConfig.model_validate(fields))

    # ---- what users call ----

    @overload
    def compress(
        self,
        text: str,
        *,
        ratio: float = ...,
        exact: bool = ...,
        selection: SelectionName | None = ...,
        dtype: StoreDtype | None = ...,
        on_progress: Callable[[int, int], None] | None = ...,
    ) -> Memory: ...
    @overload
    def compress(
        self,
        text: list[str] | tuple[str, ...],
        *,
        ratio: float = ...,
        exact: bool = ...,
        selection: SelectionName | None = ...,
        dtype: StoreDtype | None = ...,
        on_progress: Callable[[int, int], None] | None = ...,
    ) -> list[Memory]: ...
    def compress(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        ratio: float = 20,
        exact: bool = False,
        selection: SelectionName | None = None,
        dtype: StoreDtype | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Memory | list[Memory]:
        """Turn a text (or a list of texts, in padded batches) into a memory (or a list of them).

        A text longer than `config.window` tokens is cut at sentence ends, its segments are compressed side by side
        and joined, in time linear in the text.

        Args:
            text: any Unicode text, not empty.
            ratio: tokens for each nugget, at least 1.
            exact: also store what greedy decoding would miss, so that `reconstruct` returns the very same string.
            selection: "learned", "window", "even", "random" or "punctuation"; None takes the model's own.
            dtype: how to keep the states: "float32", "bfloat16" or "int8"; None takes the model's own precision.
            on_progress: called with (segments done, segments in all).

        Raises:
            InputError: an empty text, a ratio below 1, an unknown selection or dtype.
        """
        texts = [text] if isinstance(text, str) else list(text)
        memories = compressing.compress_texts(
            self, texts, ratio, exact, selection or self.config.selection, dtype, on_progress
        )
        return memories[0] if isinstance(text, str) else memories

    @overload
    def reconstruct(self, memory: Memory, *, on_progress: Callable[[int, int], None] | None = ...) -> str: ...
    @overload
    def reconstruct(
        self, memory: Sequence[Memory], *, on_progress: Callable[[int, int], None] | None = ...
    ) -> list[str]: ...
    def reconstruct(
        self, memory: Memory | Sequence[Memory], *, on_progress: Callable[[int, int], None] | None = None
    ) -> str | list[str]:
        """The text that a memory stands for, by greedy decoding; an exact memory returns the very same string.

        Warns:
            ExactFallbackWarning: an exact memory did not verify here, and its stored lossless copy was used.

        Raises:
            MismatchError: the memory was made by another model.
        """
        memories = [memory] if isinstance(memory, Memory) else list(memory)
        texts = reading.reconstruct_texts(self, memories, on_progress)
        return texts[0] if isinstance(memory, Memory) else texts

    @overload
    def generate(
        self,
        prompt: str = ...,
        *,
        memory: Memory | None = ...,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: str = ...,
        *,
        memory: Memory | None = ...,
        max_new_tokens: int = ...,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self, prompt: str = ..., *, memory: Memory | None = ..., max_new_tokens: int = ..., stream: bool, **options: Any
    ) -> str | Iterator[str]: ...
    def generate(
        self,
        prompt: str = "",
        *,
        memory: Memory | None = None,
        max_new_tokens: int = 64,
        stream: bool = False,
        **options: Any,
    ) -> str | Iterator[str]:
        """Continue `prompt` as if the text of `memory` stood before it; without memory, plain language modelling.

        Args:
            prompt: what to continue; may be empty when there is a memory.
            memory: the compressed context.
            max_new_tokens: at most so many tokens.
            stream: return an iterator of text pieces instead of one string.
            options: passed to transformers' `generate` (do_sample, temperature, top_p, num_beams, ...).

        Raises:
            InputError: neither prompt nor memory, or max_new_tokens below 1.
            MismatchError: the memory was made by another model.
        """
        return generation.generate(self, prompt, memory, max_new_tokens, stream, options)

    @torch.no_grad()
    def score(self, text: str, *, memory: Memory | None = None) -> float:
        """Mean negative log-likelihood of `text` after `memory`, in nats per token of this model's tokenizer.

        Without memory the first token, which nothing predicts, is not counted unless the tokenizer has a start (or
        end-of-text) token to stand before it.

        Raises:
            InputError: no token to score.
            MismatchError: the memory was made by another model.
        """
        return reading.score(self, text, memory)

    # ---- tensor-level passes ----

    @property
    def lm(self) -> PreTrainedModel:
        """The wrapped causal LM."""
        return self.parameters_by_role.lm

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    @property
    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.lm.get_input_embeddings())

    def embed(self, ids: Tensor) -> Tensor:
        """(B, n) ids -> (B, n, d) input embeddings."""
        return self._embeddings(ids)

    @torch.no_grad()
    def token_features(self, ids: Tensor) -> Tensor:
        """(B, n) ids -> (B, n, d) what the scorer reads: states after `config.scorer_layer` layers of the base."""
        with self.parameters_by_role.role("base") as lm:
            return hidden_after(self.parameters_by_role.body, find_layers(lm), self.config.scorer_layer, ids)

    def token_scores(self, ids: Tensor) -> Tensor:
        """(B, n) ids -> (B, n) scores, float32; gradient reaches the scorer, not the base."""
        return self.scorer(self.token_features(ids))

    def encode(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        selection: SelectionName | None = None,
        generator: torch.Generator | None = None,
    ) -> "Encoded":
        """Choose nuggets and compute their states in one encoder pass.

        Args:
            ids: (B, n) tokens, RIGHT-padded with any id: causal attention keeps padding from what stands before it.
            lengths: tokens of each row.
            counts: nuggets of each row.
            selection: policy; None takes the model's own.
            generator: for random selection.
        """
        selection = selection or self.config.selection
        scores = self.token_scores(ids) if selection in SCORED else None
        delimiters = self._delimiters.to(ids.device)[ids] if selection == "punctuation" else None
        index, valid = select(
            selection, ids, lengths, counts, scores=scores, delimiters=delimiters, generator=generator
        )
        embeds = self.embed(ids)
        if self.flag is not None:
            # added, not assigned: a padded slot points at token 0 and must not un-choose it
            chosen = torch.zeros_like(ids).scatter_add(1, index, valid.long()).bool()
            embeds = embeds + chosen[..., None] * self.flag.to(embeds.dtype)
        cache = DynamicCache(config=self.lm.config)
        with self.parameters_by_role.role("encoder") as body:
            body(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids),
                past_key_values=cache,
                use_cache=True,
            )
        picked = None if scores is None else scores.gather(1, index)
        bias = None if picked is None or not picked.requires_grad else picked - picked.detach()
        return Encoded(gather_nuggets(cache, index, valid, bias), index, valid, picked)

    def decode(
        self, nuggets: Nuggets | None, ids: Tensor, *, prompt: PromptName | None, start: int | Tensor = 0
    ) -> Tensor:
        """Logits of one teacher-forced decoder pass over [nuggets, soft prompt, ids].

        Args:
            nuggets: what to read; None reads nothing.
            ids: (B, q) tokens, right-padded with any id.
            prompt: the soft prompt before them; None puts none.
            start: position of the first input (the soft prompt, if any), for all rows or (B,) each.

        Returns:
            (B, q [+ 1 with a prompt], vocabulary): row t predicts ids[t] with a prompt, ids[t + 1] without.
        """
        embeds = self.embed(ids)
        if prompt is not None:
            embeds = torch.cat([self.prompt(prompt, len(ids)).to(embeds.dtype), embeds], dim=1)
        batch, queries = embeds.shape[:2]
        steps = torch.arange(queries, device=ids.device)
        positions = torch.as_tensor(start, device=ids.device).reshape(-1, 1) + steps
        cache = None if nuggets is None else nuggets.to_cache(self.lm.config)
        mask = None if nuggets is None else reading_mask(nuggets, batch, queries, self._mask_like(embeds))
        with self.parameters_by_role.role("base" if prompt is None else "decoder") as lm:
            return lm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions.expand(batch, queries),
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits

    def prompt(self, name: PromptName, batch: int) -> Tensor:
        """(batch, 1, d) copies of a soft prompt."""
        return self.prompts[name].expand(batch, 1, -1)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens to text."""
        return detokenize(self.tokenizer, ids)

    def ids(self, text: str) -> Tensor:
        """Text to (1, n) tokens on the model's device; special-token strings are ordinary text."""
        return torch.tensor([tokenize(self.tokenizer, text)[0]], dtype=torch.long, device=self.device)

    @property
    def start_token(self) -> int | None:
        """The token that stands before a text in plain language modelling, if the tokenizer has one."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Digest of weights and tokenizer, computed once: make a new object after changing weights."""
        return fingerprint(self)

    @cached_property
    def rotation(self) -> KeyRotation:
        """How stored keys move to other positions."""
        return KeyRotation(self.parameters_by_role.body, len(find_layers(self.lm)))

    @cached_property
    def _delimiters(self) -> Tensor:
        """(vocabulary,) bool: the token ends a clause."""
        size = self._embeddings.weight.shape[0]
        texts = [self.text([token]) for token in range(min(size, len(self.tokenizer)))]
        flags = [text.endswith("\n") or text.strip()[-1:] in set(".,;:!?") - {""} for text in texts]
        return torch.tensor(flags + [False] * (size - len(flags)))

    @staticmethod
    def _mask_like(embeds: Tensor) -> Tensor:
        """A tensor of the dtype that attention will compute in: a float mask must have the dtype of the queries."""
        device = embeds.device.type
        if torch.is_autocast_enabled(device):
            return embeds.new_empty(0, dtype=torch.get_autocast_dtype(device))
        return embeds


@dataclass(frozen=True, eq=False)
class Encoded:
    """What `Nugget2D.encode` returns: the nuggets, which tokens they are, and their scores.

    Attributes:
        nuggets: states, padded.
        index: (B, K) token index of each nugget in its row.
        valid: (B, K) bool, False on the padding.
        scores: (B, K) float32, or None where the selection does not score.
    """

    nuggets: Nuggets
    index: Tensor
    valid: Tensor
    scores: Tensor | None
