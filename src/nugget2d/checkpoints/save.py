"""Writing a model folder, and pushing it to the hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from nugget2d.checkpoints.card import write_card
from nugget2d.checkpoints.layout import (
    BASE_FILE,
    BASE_FOLDER,
    CONFIG_FILE,
    HUB_FILE,
    LM,
    MODEL_TYPE,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    BaseRecord,
    base_state,
    is_quantized,
    own_state,
)
from nugget2d.checkpoints.resolve import is_hub_id
from nugget2d.errors import InputError, OutputError
from nugget2d.modeling.adapters import is_adapter, write_adapters
from nugget2d.modeling.network import Network


def save(
    model: Network,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    base: bool = True,
    metrics: Mapping[str, object] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """See `Nugget2D.save_pretrained`; `state` are all weights, where the model itself has parts of them only.

    Raises:
        InputError: the base cannot be left out, or cannot be written.
        OutputError: `folder` is a file, cannot be made, or the disk is full.
    """
    folder, lm = Path(folder), model.lm
    if base and is_quantized(lm):
        raise InputError("a quantized base cannot be written; save the adapters alone with base=False")
    record = None if base else _record_of(model)
    weights = _Weights(dtype)
    state = model.state_dict() if state is None else state
    lm_state = {} if record else {name: weights.keep(tensor) for name, tensor in base_state(state).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not model.has_compressor:
            _save_plain(model, folder, lm_state)
            return
        own = {name: weights.keep(tensor) for name, tensor in own_state(model, state).items()}
        adapters = {name.removeprefix(LM): own.pop(name) for name in list(own) if is_adapter(name)}
        save_file(own, folder / WEIGHTS_FILE)
        place = (lm.config.name_or_path or None) if record is None else record.name
        if adapters:
            write_adapters(folder, cast(Any, lm).peft_config, adapters, place)
        if record is None:
            _save_lm(lm, folder / BASE_FOLDER, lm_state)
            (folder / BASE_FILE).unlink(missing_ok=True)
        else:
            (folder / BASE_FILE).write_text(record.model_dump_json(indent=2) + "\n")
        model.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        (folder / CONFIG_FILE).write_text(json.dumps(model.config.model_dump(), indent=2) + "\n")
        (folder / HUB_FILE).write_text(json.dumps({"model_type": MODEL_TYPE}, indent=2) + "\n")
        write_card(folder, model.config, place if place and is_hub_id(place) else None, metrics or {})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write model to {folder}: {error}") from error


def push(model: Network, repo_id: str, *, base: bool, private: bool | None, token: str | None) -> str:
    """See `Nugget2D.push_to_hub`.

    Raises:
        InputError: the base cannot be left out, or cannot be written.
        OutputError: the hub refused, or cannot be reached.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(model, folder, base=base)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload Nugget2D"))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise OutputError(f"cannot push to {repo_id!r}: {error}") from error


class _Weights:
    """Converts weights for writing; tied weights stay one tensor, and are written once."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._kept: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in self._kept:
            own = tensor.detach().to("cpu", self._dtype or tensor.dtype).contiguous()
            self._kept[tensor.data_ptr()] = own
        return self._kept[tensor.data_ptr()]


def _save_plain(model: Network, folder: Path, state: dict[str, Tensor]) -> None:
    """An ordinary transformers folder."""
    if (folder / CONFIG_FILE).exists():
        raise OutputError(f"{folder} holds a compressor, which a plain LM would not replace; choose another folder")
    _save_lm(model.lm, folder, state)
    model.tokenizer.save_pretrained(folder)


def _save_lm(lm: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    try:
        lm.save_pretrained(folder, state_dict=state)
    except ValueError as error:
        raise InputError(
            f"transformers does not write this {type(lm).__name__}: {error}; correct its config or generation_config"
        ) from error


def _record_of(model: Network) -> BaseRecord:
    if not model.has_compressor:
        raise InputError("a plain language model is nothing but its base; save with base=True")
    if model.config.adapters != "lora":
        raise InputError("the base cannot be left out: with adapters='copies' it is the decoder; save with base=True")
    name = model.lm.config.name_or_path
    if not name:
        raise InputError(
            "this base was not loaded from a folder or hub id, so nothing could find it again; save with base=True"
        )
    # a folder or file by its full path: adapters are loaded from anywhere
    name = str(Path(name).resolve()) if Path(name).exists() else name
    return BaseRecord(name=name, digest=None if is_quantized(model.lm) else model.fingerprint.model, scheme=2)
