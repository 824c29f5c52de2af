"""Options of `Nugget2D.generate`: an allow list of those of transformers that hold after a memory too.

A memory has no tokens: options that look at tokens see those of the answer alone, with or without a memory, so that a
memory and its text give the same. Of the LM's own `generation_config` only the end tokens are used.
"""

from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from transformers import GenerationConfig

from nugget2d.config import Frozen, wrong_field
from nugget2d.errors import InputError
from nugget2d.inference.sampling import GREEDY_BELOW

# what transformers' `generate` takes beside its GenerationConfig
_ARGUMENTS = frozenset({"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"})
# what has no effect without do_sample, or without beams
_OF_SAMPLING = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)
_OF_BEAMS = frozenset({"early_stopping", "length_penalty"})
# Temperatures above it give all tokens the same probability, too; beyond float32's range forbidden ones become NaN.
_UNIFORM_ABOVE = 1e38

_REASONS: Mapping[str, str] = {
    "the LM's inputs are made of prompt and memory": """
        inputs input_ids inputs_embeds attention_mask position_ids token_type_ids past_key_values cache logits_to_keep
        bos_token_id tokenizer""",
    "the result is text; for tensors call model.lm.generate, for likelihoods model.score": """
        return_dict_in_generate output_scores output_logits output_attentions output_hidden_states""",
    "it drafts from tokens before the answer, which a memory does not have; without it the text is the same": """
        assistant_model assistant_tokenizer prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
        assistant_lookbehind target_lookbehind is_assistant speculation_type use_mtp""",
    "it looks at tokens before the answer, which a memory does not have; leave it out": """
        encoder_repetition_penalty encoder_no_repeat_ngram_size token_healing watermarking_config""",
    "the memory is the cache; leave it out": "cache_implementation cache_config max_cache_len use_cache",
    "transformers downloads code for it; use sampling or num_beams": """
        custom_generate trust_remote_code num_beam_groups diversity_penalty penalty_alpha dola_layers constraints
        force_words_ids""",
    "it needs a second prompt with a cache of its own; leave it out": """
        guidance_scale negative_prompt_ids negative_prompt_attention_mask""",
    "it changes no text; leave it out": """
        compile_config disable_compile continuous_batching_config prefill_chunk_size low_memory synced_gpus
        pad_token_id""",
    "it is for models with an encoder; leave it out": "decoder_start_token_id forced_bos_token_id",
    "it counts the tokens of the prompt, which a memory does not have; use max_new_tokens": "max_length",
    "it counts the tokens of the prompt, which a memory does not have; use min_new_tokens": "min_length",
    "an answer of max_new_tokens simply ends; leave it out": "forced_eos_token_id",
    "a model whose output is not a number is reported; leave it out": "remove_invalid_values",
    "give its fields by name, e.g. num_beams=3": "generation_config",
    "use stream=True": "streamer",
}
REFUSED: Mapping[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}


class GenerationOptions(Frozen):
    """The options of one call; those left out are neutral: greedy, without penalties.

    Attributes:
        max_new_tokens: tokens of the answer at most.
        do_sample: whether tokens are drawn; else the likeliest is taken every time.
        temperature: divides the logits before a token is drawn; 0, or nearly, takes the likeliest.
        top_k: only so many of the likeliest tokens are drawn from; 0 is all of them.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        num_beams: beams of a search; 1 is none.
        num_return_sequences: the result is a list of so many texts.
        eos_token_id: tokens that end the answer, in place of the model's own; -1 is none.
        stop_strings: the answer ends before any of these.
    """

    max_new_tokens: int = Field(ge=1)
    do_sample: bool = False
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    top_h: float | None = Field(default=None, gt=0, le=1)
    typical_p: float = Field(default=1.0, gt=0, le=1)
    epsilon_cutoff: float = Field(default=0.0, ge=0, lt=1)
    eta_cutoff: float = Field(default=0.0, ge=0, lt=1)
    num_beams: int = Field(default=1, ge=1, le=256)
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    num_return_sequences: int | None = Field(default=None, ge=1, le=256)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    sequence_bias: dict[tuple[int, ...], float] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    renormalize_logits: bool = False
    min_new_tokens: int = Field(default=0, ge=0)
    max_time: float | None = Field(default=None, gt=0)
    eos_token_id: int | list[int] | None = None
    stop_strings: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    logits_processor: list[Callable[..., Any]] | None = None
    stopping_criteria: list[Callable[..., Any]] | None = None
    prefix_allowed_tokens_fn: Callable[..., Any] | None = None

    @staticmethod
    def of(max_new_tokens: int, options: Mapping[str, Any]) -> "GenerationOptions":
        """From the arguments of `Nugget2D.generate`; None is as if left out.

        Raises:
            InputError: an option that is unknown, refused or would have no effect, or a value that is out of range.
        """
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in GenerationOptions.model_fields:
                raise _refusal(name)
        try:
            made = GenerationOptions.model_validate({"max_new_tokens": max_new_tokens, **given})
        except ValidationError as error:
            raise wrong_field(error) from error
        made._require_effect()
        return made

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.do_sample and self.temperature >= GREEDY_BELOW

    @property
    def copies(self) -> int:
        """Sequences that are generated side by side."""
        return max(self.num_beams, self.num_return_sequences or 1)

    @property
    def ends(self) -> list[int] | None:
        """`eos_token_id` as a list."""
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def stops(self) -> list[str]:
        """`stop_strings` as a list."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else self.stop_strings or []

    def config(self, ends: Collection[int], padding: int) -> GenerationConfig:
        """What transformers' `generate` takes.

        Args:
            ends: tokens that end the answer.
            padding: any token, for sequences that end before others.

        Raises:
            ValueError: options that exclude each other.
        """
        unused = _ARGUMENTS if self.samples else _ARGUMENTS | _OF_SAMPLING
        fields = self.model_dump(exclude_none=True, exclude={*unused})
        if self.samples:
            fields["temperature"] = min(self.temperature, _UNIFORM_ABOVE)
        if not ends:  # it favours them
            fields.pop("exponential_decay_length_penalty", None)
        fields |= {"do_sample": self.samples, "stop_strings": self.stops or None}
        return GenerationConfig(**fields | {"eos_token_id": sorted(ends) or None, "pad_token_id": padding})

    def _require_effect(self) -> None:
        """Refuse what transformers would ignore."""
        given, sampling = self.model_fields_set, "do_sample" in self.model_fields_set
        if not sampling and self.temperature >= GREEDY_BELOW and (idle := sorted(given & _OF_SAMPLING)):
            raise InputError(f"{', '.join(idle)} without do_sample=True has no effect; give both, or neither")
        if self.num_beams == 1 and (idle := sorted(given & _OF_BEAMS)):
            raise InputError(f"{', '.join(idle)} without num_beams has no effect; give both, or neither")


def _refusal(name: str) -> InputError:
    if name in REFUSED:
        return InputError(f"generate cannot take the option {name}: {REFUSED[name]}")
    known = sorted(GenerationOptions.model_fields)
    close = get_close_matches(name, known, 1)
    return InputError(
        f"generate has no option {name}; " + (f"is {close[0]} meant?" if close else f"it takes {', '.join(known)}")
    )
