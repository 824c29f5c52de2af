"""Adapters in peft's format: those of a compressor, one folder each; foreign ones are refused, as they must be merged.

encoder/, decoder/     adapter_config.json and adapter_model.safetensors; `peft.PeftModel.from_pretrained` reads them
"""

from collections.abc import Mapping
from copy import copy
from pathlib import Path

import peft
from peft import PeftConfig, TaskType
from peft.utils import CONFIG_NAME as ADAPTER_FILE
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nugget2d.errors import ModelError

HALVES = ("lora_A", "lora_B")
# how peft calls the LM inside a PeftModel
_PEFT = "base_model.model."

_REMEDY = (
    "merge it with its base and use the result: "
    'PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained("merged"), the tokenizer beside it'
)


def adapter_error(name: str | Path) -> ModelError:
    """The error for a folder or repository that holds a foreign adapter: transformers would load its base."""
    return ModelError(f"{str(name)!r} is a peft adapter ({ADAPTER_FILE}), not a whole model; {_REMEDY}")


def refuse_adapted(lm: nn.Module) -> None:
    """Refuse an LM that has adapters already: it is undefined which roles would use them.

    Raises:
        ModelError: it does; the message names the remedy.
    """
    # some of peft's layers (AdaptedAttention) have no base class that says so
    if any(type(module).__module__.split(".")[0] == peft.__name__ for module in lm.modules()):
        raise ModelError(f"this {type(lm).__name__} carries a peft adapter; {_REMEDY}")


def is_adapter(name: str, adapter: str = "") -> bool:
    """Whether an LM's weight of that name belongs to an adapter, or to the one called `adapter`."""
    return any(f".{half}.{adapter}" in name for half in HALVES)


def base_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an LM, out of its `state`, under the names that they have without adapters."""
    return {name.replace(".base_layer.", "."): weight for name, weight in state.items() if not is_adapter(name)}


def write_adapters(
    folder: Path, configs: Mapping[str, PeftConfig], state: Mapping[str, Tensor], base: str | None
) -> None:
    """Write every adapter into a folder of its own name.

    Args:
        folder: gets the folders.
        configs: of each adapter, as injected.
        state: weights of all, as the LM names them (`...q_proj.lora_A.encoder.weight`).
        base: folder or hub id of the LM, for peft.
    """
    for adapter, config in configs.items():
        ends = {f".{half}.{adapter}.weight": f".{half}.weight" for half in HALVES}
        own = {
            _PEFT + name.removesuffix(mine) + theirs: tensor
            for name, tensor in state.items()
            for mine, theirs in ends.items()
            if name.endswith(mine)
        }
        saved = copy(config)
        saved.task_type, saved.base_model_name_or_path, saved.inference_mode = TaskType.CAUSAL_LM, base, True
        saved.save_pretrained(str(folder / adapter))
        save_file(own, folder / adapter / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def read_adapters(folder: Path, adapters: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights of `adapters`, as the LM names them.

    Raises:
        OSError: a file is not there.
        SafetensorError: a file is damaged.
    """
    state = {}
    for adapter in adapters:
        for name, tensor in load_file(folder / adapter / SAFETENSORS_WEIGHTS_NAME).items():
            place, half, _ = name.removeprefix(_PEFT).rsplit(".", 2)
            state[f"{place}.{half}.{adapter}.weight"] = tensor
    return state
