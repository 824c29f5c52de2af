"""The files of a compressor's folder.

nugget2d.json          NuggetConfig
base/                  a transformers folder: config and weights, or else
base.json              where the base is, and a digest of its weights
tokenizer/             not in base/: next to a config, transformers may choose another tokenizer class
nugget2d.safetensors   scorer, soft prompts, flag, and the encoder copy
encoder/, decoder/     the adapters, in peft's format (modeling/adapters.py)
config.json            the model type, for transformers (integrations/transformers.py)
README.md              the model card (card.py)

A plain LM is an ordinary transformers folder: config.json, weights and tokenizer.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from nugget2d.config import Frozen
from nugget2d.modeling.adapters import base_weights, is_adapter
from nugget2d.modeling.network import Network

# the file and model type that transformers reads
HUB_FILE, MODEL_TYPE = "config.json", "nugget2d"
CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "nugget2d.json", "nugget2d.safetensors", "base.json"
BASE_FOLDER, TOKENIZER_FOLDER = "base", "tokenizer"

# in a Network's state
LM = "parameters_by_role.lm."
_SHARED = "parameters_by_role.encoder."


class BaseRecord(Frozen):
    """base.json: where the base of adapters is that were saved alone.

    Attributes:
        name: folder, hub id or .gguf file.
        digest: of its weights; None if it was quantized.
        scheme: of the digest, as in `Fingerprint`.
    """

    name: str
    digest: str | None
    scheme: int = 1


def own_state(model: Network, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is not the base: scorer, prompts, flag, encoder copy (without shared embeddings), adapters."""
    shared = {id(p) for p in model.lm.get_input_embeddings().parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in shared}
    return {
        name: tensor
        for name, tensor in state.items()
        if (not name.startswith(LM) or is_adapter(name)) and not (name.startswith(_SHARED) and name in names)
    }


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the LM, out of those of a `Network`, under the names that they have without adapters."""
    return base_weights({name.removeprefix(LM): tensor for name, tensor in state.items() if name.startswith(LM)})


def is_quantized(lm: PreTrainedModel) -> bool:
    """Whether `lm` was loaded with a `quantization_config`."""
    return getattr(lm, "hf_quantizer", None) is not None
