"""Adapters as peft keeps them: one folder each, which `peft.PeftModel.from_pretrained` puts on the base too.

encoder/, decoder/     adapter_config.json and adapter_model.safetensors
"""

from collections.abc import Mapping
from copy import copy
from pathlib import Path

from peft import PeftConfig, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

HALVES = ("lora_A", "lora_B")
# how peft calls the LM inside a PeftModel
_PEFT = "base_model.model."


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
