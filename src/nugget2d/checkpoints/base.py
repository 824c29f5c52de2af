"""Loading a plain causal LM from a folder, the hub or a GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from nugget2d.checkpoints.gguf import converted, is_gguf
from nugget2d.checkpoints.layout import CONFIG_FILE, HUB_FILE, is_quantized
from nugget2d.checkpoints.resolve import bundled_models, exists, hub_file, on_this_machine
from nugget2d.errors import ModelError
from nugget2d.modeling.adapters import ADAPTER_FILE, adapter_error
from nugget2d.modeling.digest_cache import LoadedWeights, tensor_versions, weight_files

DeviceMap = str | dict[str, int | str | torch.device]

# A config may name Python files (auto_map). Without this transformers asks on standard input whether to run them.
NO_CODE = {"trust_remote_code": False}
_UNUSABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError)


@dataclass(frozen=True)
class Base:
    """A causal LM, its tokenizer, and which files it came from, if those are known and its weights are theirs."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    loaded: LoadedWeights | None


def load_base(
    place: Path | str,
    tokenizer_folder: Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | str = torch.float32,
    device_map: DeviceMap | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
) -> Base:
    """A causal LM from a folder, hub id or .gguf file, and its tokenizer from there or its own folder.

    It is on the CPU, unless a device map or its quantization puts it elsewhere. For the options see
    `Nugget2D.from_pretrained`.

    Raises:
        ModelError: it cannot be loaded, or it is a peft adapter, or a library that it needs is not installed.
        OutputError: a .gguf file, and the cache folder cannot be written.
    """
    if str(place) in bundled_models() or exists(Path(place, CONFIG_FILE)):
        raise ModelError(f"{str(place)!r} is a compressor, not a base model; load it with Nugget2D.from_pretrained")
    here = on_this_machine(place, revision=revision) if local_files_only else place
    source = str(converted(Path(here)) if is_gguf(here) else here)
    hub: dict[str, Any] = {"revision": revision, "token": token}
    is_folder = exists(source)
    adapter = exists(Path(source, ADAPTER_FILE)) if is_folder else hub_file(source, ADAPTER_FILE, **hub) is not None
    if adapter:
        raise adapter_error(place)
    # before loading: files that change meanwhile must not count as what was loaded
    files = weight_files(Path(source)) if is_folder else ()
    options = {"device_map": device_map, "quantization_config": quantization_config}
    try:
        _require_no_kernel(AutoConfig.from_pretrained(source, **NO_CODE, **hub), place)
        auto = cast(Any, AutoModelForCausalLM)
        given = {name: value for name, value in options.items() if value is not None}
        lm, report = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **NO_CODE, **hub, **given)
    except _UNUSABLE as error:
        raise _unusable("base model", place, error) from error
    tokenizer = load_tokenizer(tokenizer_folder or source, **hub)
    if report["missing_keys"]:
        # transformers would continue with random weights
        missing = sorted(report["missing_keys"])[:3]
        raise ModelError(f"base model {str(place)!r} is incomplete: no weights for {missing}")
    if not is_folder:
        config = try_to_load_from_cache(source, HUB_FILE, revision=revision)
        source = str(Path(config).parent) if isinstance(config, str) else ""
        files = weight_files(Path(source)) if source else ()
    lm.config.name_or_path = str(place)
    loaded = LoadedWeights(str(Path(source).absolute()), files, tensor_versions(lm.state_dict(keep_vars=True)))
    return Base(lm, tokenizer, loaded if files and not is_quantized(lm) else None)


def load_tokenizer(place: Path | str, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; `hub` are options of `from_pretrained`.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(place, **NO_CODE, **hub)
    except _UNUSABLE as error:
        raise _unusable("tokenizer", place, error) from error


def _require_no_kernel(config: PreTrainedConfig, place: Path | str) -> None:
    """Refuse a config that names attention kernels of the hub: transformers would fetch their code and run it."""
    named = {str(part._attn_implementation) for part in (config, config.get_text_config())}
    if any("/" in name for name in named):
        raise ModelError(
            f"base model {str(place)!r} names attention code of the hub ({', '.join(sorted(named))}), which is never "
            "fetched; take attn_implementation out of its config.json"
        )


def _unusable(what: str, place: Path | str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):  # the remedy of transformers is none here
        return ModelError(
            f"{what} {str(place)!r} brings its own code (auto_map), which is never run; take a model of an "
            "architecture that transformers has, without auto_map"
        )
    if isinstance(error, UnpicklingError):
        return ModelError(
            f"{what} {str(place)!r} has other pickled objects in its weights than tensors, which are never unpickled; "
            "save it as safetensors where it comes from"
        )
    return ModelError(f"cannot load {what} {str(place)!r}: {error}")
