"""The schema of a recipe: everything a training run depends on, in one YAML file.

Paths are relative to the recipe's own folder. Unknown keys, wrong types and impossible values are refused by name.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AliasChoices, ConfigDict, Field, ValidationError, field_validator, model_validator

from nugget2d.config import Adapters, Frozen, MemoryKind, SelectionName
from nugget2d.errors import RecipeError
from nugget2d.streaming.layout import Layout


class Source(Frozen):
    """Text to read: a .txt, .jsonl or .jsonl.xz file (or glob); `where` keeps records with these field values."""

    path: str
    where: dict[str, str] = Field(default_factory=dict)
    max_chars: int | None = Field(default=None, ge=1)


class DataConfig(Frozen):
    """What to train on and what to hold out; `max_tokens` bounds the packed training ids."""

    train: tuple[Source, ...] = Field(min_length=1)
    held_out: tuple[Source, ...] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)


class TokenizerConfig(Frozen):
    """A byte-level BPE trained on the first `sample_chars` characters of each training source."""

    vocab_size: int = Field(ge=300)
    sample_chars: int = Field(default=20_000_000, ge=1)


class ShapeConfig(Frozen):
    """The small Llama-shaped LM; attention_bias gives every head a content-free way to address positions."""

    hidden_size: int
    intermediate_size: int
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    rope_theta: float = Field(default=10_000.0, gt=0)
    attention_bias: bool = True
    max_position_embeddings: int = 32_768

    @model_validator(mode="after")
    def _divides(self) -> "ShapeConfig":
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError("hidden_size must be an even multiple of num_heads (rotary embeddings pair dimensions)")
        return self


class OptimConfig(Frozen):
    """AdamW (fused on CUDA): linear warm-up, constant, then linear decay to zero over the last `decay` of the run.

    `scorer_lr: 0` freezes the scorer as it was drawn: a control for what learning to select is worth.
    """

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    decay: float = Field(default=0.4, ge=0, le=1)
    scorer_lr: float = Field(3e-4, ge=0)


class Stage(Frozen):
    """What both stages share.

    Give exactly one budget: `tokens`, or `minutes` for the same recipe on machines of different speed (the learning
    rate then follows the clock, so only a budget in tokens makes the very same curve again). A step takes
    `batch_tokens * accumulate` tokens: `accumulate` micro-batches, which several processes share out evenly.
    """

    tokens: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    batch_tokens: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    optim: OptimConfig
    evaluate_every: int = Field(default=500, ge=1)
    evaluate_windows: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> "Stage":
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("give exactly one budget: tokens or minutes")
        return self


class PretrainStage(Stage):
    """Plain language modelling on windows of `window` tokens."""

    window: int = Field(default=128, ge=8)


# how likely a value is drawn, beside the others
Weight = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=8)]
Ratio = Annotated[float, Field(ge=1)]

Objective = Literal["reconstruct", "uniform", "continue", "distill", "stream", "lm"]
FROZEN = "a frozen base cannot learn plain LM: leave `lm` out of the objectives, or use copies"
# a compressor that is trained further has settled these
SETTLED = ("base", "adapters", "lora_rank", "scorer_layer", "flag")


class Phase(Frozen):
    """A part of the run, from the point `from` (0 to 1) on: what each step draws, as value -> weight.

    Attributes:
        objectives: "reconstruct" is autoencoding of text, "uniform" of tokens drawn evenly from the vocabulary (text
            shows rare tokens too seldom), "continue" predicts what follows a memory, "distill" does so as the LM would
            after the full context, "stream" reads as `Nugget2D.stream` does, "lm" is plain language modelling.
        windows: segment lengths in tokens; streams have chunks of their own (`StreamConfig`).
        selections: policies; None takes the stage's own `selection` alone.
        segments: plain LM and the contexts of continuation and distillation are 1 .. `segments` windows long; a context
            is compressed window by window and joined.
    """

    start: float = Field(default=0.0, ge=0, lt=1, alias="from")
    objectives: dict[Objective, Weight] = Field(min_length=1)
    windows: dict[Length, Weight] = Field(min_length=1)
    selections: dict[SelectionName, Weight] | None = Field(default=None, min_length=1)
    segments: int = Field(default=1, ge=1)


Bounds = tuple[Ratio, Ratio]


class RatioConfig(Frozen):
    """Ratios are log-uniform within bounds that move from `start` to `end` between two points of the run."""

    start: Bounds = (1.0, 8.0)
    end: Bounds = (1.0, 50.0)
    moves: tuple[float, float] = (0.0, 0.4)

    @model_validator(mode="after")
    def _ordered(self) -> "RatioConfig":
        for key in ("start", "end", "moves"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} must be [low, high], got [{low:g}, {high:g}]")
        return self


class StreamConfig(Frozen):
    """The shapes of streams in training; every step draws one of each, value -> weight.

    `tau` and `reach` are former names of `recent_window` and `visible_segments`, still read.

    Attributes:
        recent_window: uncompressed tokens before a chunk (tau in the paper).
        chunk: tokens that leave the window at a time, to be compressed.
        ratio: tokens of a nugget; None takes the stage's `ratios`.
        visible_segments: of how many chunks the nuggets are seen, as by a stream with `max_nuggets`; None shows all.
        context: about so many tokens become nuggets: as many chunks as it holds.
    """

    recent_window: dict[Count, Weight] = Field(
        default={128: 1.0}, min_length=1, validation_alias=AliasChoices("recent_window", "tau")
    )
    chunk: dict[Length, Weight] = Field(default={128: 1.0}, min_length=1)
    ratio: dict[Ratio, Weight] | None = Field(default=None, min_length=1)
    visible_segments: dict[Count, Weight] | None = Field(
        default=None, min_length=1, validation_alias=AliasChoices("visible_segments", "reach")
    )
    context: int = Field(default=1024, ge=8)

    @model_validator(mode="after")
    def _fits(self) -> "StreamConfig":
        if max(self.chunk) > self.context:
            raise ValueError(f"a chunk of {max(self.chunk)} tokens does not fit into a context of {self.context}")
        return self

    def layout(self, recent_window: int, chunk: int, visible_segments: int | None = None) -> Layout:
        """The text of one step."""
        return Layout(recent_window, chunk, self.context // chunk + 1, visible_segments)

    @property
    def longest(self) -> int:
        """Tokens of the longest text, and its sink token."""
        return 1 + max(self.layout(recent, chunk).length for recent in self.recent_window for chunk in self.chunk)


class PluginSpec(Frozen):
    """A plugin (plugins.py): the class by its import path, "package.module:Class"; all other keys are its options."""

    model_config = ConfigDict(extra="allow")

    use: str

    @field_validator("use")
    @classmethod
    def _names_a_class(cls, use: str) -> str:
        module, _, name = use.partition(":")
        if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError('give the import path of a class, "package.module:Class"')
        return use

    @property
    def options(self) -> dict[str, Any]:
        """What the class is made with."""
        return dict(self.model_extra or {})


class CompressStage(Stage):
    """The compressor: autoencoding, continuation and plain LM, mixed; ratios and lengths sampled.

    Attributes:
        base: folder or hub id of the LM; None takes the recipe's own, pre-trained or from scratch.
        init: a trained compressor to train further (bundled name, folder or hub id); it brings LM, tokenizer and all
            that `SETTLED` names.
        memory: what a text becomes: nuggets, or the baseline "pooled" (nugget2d.pooled), which a compressor of nuggets
            can be trained further as.
        flag: add a learned vector to the input embedding of nuggets.
        phases: what is trained when; the first starts at 0.
        mixed_ratios: every row of a micro-batch draws its own ratio (not for streams); else a step draws one for all.
        target: tokens to predict in continuation.
        streams: what objective "stream" reads.
        plugins: additions to the model or its losses, in order (plugins.py).
        checkpoint_activations: run each layer again in the backward pass instead of keeping what it computed.
        offload_activations: keep what the backward pass needs in the host's memory.
    """

    base: str | None = None
    init: str | None = None
    adapters: Adapters = "copies"
    lora_rank: int = Field(default=32, ge=1)
    scorer_layer: int = Field(default=1, ge=0)
    selection: SelectionName = "even"
    memory: MemoryKind = "nuggets"
    flag: bool = True
    phases: tuple[Phase, ...] = Field(min_length=1)
    ratios: RatioConfig = RatioConfig()
    mixed_ratios: bool = False
    target: int = Field(default=64, ge=1)
    streams: StreamConfig = StreamConfig()
    plugins: tuple[PluginSpec, ...] = ()
    checkpoint_activations: bool = False
    offload_activations: bool = False

    @model_validator(mode="after")
    def _learnable(self) -> "CompressStage":
        starts = [phase.start for phase in self.phases]
        if starts[0] or starts != sorted(set(starts)):
            raise ValueError(f"`phases` must begin with `from: 0` and go up, got {starts}")
        if self.init is not None and (given := [key for key in SETTLED if key in self.model_fields_set]):
            raise ValueError(f"`init` brings its own {', '.join(given)}: remove {'it' if len(given) == 1 else 'them'}")
        if self.mixed_ratios and self.trains_streams:
            raise ValueError("`stream` reads rows of one ratio: leave it out of the objectives, or `mixed_ratios`")
        if self.init is None and self.adapters == "lora" and self.trains_lm:
            raise ValueError(FROZEN)
        return self

    @property
    def trains_lm(self) -> bool:
        """Whether any phase has plain LM."""
        return any("lm" in phase.objectives for phase in self.phases)

    @property
    def trains_streams(self) -> bool:
        """Whether any phase has streams."""
        return any("stream" in phase.objectives for phase in self.phases)

    @property
    def longest_window(self) -> int:
        """The longest segment that any phase trains, in tokens."""
        chunks = max(self.streams.chunk) if self.trains_streams else 0
        return max(chunks, *(max(phase.windows) for phase in self.phases))

    @property
    def longest_context(self) -> int:
        """The longest text that plain LM, continuation or a stream sees, in tokens."""
        streamed = self.streams.longest if self.trains_streams else 0
        return max(streamed, *(max(phase.windows) * phase.segments for phase in self.phases))

    def phase(self, progress: float) -> Phase:
        """The phase at a point of the run."""
        return [phase for phase in self.phases if phase.start <= progress][-1]


class Recipe(Frozen):
    """One run: data, an LM from scratch (or a base), and one or two stages.

    `parallel` says what several processes (torchrun) do with the weights: "ddp" keeps all in each, "fsdp" shards them.
    """

    name: str
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)
    out: str
    data: DataConfig
    tokenizer: TokenizerConfig | None = None
    model: ShapeConfig | None = None
    pretrain: PretrainStage | None = None
    compress: CompressStage | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    save_minutes: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        if self.pretrain is None and self.compress is None:
            raise ValueError("nothing to do: give a `pretrain` or a `compress` stage")
        brought = self.compress is not None and (self.compress.base or self.compress.init)
        if brought and (self.pretrain or self.model or self.tokenizer):
            raise ValueError(f"{brought!r} brings its own LM: remove `pretrain`, `model` and `tokenizer`")
        if not brought and (self.tokenizer is None or self.model is None):
            raise ValueError("give `tokenizer` and `model` for an LM from scratch, `compress.base` or `compress.init`")
        return self


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: unreadable, not YAML, or a wrong key or value, named with the remedy.
    """
    return validated(Recipe, read_mapping(path), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        RecipeError: unreadable, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except RecursionError as error:
        raise RecipeError(f"{path} is nested too deeply; see recipes/smoke.yaml") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping of keys; see recipes/smoke.yaml")
    return content


S = TypeVar("S", bound=Frozen)


def validated(schema: type[S], content: dict[str, Any], where: str) -> S:
    """`content` as a record of `schema`; `where` begins the message of an error.

    Raises:
        RecipeError: a wrong key or value, named with the remedy.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from error


def _explain(item: Any) -> str:
    """One validation error as 'key: what is wrong, and the remedy'."""
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"unknown key `{key}`; remove it or correct its spelling"
    if item["type"] == "missing":
        return f"missing key `{key}`; add it"
    message = item["msg"].removeprefix("Value error, ")
    return f"`{key}` is {item['input']!r:.60}: {message}" if key else message
