"""A digest that tells which model a memory belongs to."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nugget2d.memory.memory import Fingerprint

# Enough numbers of every tensor to tell any two trainings apart, few enough for a 70B model in seconds.
_SAMPLES = 1024


def fingerprint(name: str, state: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Digest of the names, shapes and a fixed sample of all weights (as bfloat16), and of the tokenizer.

    Rounding to bfloat16 makes a checkpoint loaded in float32 or bfloat16 the same model.
    """
    weights = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        if type(tensor).dequantize is not Tensor.dequantize:
            tensor = tensor.dequantize()  # packed weights of a quantization library, which cannot be sliced
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step].to(torch.bfloat16).cpu().contiguous()
        weights.update(f"{key}{tuple(tensor.shape)}".encode())
        weights.update(sample.view(torch.uint8).numpy().tobytes())
    words = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    return Fingerprint(name, weights.hexdigest(), words.hexdigest())
