"""Loading a model: a compressor with its base, or a plain LM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nugget2d.checkpoints.base import load_base
from nugget2d.checkpoints.layout import (
    BASE_FILE,
    BASE_FOLDER,
    CONFIG_FILE,
    LM,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    BaseRecord,
    base_state,
    is_quantized,
    own_state,
)
from nugget2d.checkpoints.resolve import find_compressor, on_this_machine
from nugget2d.config import NuggetConfig
from nugget2d.errors import InputError, ModelError
from nugget2d.modeling.adapters import read_adapters
from nugget2d.modeling.compatibility import fitting_fields
from nugget2d.modeling.digest import sampled_digest
from nugget2d.modeling.network import Network
from nugget2d.modeling.parameters import ADAPTERS

N = TypeVar("N", bound=Network)
# makes a model of an LM, its tokenizer and a configuration
Maker = Callable[[PreTrainedModel, PreTrainedTokenizerBase, NuggetConfig], N]


def load(
    make: Maker[N],
    name: str | Path,
    base: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> N:
    """Load the model `name` with its weights, as an object that `make` returns.

    Args:
        make: the class, or a function that chooses it by the configuration.
        name: see `Nugget2D.from_pretrained`, as for all that follows.
        base: for a compressor that was saved without its base.
        revision: of a repository.
        token: for every repository.
        local_files_only: for every repository.
        options: of `load_base`.

    Raises:
        ModelError: unknown, incomplete or inconsistent; the base is not the one that the adapters were trained on.
        InputError: a `base` for a model that has its own.
        OutputError: see `load_base`.
    """
    hub: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
    place = on_this_machine(name, revision=revision) if local_files_only else name
    folder = find_compressor(place, revision=revision, token=token)
    if folder is not None:  # as a whole path: a part of it that is missing could otherwise be a hub id
        return _load_compressor(make, folder.absolute(), base, **hub, **options)
    if base is not None:
        raise InputError(f"{str(name)!r} is a plain language model, not a compressor; leave out base={str(base)!r}")
    loaded = load_base(name, revision=revision, **hub, **options)
    config = NuggetConfig.model_validate({"name": str(name), "adapters": "none"} | fitting_fields(loaded.lm))
    model = make(loaded.lm, loaded.tokenizer, config)
    model.loaded_weights = loaded.loaded
    return model


def _load_compressor(make: Maker[N], folder: Path, base: str | Path | None, **options: Any) -> N:
    try:
        config = NuggetConfig.model_validate_json((folder / CONFIG_FILE).read_text())
        own = load_file(folder / WEIGHTS_FILE)
        if config.adapters == "lora":
            own |= {LM + name: tensor for name, tensor in read_adapters(folder, ADAPTERS).items()}
        record = BaseRecord.model_validate_json(path.read_text()) if (path := folder / BASE_FILE).is_file() else None
    except (OSError, ValidationError, SafetensorError) as error:
        raise ModelError(f"model folder {folder} is incomplete or damaged: {error}") from error
    if base is not None and record is None:
        raise InputError(f"model folder {folder} has its own base; leave out base={str(base)!r}")
    source = base or (folder / BASE_FOLDER if record is None else record.name)
    try:
        loaded = load_base(source, folder / TOKENIZER_FOLDER, **options)
    except ModelError as error:
        if record is None:
            raise
        raise ModelError(f"{error}; it is the base of {folder}: say where that is with base=") from error
    model = make(loaded.lm, loaded.tokenizer, config)
    model.loaded_weights = loaded.loaded
    if record is not None and not _is_base_of(record, model):
        raise ModelError(
            f"the adapters in {folder} were trained on another base than {str(source)!r} (its weights differ); "
            "say where theirs is with base="
        )
    try:
        missing, unexpected = model.load_state_dict({k: v.float() for k, v in own.items()}, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its configuration: {error}") from error
    wanted = set(own_state(model, model.state_dict()))
    if unexpected or wanted & set(missing):
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its configuration: {unexpected or missing}")
    return model


def _is_base_of(record: BaseRecord, model: Network) -> bool:
    """Whether the base of `model` is the one on record, as far as that is known: quantized weights are not compared."""
    if record.digest is None or is_quantized(model.lm):
        return True
    own = sampled_digest(base_state(model.state_dict())) if record.scheme == 1 else model.fingerprint.model
    return record.digest == own
