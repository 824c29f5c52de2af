"""Whether this machine computes faster in bfloat16."""

import torch

# the names of `torch.cpu.get_capabilities` for instructions that multiply bfloat16, of x86 and ARM
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def has_fast_bfloat16(device: str) -> bool:
    """Whether a device of this type ("cpu", "cuda") multiplies bfloat16 itself.

    A CPU that does not takes seven times as long for it as for float32 (research/LOG.md).
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in _INSTRUCTIONS)


def mixed_precision(device: str) -> torch.autocast:
    """A context in which matrix products are in bfloat16, if that is faster on this type of device."""
    return torch.autocast(device, torch.bfloat16, enabled=has_fast_bfloat16(device))
