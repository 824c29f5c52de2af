"""`Nugget2D`, the public class: compress texts into memories, and read memories (Nugget2D, arXiv 2310.02409)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from nugget2d.checkpoints.base import DeviceMap, load_base
from nugget2d.checkpoints.kinds import class_of
from nugget2d.checkpoints.load import load
from nugget2d.checkpoints.save import push, save
from nugget2d.config import Adapters, MemoryKind, NuggetConfig, Threshold
from nugget2d.deprecation import renamed_keywords
from nugget2d.errors import InputError, ModelError
from nugget2d.inference import generation, reconstruction, scoring
from nugget2d.memory.memory import Memory
from nugget2d.methods.options import CompressOptions
from nugget2d.modeling.adapters import refuse_adapted
from nugget2d.modeling.compatibility import fitting_fields
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import attention_projections
from nugget2d.streaming.stream import Stream
from nugget2d.streaming.threshold import calibrate_threshold


class Nugget2D(Network):
    """A causal LM that compresses texts into memories and reads them; see `from_pretrained` and `from_base`.

    The tensor-level passes that it inherits (`encode`, `decode`, `token_scores`) are for training and research.
    """

    memory_kind: ClassVar[MemoryKind] = "nuggets"

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device = "cpu",
        device_map: DeviceMap | None = None,
        base: str | Path | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
    ) -> "Nugget2D":
        """Load a compressor, or a plain causal LM, which compresses by training-free methods.

        Args:
            name: a bundled compressor ("nano"), a folder written by `save_pretrained`, a folder with any causal LM of
                transformers, the hub id of either, or a .gguf file (converted once into a cache folder).
            revision: branch, tag or commit of a hub id; None takes the main branch.
            token: for private and gated repositories; None takes the one that `hf auth login` stored.
            local_files_only: of the hub take only what was downloaded before; it is not asked.
            dtype: precision of the LM, also as a string ("bfloat16"), or "auto" for that of its files; everything
                trained keeps float32, but for copied layers.
            device: where to; not applied with `device_map` or `quantization_config`.
            device_map: where transformers puts the LM's layers, e.g. "auto".
            base: for adapters saved alone: the folder or hub id of their base, if it is not where it was.
            quantization_config: how transformers quantizes the LM, e.g. `BitsAndBytesConfig(load_in_8bit=True)`.

        Raises:
            ModelError: there is no such model, it is a peft adapter, its files are incomplete, its base is another
                one, it is of an unsupported kind, or it was trained to read other memories than this class.
            InputError: a `base` for a model that has its own.
            OutputError: the cache folder cannot be written.
        """

        def make(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: NuggetConfig) -> "Nugget2D":
            kind = class_of(config.memory)
            if not issubclass(kind, cls):
                raise ModelError(
                    f"{str(name)!r} was trained on memories of kind {config.memory!r}, {cls.__name__} makes "
                    f"{cls.memory_kind!r}; load it with Nugget2D.from_pretrained"
                )
            return kind(lm, tokenizer, config)

        model = load(
            make,
            name,
            base,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization_config,
        )
        return model if device_map is not None or quantization_config is not None else model.to(device)

    @renamed_keywords(figures="metrics")
    def save_pretrained(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        base: bool = True,
        metrics: Mapping[str, object] | None = None,
    ) -> None:
        """Write configuration, weights, tokenizer and a model card to `folder`, for `from_pretrained`.

        Args:
            folder: where to.
            dtype: rounds the weights; None keeps them.
            base: False leaves out the frozen LM and records where it was loaded from, and a digest.
            metrics: for the card, from `evaluation.held_out.held_out_metrics`.

        Raises:
            InputError: the base cannot be left out ("copies" trains it; an object was not loaded from anywhere), or is
                quantized and must be.
            OutputError: the folder cannot be written.
        """
        save(self, folder, dtype, base=base, metrics=metrics)

    def push_to_hub(
        self, repo_id: str, *, base: bool = True, private: bool | None = None, token: str | None = None
    ) -> str:
        """Save to a repository of the Hugging Face Hub, which is made if it is missing; returns the commit's address.

        Args:
            repo_id: "owner/name".
            base: see `save_pretrained`.
            private: of a new repository; None takes the owner's default.
            token: None takes the one that `hf auth login` stored.

        Raises:
            InputError: see `save_pretrained`.
            OutputError: the hub refused, or cannot be reached.
        """
        return push(self, repo_id, base=base, private=private, token=token)

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | Path | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        adapters: Adapters = "lora",
        dtype: torch.dtype = torch.float32,
        quantization_config: QuantizationConfigMixin | None = None,
        **options: Any,
    ) -> "Nugget2D":
        """Wrap any decoder-only LM (object, folder, hub id or .gguf file) with fresh compressor weights, for training.

        Args:
            base: the LM; an object is changed in place.
            tokenizer: needed with an object; read from the same place otherwise.
            adapters: "lora" (frozen base, two adapters) or "copies" (two full sets of layers).
            dtype: precision to load the base in; an object keeps its own. Adapters are float32 always.
            quantization_config: how transformers quantizes the base while loading it ("lora" only).
            options: other fields of `NuggetConfig`; those left out are chosen to fit the LM.

        Raises:
            ModelError: the LM cannot be loaded, carries a peft adapter, or is of an unsupported kind.
            InputError: an object is no LM of transformers or came without a tokenizer; copies of a quantized base.
            OutputError: see `from_pretrained`.
        """
        if quantization_config is not None and adapters == "copies":
            raise InputError("quantized weights cannot be trained; use adapters='lora'")
        weights = None
        if isinstance(base, nn.Module):
            refuse_adapted(base)
            if not isinstance(base, PreTrainedModel):
                raise InputError(f"from_base takes a model of transformers, a folder or a hub id, got {type(base)}")
            if tokenizer is None:
                raise InputError("from_base(model object) needs its tokenizer: from_base(model, tokenizer)")
            lm, default_name = base, base.config.name_or_path or type(base).__name__
        else:
            loaded = load_base(base, dtype=dtype, quantization_config=quantization_config)
            lm, weights, default_name = loaded.lm, loaded.loaded, str(base)
            tokenizer = tokenizer or loaded.tokenizer
        fields: dict[str, Any] = {"name": default_name, "memory": cls.memory_kind, "adapters": adapters}
        fields |= fitting_fields(lm)
        if projections := attention_projections(lm):
            fields["lora_targets"] = projections
        model = cls(lm, tokenizer, NuggetConfig.model_validate(fields | options))
        model.loaded_weights = weights
        return model

    # ---- compress and read ----

    @overload
    def compress(
        self,
        text: str,
        *,
        method: str | None = ...,
        ratio: float | None = ...,
        nuggets: int | None = ...,
        nbytes: int | None = ...,
        on_progress: Callable[[int, int], None] | None = ...,
        **options: Any,
    ) -> Memory: ...
    @overload
    def compress(
        self,
        text: list[str] | tuple[str, ...],
        *,
        method: str | None = ...,
        ratio: float | None = ...,
        nuggets: int | None = ...,
        nbytes: int | None = ...,
        on_progress: Callable[[int, int], None] | None = ...,
        **options: Any,
    ) -> list[Memory]: ...
    def compress(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        method: str | None = None,
        ratio: float | None = None,
        nuggets: int | None = None,
        nbytes: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Memory | list[Memory]:
        """Turn a text (or a list of texts) into a memory (or a list of them).

        Args:
            text: any Unicode text, not empty.
            method: its name, as `nugget2d methods` lists them; None takes "nugget2d" with a trained compressor, else
                the training-free default (`nugget2d.methods.registry.DEFAULT`).
            ratio: tokens for each nugget, at least 1; None takes the method's default (nugget2d 20, others 5) unless
                another budget is given.
            nuggets: tokens that a head keeps, on average, in place of a ratio.
            nbytes: bytes of the memory, in place of a ratio.
            on_progress: called with (parts done, parts in all).
            options: the method's configuration, e.g. `dtype="int8"` (all that keep states: "float32", "bfloat16" or
                "int8"; None takes the model's own precision), `chat=True` or `sinks=8`; of nugget2d `exact`,
                `target_accuracy`, `optimize_steps`, `selection` (see `NuggetMethod`).

        Warns:
            AccuracyWarning: some segments miss `target_accuracy`; they keep the states with the best measured accuracy.

        Raises:
            InputError: an empty text, an unknown method, option or dtype, a budget out of range, or several budgets.
            ModelError: method nugget2d without a trained compressor.
        """
        texts = [text] if isinstance(text, (str, bytes)) else list(text)
        how = CompressOptions.of(self, method=method, ratio=ratio, nuggets=nuggets, nbytes=nbytes, **options)
        memories = how.compress(self, texts, on_progress)
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
        """The text of a memory, by greedy decoding; an exact memory returns the identical string.

        Warns:
            ExactFallbackWarning: an exact memory did not verify here, and its stored lossless copy was used.

        Raises:
            MismatchError: the memory was made by another model.
        """
        memories = [memory] if isinstance(memory, Memory) else list(memory)
        texts = reconstruction.reconstruct_texts(self, memories, on_progress)
        return texts[0] if isinstance(memory, Memory) else texts

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] = ...,
        *,
        memory: Memory | None = ...,
        max_new_tokens: int = ...,
        num_return_sequences: int,
        **options: Any,
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int] = ...,
        *,
        memory: Memory | None = ...,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int] = ...,
        *,
        memory: Memory | None = ...,
        max_new_tokens: int = ...,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int] = ...,
        *,
        memory: Memory | None = ...,
        max_new_tokens: int = ...,
        stream: bool,
        **options: Any,
    ) -> str | Iterator[str]: ...
    def generate(
        self,
        prompt: str | Sequence[int] = "",
        *,
        memory: Memory | None = None,
        max_new_tokens: int = 64,
        stream: bool = False,
        **options: Any,
    ) -> str | list[str] | Iterator[str]:
        """Continue `prompt` as if the text of `memory` were before it; without memory, plain language modelling.

        Args:
            prompt: what to continue, as text or as token ids, e.g. those of a chat template around the memory
                (`inference.prompting.split_around`); may be empty when there is a memory.
            memory: the compressed context.
            max_new_tokens: at most so many tokens.
            stream: return an iterator over parts of the text instead of one string.
            options: of transformers' `generate`, those that hold with a memory (do_sample, temperature, top_p,
                num_beams, repetition_penalty, ...; all are in `inference.options.GenerationOptions`). What is left out
                is neutral: greedy, without penalties, whatever the LM's generation_config says; of that only the end
                tokens are used. Options that look at tokens (repetition_penalty, no_repeat_ngram_size, stop_strings)
                look at those of the answer. With num_return_sequences the result is a list of so many strings.

        Raises:
            InputError: neither prompt nor memory, max_new_tokens below 1, more positions than the model has, or an
                option that is unknown, out of range or refused.
            MismatchError: the memory was made by another model.
            ModelError: the LM's output is not a number.
        """
        return generation.generate(self, prompt, memory, max_new_tokens, stream, options)

    def score(self, text: str, *, memory: Memory | None = None, prompt: str | Sequence[int] = "") -> float:
        """Mean negative log-likelihood of `text` after `memory` and `prompt`, in nats per token of this tokenizer.

        Without memory and prompt, the first token is counted only if the tokenizer has a start (or end-of-text) token
        to predict it from.

        Raises:
            InputError: no token to score.
            MismatchError: the memory was made by another model.
        """
        return scoring.score(self, text, memory, prompt)

    @renamed_keywords(tau="recent_window")
    def stream(
        self,
        recent_window: int = 128,
        ratio: float | None = None,
        max_nuggets: int | None = None,
        *,
        chunk: int | None = None,
        memory: Memory | None = None,
    ) -> Stream:
        """Read text of any length: recent tokens uncompressed, older ones as nuggets (Nugget2D, section 3.3).

        Args:
            recent_window: uncompressed tokens, at least, once so many were read (tau in the paper); up to `chunk` more
                are uncompressed until they are compressed together.
            ratio: tokens for each nugget, at least 1; None takes the model's threshold (`calibrate`), or 10 without
                one.
            max_nuggets: nuggets held at most; the oldest are evicted first. None keeps all.
            chunk: tokens compressed at a time, 1 to `config.window`, which None takes. With short chunks a small cache
                stays nearly full, but every chunk costs an encoder pass and a new sink, and a nugget encodes its own
                chunk only. Every chunk has at least one nugget, so one shorter than the ratio lowers it.
            memory: the compressed text before.

        Raises:
            InputError: recent_window below 1 or too large for `config.context`, a ratio or max_nuggets below 1, a chunk
                out of range, a memory of another method than nugget2d.
            MismatchError: the memory was made by another model.
            ModelError: there is no trained compressor, or this model's keys cannot be moved to other positions.
        """
        return Stream(self, recent_window, ratio, max_nuggets, chunk, memory)

    def calibrate(self, text: str, ratio: float) -> None:
        """Set the score threshold by which streams select nuggets, about one in `ratio` tokens of `text`.

        It becomes part of `config` and is saved with the model.

        Raises:
            InputError: the model's selection does not go by scores, the text is shorter than `config.window` tokens, a
                ratio below 1.
        """
        value = calibrate_threshold(self, self.ids(text)[0], ratio)
        self.config = self.config.model_copy(update={"threshold": Threshold(ratio=ratio, value=value)})
