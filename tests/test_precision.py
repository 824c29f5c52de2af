"""Training computes in bfloat16 where that is fast, and nowhere else."""

import pytest
import torch

from nugget2d.modeling.precision import has_fast_bfloat16, mixed_precision


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({}, False)],
)
def test_bfloat16_needs_instructions_for_it(
    capabilities: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_fast_bfloat16("cpu") is fast
    square = torch.eye(2)
    with mixed_precision("cpu"):
        assert (square @ square).dtype == (torch.bfloat16 if fast else torch.float32)
