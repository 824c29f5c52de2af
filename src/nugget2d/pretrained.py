"""Model folders: bundled, local or on a hub.

nugget2d.json          NuggetConfig
base/                  a transformers folder: config and weights
tokenizer/             apart from base/: beside a config, transformers may swap in the class of that model type
nugget2d.safetensors   scorer, soft prompts, flag, and the encoder copy or both adapters
"""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.config import NuggetConfig
from nugget2d.errors import ModelError, OutputError
from nugget2d.network import Network

CONFIG_FILE, WEIGHTS_FILE, BASE_FOLDER, TOKENIZER_FOLDER = "nugget2d.json", "nugget2d.safetensors", "base", "tokenizer"

N = TypeVar("N", bound=Network)


def bundled_models() -> list[str]:
    """Names of the models shipped inside the package."""
    root = resources.files("nugget2d") / "models"
    return sorted(entry.name for entry in root.iterdir() if (entry / CONFIG_FILE).is_file()) if root.is_dir() else []


def resolve(name: str | Path) -> Path:
    """The folder of a bundled model, a local folder, or a hub id (downloaded).

    Raises:
        ModelError: none of these exists.
    """
    if str(name) in bundled_models():
        return Path(str(resources.files("nugget2d") / "models" / str(name)))
    folder = Path(name)
    try:
        if (folder / CONFIG_FILE).is_file():
            return folder
        if folder.is_dir():
            raise ModelError(f"{folder} has no {CONFIG_FILE}; is it a base model? wrap it with Nugget2D.from_base")
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ModelError(f"cannot look up model {str(name)[:80]!r}: {error.strerror}") from error
    if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
        try:
            return Path(snapshot_download(str(name)))
        except Exception as error:  # whatever the hub client raises: offline, unknown, gated
            raise ModelError(f"cannot get model {name!r} from the hub: {error}") from error
    raise ModelError(
        f"unknown model {str(name)!r}: not bundled ({', '.join(bundled_models()) or 'none'}), "
        "not a folder, not a hub id"
    )


def load_base(
    base: Path | str, tokenizer_folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM from a folder or hub id, in float32 on the CPU, and its tokenizer from there or its own folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        auto = cast(Any, AutoModelForCausalLM)
        lm, report = auto.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or base)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load base model {str(base)!r}: {error}") from error
    if report["missing_keys"]:
        # transformers would go on with random weights
        raise ModelError(f"base model {str(base)!r} is incomplete: no weights for {sorted(report['missing_keys'])[:3]}")
    return lm, tokenizer


def load(make: Callable[[PreTrainedModel, PreTrainedTokenizerBase, NuggetConfig], N], name: str | Path) -> N:
    """What `make` makes of a folder's LM, tokenizer and configuration, with the folder's weights.

    See `Nugget2D.from_pretrained`.

    Raises:
        ModelError: unknown, incomplete or inconsistent.
    """
    folder = resolve(name)
    try:
        config = NuggetConfig.model_validate_json((folder / CONFIG_FILE).read_text())
        own = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValidationError, SafetensorError) as error:
        raise ModelError(f"model folder {folder} is incomplete or damaged: {error}") from error
    lm, tokenizer = load_base(folder / BASE_FOLDER, folder / TOKENIZER_FOLDER)
    model = make(lm, tokenizer, config)
    try:
        missing, unexpected = model.load_state_dict({k: v.float() for k, v in own.items()}, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its configuration: {error}") from error
    wanted = set(_own_state(model))
    if unexpected or wanted & set(missing):
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its configuration: {unexpected or missing}")
    return model


def save(model: Network, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """See `Nugget2D.save_pretrained`.

    Raises:
        OutputError: `folder` is a file, cannot be made, or the disk is full.
    """
    folder = Path(folder)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # tied weights stay one tensor, so that they are written once
        if tensor.data_ptr() not in kept:
            kept[tensor.data_ptr()] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        return kept[tensor.data_ptr()]

    own = _own_state(model)
    base = {k.removeprefix(_LM): keep(v) for k, v in model.state_dict().items() if k.startswith(_LM) and k not in own}
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in base.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: keep(tensor) for name, tensor in own.items()}, folder / WEIGHTS_FILE)
        model.lm.save_pretrained(folder / BASE_FOLDER, state_dict=base)
        model.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        (folder / CONFIG_FILE).write_text(json.dumps(model.config.model_dump(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write model to {folder}: {error}") from error


_LM = "parameters_by_role.lm."
_SHARED = "parameters_by_role.encoder."


def _own_state(model: Network) -> dict[str, Tensor]:
    """Everything that is not the base: scorer, prompts, flag, encoder copy (without shared embeddings), adapters."""
    shared = {id(p) for p in model.lm.get_input_embeddings().parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in shared}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if (not name.startswith(_LM) or ".lora_" in name) and not (name.startswith(_SHARED) and name in names)
    }
