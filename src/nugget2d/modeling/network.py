"""`Network`: the weights of a compressor and its tensor-level passes (score, select, encode, decode).

Training and evaluation use this level; the public class (model.py) is built on it. All tensors are batch-first: B rows,
n tokens, K nuggets, d hidden size.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.config import NuggetConfig, SelectionName
from nugget2d.deprecation import RenamedAttribute
from nugget2d.errors import MismatchError, ModelError
from nugget2d.memory.memory import Fingerprint, Memory
from nugget2d.modeling.adapters import base_weights, is_adapter
from nugget2d.modeling.cache import AllCollected, CollectingCache, Nuggets, cached_states, gather_nuggets, reading_mask
from nugget2d.modeling.compatibility import as_cache, check_supported
from nugget2d.modeling.digest import legacy_fingerprint, tokenizer_digest, weights_digest
from nugget2d.modeling.digest_cache import LoadedWeights, cached_weights_digest
from nugget2d.modeling.hooks import find_layers, hidden_after
from nugget2d.modeling.misfit import Readable, misfit
from nugget2d.modeling.parameters import Role, make_parameters
from nugget2d.modeling.positions import max_positions, require_positions
from nugget2d.modeling.rotation import KeyRotation
from nugget2d.modeling.selection import SCORED, Scorer, ends_clause, select
from nugget2d.text.segmentation import detokenize, tokenize, tokenize_after

PromptName = Literal["reconstruct", "continue"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What `Network.encode` returns: the nuggets, and which tokens they are.

    Attributes:
        nuggets: states, padded.
        index: (B, K) token index of each nugget in its row.
        valid: (B, K) bool, False on the padding.
    """

    nuggets: Nuggets
    index: Tensor
    valid: Tensor


