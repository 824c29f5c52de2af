"""Model folders: bundled, local or on a hub.

nugget2d.json          NuggetConfig
base/                  a transformers folder: config and weights, or else
base.json              where the base is, and a digest of its weights
tokenizer/             apart from base/: beside a config, transformers may swap in the class of that model type
nugget2d.safetensors   scorer, soft prompts, flag, and the encoder copy
encoder/, decoder/     the adapters, in peft's format (adapters.py)
config.json            says to transformers what the folder is (integrations/transformers.py)
README.md              the model card (card.py)
"""

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from nugget2d.checkpoints.card import write_card
from nugget2d.config import Frozen, NuggetConfig
from nugget2d.errors import InputError, ModelError, OutputError
from nugget2d.modeling.adapters import HALVES, read_adapters, write_adapters
from nugget2d.modeling.digest import fingerprint
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import ADAPTERS

# what transformers looks for in a folder
HUB_FILE, MODEL_TYPE = "config.json", "nugget2d"
CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "nugget2d.json", "nugget2d.safetensors", "base.json"
BASE_FOLDER, TOKENIZER_FOLDER = "base", "tokenizer"

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
    if is_hub_id(str(name)):
        try:
            return Path(snapshot_download(str(name)))
        except Exception as error:  # whatever the hub client raises: offline, unknown, gated
            raise ModelError(f"cannot get model {name!r} from the hub: {error}") from error
    raise ModelError(
        f"unknown model {str(name)!r}: not bundled ({', '.join(bundled_models()) or 'none'}), "
        "not a folder, not a hub id"
    )


