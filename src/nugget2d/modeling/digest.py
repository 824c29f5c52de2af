"""Digests that identify the model of a memory."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nugget2d.errors import ModelError
from nugget2d.memory.fingerprint import Fingerprint

# Of scheme 1: numbers of every tensor that are looked at.
_SAMPLES = 1024


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal digest of names, shapes and every number, rounded to bfloat16: float32 and bfloat16 loads agree.

    Raises:
        ModelError: some weights are not in memory.
    """
    digest = hashlib.sha256()
    known: dict[tuple[object, ...], bytes] = {}  # tied weights are read once
    for name, tensor in sorted(state.items()):
        if tensor.is_meta:
            raise ModelError(f"weights {name!r} are offloaded and cannot be read; choose a device_map that keeps them")
        plain = _unpacked(tensor).detach()
        # the address of unpacked weights may be reused in the next iteration
        key = (tensor.data_ptr(), plain.dtype, plain.shape, plain.stride()) if _is_plain(tensor) else (name,)
        if key not in known:
            known[key] = hashlib.sha256(_bytes(plain)).digest()
        digest.update(f"{name}{tuple(plain.shape)}".encode() + known[key])
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal digest of a tokenizer's serialized configuration."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def sampled_digest(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal digest of names, shapes and a fixed sample of every tensor, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        plain = _unpacked(tensor).detach()
        flat = plain.flatten()
        step = max(1, flat.numel() // _SAMPLES)
        digest.update(f"{name}{tuple(plain.shape)}".encode())
        digest.update(_bytes(flat[::step].to(torch.bfloat16)))
    return digest.hexdigest()


def legacy_fingerprint(name: str, state: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Scheme 1: a sample of all weights of a compressor and its base."""
    return Fingerprint(name, sampled_digest(state), tokenizer_digest(tokenizer))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor).dequantize is Tensor.dequantize


def _unpacked(tensor: Tensor) -> Tensor:
    """Packed weights of a quantization library, which cannot be sliced, as numbers."""
    return tensor if _is_plain(tensor) else tensor.dequantize()


def _bytes(tensor: Tensor) -> Any:
    """What hashlib reads: an array of bytes, of floats as bfloat16."""
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
