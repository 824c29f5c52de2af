"""Checks of a machine and a model for `nugget2d doctor`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from math import ceil
from platform import python_version

import torch
from transformers import DynamicCache

from nugget2d.errors import ModelError, OutputError
from nugget2d.memory.states import States, StoreDtype
from nugget2d.methods.base import native_dtype
from nugget2d.model import Nugget2D
from nugget2d.modeling.cache import cached_states, gather_nuggets
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.precision import has_fast_bfloat16

RATIOS = (10, 20)
# How much reading nuggets may differ from one masked pass, relative to the largest logit: rounding of float32.
_TOLERANCE = 1e-3
_PLAIN = "a plain LM: compresses by training-free methods; `nugget2d train` makes a compressor for it"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was checked.
        value: the result.
        remedy: what to do about it; None if nothing.
        fatal: the model cannot be used.
    """

    name: str
    value: str
    remedy: str | None = None
    fatal: bool = False


@dataclass(frozen=True)
class Size:
    """Bytes that a context takes: all its keys and values, and its nuggets as (ratio, dtype) -> bytes."""

    tokens: int
    full: int
    nuggets: dict[tuple[int, str], int]


@dataclass(frozen=True)
class Report:
    """Everything that `examine` found; `sizes` is empty when the model cannot be used."""

    machine: tuple[Finding, ...]
    model: tuple[Finding, ...]
    sizes: tuple[Size, ...]

    @property
    def usable(self) -> bool:
        """Whether the model can be used here."""
        return not any(finding.fatal for finding in self.model)


def examine(name: str, tokens: Sequence[int]) -> Report:
    """Check this machine and a model; a model that cannot be used is a finding, not an error.

    Args:
        name: as for `Nugget2D.from_pretrained`.
        tokens: lengths of contexts whose bytes are reported.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = Nugget2D.from_pretrained(name, device=device)
        findings = _model_findings(model)
        sizes = tuple(_sizes(model, tokens))
    except (ModelError, OutputError) as error:
        findings, sizes = (Finding("model", name, str(error), fatal=True),), ()
    return Report(_machine_findings(), findings, sizes)


def reading_error(model: Nugget2D) -> float:
    """The difference between reading a few nuggets and one pass in which all other tokens are masked.

    Relative to the largest logit: zero but for rounding, if attention, positions and cache support nuggets.
    """
    count = min(32, model.config.window // 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.lm.config.vocab_size, (1, count + count // 2), generator=generator).to(model.device)
    index = torch.arange(1, count, 3, device=model.device)[None]
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    lowest = torch.finfo(model.lm.dtype).min
    mask = torch.full((ids.shape[1],) * 2, lowest, dtype=model.lm.dtype, device=model.device).triu(1)
    hidden = torch.ones(count, dtype=torch.bool, device=model.device)
    hidden[index[0]] = False
    mask[count:, :count].masked_fill_(hidden, lowest)
    cache = DynamicCache(config=model.lm.config)
    with torch.no_grad(), model.parameters_by_role.role("base") as lm:
        text = ids[:, :count]
        lm(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            position_ids=positions[:, :count],
            **as_cache(lm, cache),
            use_cache=True,
        )
        nuggets = gather_nuggets(cache, index, torch.ones_like(index, dtype=torch.bool))
        read = model.decode(nuggets, ids[:, count:], prompt=None, start=count).float()
        wanted = lm(input_ids=ids, attention_mask=mask[None, None], position_ids=positions).logits[:, count:].float()
    return float((read - wanted).abs().max() / wanted.abs().max())


def _model_findings(model: Nugget2D) -> tuple[Finding, ...]:
    config, lm = model.config, model.lm
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        Finding("model", config.name, None if model.has_compressor else _PLAIN),
        Finding("architecture", f"{type(lm).__name__}, {lm.config.num_hidden_layers} layers"),
        Finding("parameters", f"{parameters:,} as {str(lm.dtype).removeprefix('torch.')}, adapters {config.adapters}"),
        Finding("device", str(model.device)),
        Finding("attention", lm.config._attn_implementation),
        _reading(model),
        Finding("segments", f"up to {config.window:,} tokens, joined to contexts of {config.context:,}"),
        _joining(model),
        _positions(model),
    )


def _reading(model: Nugget2D) -> Finding:
    """Whether reading nuggets equals reading the tokens; NaN does not."""
    error = reading_error(model)
    if error < _TOLERANCE:
        return Finding("reads nuggets exactly", "yes")
    reason = "its attention depends on cache indices, or its weights are damaged: use another model"
    return Finding("reads nuggets exactly", f"no: off by {error:.0e} of the largest logit", reason, fatal=True)


def _joining(model: Nugget2D) -> Finding:
    """Whether a text of several segments can be continued."""
    try:
        _ = model.rotation
    except ModelError:
        return Finding(
            "joining segments",
            "to reconstruct only: learned positions cannot be moved",
            f"continue texts of up to {model.config.window:,} tokens",
        )
    return Finding("joining segments", "yes")


def _positions(model: Nugget2D) -> Finding:
    limit = model.max_positions
    if limit is None:
        return Finding("positions", "no limit")
    return Finding("positions", f"{limit:,}", f"memory, prompt and answer together: at most {limit:,} tokens")


def _sizes(model: Nugget2D, tokens: Sequence[int]) -> list[Size]:
    """Measured on the cache of one token, as all tokens take the same."""
    with torch.no_grad():
        keys, values = cached_states(model.encoder_states(model.embed(model.ids("nugget")[:, :1])))
    kept: tuple[StoreDtype, ...] = (native_dtype(model), "int8")
    states = [layer[0].cpu() for layer in (*keys, *values)]
    one = {dtype: sum(States.store(layer, dtype).nbytes for layer in states) for dtype in kept}
    full = sum(layer.nbytes for layer in states)
    return [
        Size(
            count,
            count * full,
            {(ratio, dtype): ceil(count / ratio) * nbytes for ratio in RATIOS for dtype, nbytes in one.items()},
        )
        for count in tokens
    ]


def _machine_findings() -> tuple[Finding, ...]:
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    return (
        Finding("python", python_version()),
        Finding("libraries", ", ".join(versions)),
        _device(),
        Finding("dtypes", _dtypes()),
        _threads(),
        _extra("BLEU and plots (optional)", ("sacrebleu", "matplotlib"), "nugget2d[bench]", every=True),
        _extra("GGUF files (optional)", ("gguf",), "nugget2d[gguf]", every=True),
        _extra("8- and 4-bit bases (optional)", ("bitsandbytes", "torchao"), "bitsandbytes", every=False),
    )


def _device() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    value = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    if torch.version.cuda is None:
        return Finding("device", value)
    return Finding("device", value, "torch is built for CUDA but sees no GPU: check the driver (nvidia-smi)")


def _dtypes() -> str:
    if has_fast_bfloat16("cuda" if torch.cuda.is_available() else "cpu"):
        return "float32, bfloat16"
    return "float32 (bfloat16 is emulated here, and slower)"


def _threads() -> Finding:
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = f"{threads} on {cores} cores"
    if threads <= cores:
        return Finding("threads", value)
    return Finding("threads", value, f"threads wait for each other: set OMP_NUM_THREADS={cores} or less")


def _extra(name: str, modules: Sequence[str], package: str, *, every: bool) -> Finding:
    found = [module for module in modules if util.find_spec(module) is not None]
    enough = len(found) == len(modules) if every else bool(found)
    return Finding(name, ", ".join(found) or "not installed", None if enough else f"pip install '{package}'")