def load_base(
    base: Path | str,
    tokenizer_folder: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    quantization_config: QuantizationConfigMixin | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM from a folder or hub id, and its tokenizer from there or its own folder.

    It is on the CPU, unless its quantization puts it elsewhere.

    Raises:
        ModelError: it cannot be loaded, or the library that quantizes is not installed.
    """
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        auto = cast(Any, AutoModelForCausalLM)
        lm, report = auto.from_pretrained(base, dtype=dtype, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or base)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"cannot load base model {str(base)!r}: {error}") from error
    if report["missing_keys"]:
        # transformers would go on with random weights
        raise ModelError(f"base model {str(base)!r} is incomplete: no weights for {sorted(report['missing_keys'])[:3]}")
    return lm, tokenizer


def load(
    make: Callable[[PreTrainedModel, PreTrainedTokenizerBase, NuggetConfig], N],
    name: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    quantization_config: QuantizationConfigMixin | None = None,
) -> N:
    """What `make` makes of a folder's LM, tokenizer and configuration, with the folder's weights.

    See `Nugget2D.from_pretrained`.

    Raises:
        ModelError: unknown, incomplete or inconsistent; the base is not the one that the adapters were trained on.
        InputError: a `base` for a folder that has its own.
    """
    folder = resolve(name)
    try:
        config = NuggetConfig.model_validate_json((folder / CONFIG_FILE).read_text())
        own = load_file(folder / WEIGHTS_FILE)
        if config.adapters == "lora":
            own |= {_LM + name: tensor for name, tensor in read_adapters(folder, ADAPTERS).items()}
        record = _BaseRecord.model_validate_json(path.read_text()) if (path := folder / BASE_FILE).is_file() else None
    except (OSError, ValidationError, SafetensorError) as error:
        raise ModelError(f"model folder {folder} is incomplete or damaged: {error}") from error
    if base is not None and record is None:
        raise InputError(f"model folder {folder} has its own base; leave out base={str(base)!r}")
    source = base or (folder / BASE_FOLDER if record is None else record.name)
    lm, tokenizer = load_base(source, folder / TOKENIZER_FOLDER, dtype=dtype, quantization_config=quantization_config)
    model = make(lm, tokenizer, config)
    if record is not None and not is_quantized(lm) and record.digest not in (None, _base_digest(model)):
        raise ModelError(
            f"the adapters in {folder} were trained on another base than {str(source)!r} (its weights differ); "
            "say where theirs is with base="
        )
    try:
        missing, unexpected = model.load_state_dict({k: v.float() for k, v in own.items()}, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its configuration: {error}") from error
    wanted = set(_own_state(model, model.state_dict()))
    if unexpected or wanted & set(missing):
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its configuration: {unexpected or missing}")
    return model


def save(
    model: Network,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    base: bool = True,
    figures: Mapping[str, object] | None = None,
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
    state = model.state_dict() if state is None else state
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # tied weights stay one tensor, so that they are written once
        if tensor.data_ptr() not in kept:
            kept[tensor.data_ptr()] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        return kept[tensor.data_ptr()]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: keep(tensor) for name, tensor in _own_state(model, state).items()}
        adapters = {name.removeprefix(_LM): own.pop(name) for name in list(own) if _is_adapter(name)}
        save_file(own, folder / WEIGHTS_FILE)
        place = (lm.config.name_or_path or None) if record is None else record.name
        if adapters:
            write_adapters(folder, cast(Any, lm).peft_config, adapters, place)
        if record is None:
            lm_state = {name: keep(tensor) for name, tensor in _base_state(model, state).items()}
            lm.save_pretrained(folder / BASE_FOLDER, state_dict=lm_state)
            (folder / BASE_FILE).unlink(missing_ok=True)
        else:
            (folder / BASE_FILE).write_text(record.model_dump_json(indent=2) + "\n")
        model.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        (folder / CONFIG_FILE).write_text(json.dumps(model.config.model_dump(), indent=2) + "\n")
        (folder / HUB_FILE).write_text(json.dumps({"model_type": MODEL_TYPE}, indent=2) + "\n")
        write_card(folder, model.config, place if place and is_hub_id(place) else None, figures or {})
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


def is_hub_id(name: str) -> bool:
    """Whether `name` looks like "owner/name" and is no folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def is_quantized(lm: PreTrainedModel) -> bool:
    """Whether `lm` was loaded with a `quantization_config`."""
    return getattr(lm, "hf_quantizer", None) is not None


class _BaseRecord(Frozen):
    """Where the base is that adapters saved alone belong to; the digest of its weights, unless it was quantized."""

    name: str
    digest: str | None


def _record_of(model: Network) -> _BaseRecord:
    if model.config.adapters != "lora":
        raise InputError("the base cannot be left out: with adapters='copies' it is the decoder; save with base=True")
    name = model.lm.config.name_or_path
    if not name:
        raise InputError(
            "this base was not loaded from a folder or hub id, so nothing could find it again; save with base=True"
        )
    # a folder by its full path: adapters are loaded from anywhere
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return _BaseRecord(name=name, digest=None if is_quantized(model.lm) else _base_digest(model))


def _base_digest(model: Network) -> str:
    return fingerprint("", _base_state(model, model.state_dict()), model.tokenizer).model


_LM = "parameters_by_role.lm."
_SHARED = "parameters_by_role.encoder."


def _base_state(model: Network, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the LM, out of those of `model`, under their own names, as if there were no adapters."""
    own = _own_state(model, state)
    base = {k: v for k, v in state.items() if k.startswith(_LM) and k not in own}
    return {name.removeprefix(_LM).replace(".base_layer.", "."): tensor for name, tensor in base.items()}


def _is_adapter(name: str) -> bool:
    return any(f".{half}." in name for half in HALVES)


def _own_state(model: Network, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is not the base: scorer, prompts, flag, encoder copy (without shared embeddings), adapters."""
    shared = {id(p) for p in model.lm.get_input_embeddings().parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in shared}
    return {
        name: tensor
        for name, tensor in state.items()
        if (not name.startswith(_LM) or _is_adapter(name)) and not (name.startswith(_SHARED) and name in names)
    }