class Network(nn.Module):
    """A causal LM with an encoder, a decoder, a scorer and soft prompts, or a plain LM with none of them.

    Attributes:
        config: what it was made with.
        tokenizer: of the LM.
        parameters_by_role: the LM in its roles.
        scorer: scores tokens; a plain LM has none.
        prompts: the soft prompts by name; a plain LM has none.
        flag: (d,) added to the embeddings of chosen tokens, or None.
        loaded_weights: which files the LM was loaded from, if the digest of its weights may be cached.
    """

    scorer: Scorer
    reach = RenamedAttribute("max_positions")

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: NuggetConfig) -> None:
        """Wrap `lm`, which is changed in place (adapters are injected, or it becomes the decoder).

        Raises:
            ModelError: the architecture cannot be supported; the message says why.
        """
        super().__init__()
        check_supported(lm, config)
        self.config = config
        self.tokenizer = tokenizer
        self.parameters_by_role = make_parameters(lm, config)
        self.loaded_weights: LoadedWeights | None = None
        start = self._average_token() if self.has_compressor else None
        if start is not None:
            self.scorer = Scorer(lm.config.hidden_size).to(start.device)
        # A soft prompt starts as the average token; the flag at zero, without effect until trained.
        prompts = {} if start is None else {name: start.clone() for name in ("reconstruct", "continue")}
        self.prompts = nn.ParameterDict(prompts)
        self.flag = None if start is None or not config.flag else nn.Parameter(torch.zeros_like(start))
        self.eval()

    @property
    def has_compressor(self) -> bool:
        """False for a plain LM, which has no scorer, no soft prompts and one role."""
        return self.config.adapters != "none"

    def require_compressor(self) -> None:
        """Check that there is a compressor.

        Raises:
            ModelError: this is a plain LM.
        """
        if not self.has_compressor:
            raise ModelError(
                f"the LM {self.config.name!r} has no trained compressor; use a training-free method, or train one "
                "with `nugget2d train` (`nugget2d methods` lists all)"
            )

    @property
    def lm(self) -> PreTrainedModel:
        """The wrapped causal LM."""
        return self.parameters_by_role.lm

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    @torch.no_grad()
    def _average_token(self) -> Tensor:
        """(d,) mean input embedding, float32, as the module returns it: some models scale their embeddings."""
        ids = torch.arange(self._embeddings.num_embeddings, device=self._embeddings.weight.device)
        return self.embed(ids).float().mean(0)

    @property
    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.lm.get_input_embeddings())

    def small_parameters(self) -> list[nn.Parameter]:
        """Trained parameters outside of both roles and the scorer: soft prompts and flag."""
        return [*self.prompts.parameters(), *([] if self.flag is None else [self.flag])]

    def embed(self, ids: Tensor) -> Tensor:
        """(B, n) ids -> (B, n, d) input embeddings."""
        return self._embeddings(ids)

    @torch.no_grad()
    def token_features(self, ids: Tensor) -> Tensor:
        """(B, n) ids -> (B, n, d) what the scorer reads: states after `config.scorer_layer` layers of the base."""
        with self.parameters_by_role.role("base") as lm:
            return hidden_after(self.parameters_by_role.body, find_layers(lm), self.config.scorer_layer, ids)

    def token_scores(self, ids: Tensor) -> Tensor:
        """(B, n) ids -> (B, n) scores, float32; gradient reaches the scorer, not the base.

        Raises:
            ModelError: a plain LM has no scorer.
        """
        self.require_compressor()
        return self.scorer(self.token_features(ids))

    def encode(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        selection: SelectionName | None = None,
        generator: torch.Generator | None = None,
        scores: Tensor | None = None,
    ) -> "Encoded":
        """Choose nuggets and compute their states in one encoder pass.

        Args:
            ids: (B, n) tokens, RIGHT-padded with any id: causal attention hides padding from the tokens before it.
            lengths: tokens of each row.
            counts: nuggets of each row.
            selection: policy; None takes the model's own.
            generator: for random selection.
            scores: (B, n) from `token_scores`; None computes them if the selection needs them.

        Raises:
            InputError: more tokens than the model has positions for (`require_positions`).
            ModelError: a plain LM has no encoder.
        """
        self.require_compressor()
        self.require_positions(ids.shape[1], states=ids.shape[1])
        selection = selection or self.config.selection
        if scores is None and selection in SCORED:
            scores = self.token_scores(ids)
        delimiters = self._delimiters.to(ids.device)[ids] if selection == "punctuation" else None
        index, valid = select(
            selection, ids, lengths, counts, scores=scores, delimiters=delimiters, generator=generator
        )
        embeds = self.embed(ids)
        if self.flag is not None:
            # added, not assigned: padded entries point at token 0 and must not unset its flag
            chosen = torch.zeros_like(ids).scatter_add(1, index, valid.long()).bool()
            embeds = embeds + chosen[..., None] * self.flag.to(embeds.dtype)
        cache = self.encoder_states(embeds)
        bias = None
        if scores is not None and scores.requires_grad:
            picked = scores.gather(1, index)
            bias = picked - picked.detach()
        return Encoded(gather_nuggets(cache, index, valid, bias), index, valid)

    def encoder_states(
        self,
        embeds: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        layers: int | None = None,
        role: Role = "encoder",
    ) -> DynamicCache:
        """Keys and values of every layer, of all inputs, from one causal pass of the encoder.

        Args:
            embeds: (B, n, d) input embeddings.
            mask: (B, n), 0 for masked inputs; None masks none.
            positions: (B, n); None counts from 0.
            layers: stop after this many layers; None runs all.
            role: with which weights.
        """
        batch, length = embeds.shape[:2]
        cache = CollectingCache(self.lm.config, layers)
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
        if positions is None:
            positions = torch.arange(length, device=embeds.device).expand(batch, length)
        with self.parameters_by_role.role(role) as module, suppress(AllCollected):
            body = module if role == "encoder" else self.parameters_by_role.body
            body(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                **as_cache(body, cache),
                use_cache=True,
            )
        return cache

    def decode(
        self, nuggets: Nuggets | None, ids: Tensor, *, prompt: PromptName | None, start: int | Tensor = 0
    ) -> Tensor:
        """Logits of one teacher-forced decoder pass over [nuggets, soft prompt, ids].

        Args:
            nuggets: what to read; None for none.
            ids: (B, q) tokens, right-padded with any id.
            prompt: the soft prompt before them; None for none.
            start: position of the first input (the soft prompt, if any), for all rows or (B,) each.

        Returns:
            (B, q [+ 1 with a prompt], vocabulary): row t predicts ids[t] with a prompt, ids[t + 1] without.

        Raises:
            InputError: more positions than the model has (`require_positions`).
        """
        embeds = self.embed(ids)
        if prompt is not None:
            embeds = torch.cat([self.prompt(prompt, len(ids)).to(embeds.dtype), embeds], dim=1)
        batch, queries = embeds.shape[:2]
        steps = torch.arange(queries, device=ids.device)
        first = torch.as_tensor(start, device=ids.device).reshape(-1, 1)
        if self.max_positions is not None:  # else the maximum would cost a needless synchronisation with the GPU
            states = None if nuggets is None else nuggets.count + queries
            self.require_positions(int(first.max()) + queries, states=states)
        positions = first + steps
        cache = None if nuggets is None else nuggets.to_cache(self.lm.config)
        mask = None if nuggets is None else reading_mask(nuggets, batch, queries, self.mask_like(embeds))
        with self.parameters_by_role.role("base" if prompt is None else "decoder") as lm:
            return lm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions.expand(batch, queries),
                **as_cache(lm, cache),
                use_cache=cache is not None,
            ).logits

    def prompt(self, name: PromptName, batch: int) -> Tensor:
        """(batch, 1, d) copies of a soft prompt.

        Raises:
            ModelError: a plain LM has none.
        """
        self.require_compressor()
        return self.prompts[name].expand(batch, 1, -1)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens to text."""
        return detokenize(self.tokenizer, ids)

    def ids(self, text: str) -> Tensor:
        """Text to (1, n) tokens on the model's device; special-token strings are ordinary text."""
        return torch.tensor([tokenize(self.tokenizer, text)[0]], dtype=torch.long, device=self.device)

    def ids_after(self, text: str) -> Tensor:
        """The same for text that continues other text, where some tokenizers would put a space before it."""
        return torch.tensor([tokenize_after(self.tokenizer, text)], dtype=torch.long, device=self.device)

    @property
    def start_token(self) -> int | None:
        """The token before a text in plain language modelling (BOS, else EOS), if the tokenizer has one."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def after_start(self, ids: Tensor) -> Tensor:
        """(B, n) tokens after the start token, if there is one, as plain language modelling reads a text.

        Without tokens (n = 0) no start token is added.
        """
        if self.start_token is None:
            return ids
        return torch.cat([torch.full_like(ids[:, :1], self.start_token), ids], dim=1)

    @cached_property
    def max_positions(self) -> int | None:
        """Positions while nuggets are read; None without a limit (rotary models without sliding windows)."""
        return max_positions(self.lm)

    def require_positions(self, end: int, *, states: int | None = None) -> None:
        """Check that the model has positions 0 .. end - 1.

        Args:
            end: one more than the last position.
            states: in the cache at the end, if there are nuggets in it. Without nuggets a sliding window is no limit.

        Raises:
            InputError: it does not.
        """
        require_positions(self.lm, self.config.name, end, states)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Digests of the base LM's weights and of the tokenizer, computed once: changed weights need a new object.

        Raises:
            ModelError: weights are offloaded.
        """
        weights = base_weights(self.lm.state_dict(keep_vars=True))
        digest = cached_weights_digest(weights, self.loaded_weights)
        return Fingerprint(self.config.name, digest, tokenizer_digest(self.tokenizer), scheme=2)

    @cached_property
    def reader_digest(self) -> str:
        """Digest of what reading nuggets needs besides the base: decoder adapter and soft prompts; "" of a plain LM."""
        if not self.has_compressor:
            return ""
        adapter = {name: weight for name, weight in self.lm.state_dict().items() if is_adapter(name, "decoder")}
        return weights_digest(adapter | {f"prompts.{name}": prompt for name, prompt in self.prompts.items()})

    @cached_property
    def legacy_fingerprint(self) -> Fingerprint:
        """Scheme 1, that of memories of version 0.1: differs between compressors on the same base."""
        return legacy_fingerprint(self.config.name, self.state_dict(), self.tokenizer)

    def recognizes(self, fingerprint: Fingerprint) -> bool:
        """Whether `fingerprint` is that of this base and tokenizer; with scheme 1, of this compressor."""
        own = self.legacy_fingerprint if fingerprint.scheme == 1 else self.fingerprint
        return replace(own, name="") == replace(fingerprint, name="")

    def require(self, memory: Memory) -> None:
        """Check that this model can read `memory`.

        Raises:
            MismatchError: another base or tokenizer made it, its reader needs other adapters, or it has other shapes.
        """
        made_by = memory.fingerprint
        if not self.recognizes(made_by):
            raise MismatchError(
                f"this memory was made by model {made_by.name!r} ({made_by.model[:12]}) and cannot be read by "
                f"{self.config.name!r}; load that model, or compress the text again"
            )
        adapters = memory.reader.adapters
        if adapters is not None and adapters != self.reader_digest:
            raise MismatchError(
                f"this memory was made for the adapters of {made_by.name!r}, which {self.config.name!r} does not have; "
                "load that model, or compress the text again"
            )
        if (reason := misfit(memory, self.readable)) is not None:
            raise MismatchError(f"{self.config.name!r} cannot read this memory: {reason}; compress the text again")

    @cached_property
    @torch.no_grad()
    def readable(self) -> Readable:
        """What memories must be like; shapes are looked up in what one token leaves in a cache."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        states = cached_states(self.encoder_states(self.embed(token), role="base"))
        shapes = [[(layer.shape[1], layer.shape[3]) for layer in side] for side in states]
        embeddings, config = self._embeddings, self.config if self.has_compressor else None
        return Readable(list(zip(*shapes, strict=True)), embeddings.num_embeddings, embeddings.embedding_dim, config)

    @cached_property
    def rotation(self) -> KeyRotation:
        """How stored keys move to other positions."""
        return KeyRotation(self.parameters_by_role.body, len(find_layers(self.lm)))

    @cached_property
    def _delimiters(self) -> Tensor:
        """(vocabulary,) bool: the token ends a clause."""
        size = self._embeddings.weight.shape[0]
        flags = [ends_clause(self.text([token])) for token in range(min(size, len(self.tokenizer)))]
        return torch.tensor(flags + [False] * (size - len(flags)))

    @staticmethod
    def mask_like(embeds: Tensor) -> Tensor:
        """A tensor of the dtype that attention will compute in: a float mask must have the dtype of the queries."""
        device = embeds.device.type
        if torch.is_autocast_enabled(device):
            return embeds.new_empty(0, dtype=torch.get_autocast_dtype(device))
        return embeds
