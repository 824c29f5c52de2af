"""A ratio for each row of a batch: a row is what it is alone, and nothing is compiled again."""

import functools

import pytest
import torch
from torch import Tensor, nn

import tiny
from nugget2d import Nugget2D
from nugget2d.training.corpus import Pack
from nugget2d.training.objectives import Contexts, continue_loss, reconstruct_loss
from nugget2d.training.recipe import CompressStage
from nugget2d.training.run import compile_blocks
from nugget2d.training.tasks import CompressTask

COUNTS = [5, 1, 16]


@pytest.mark.parametrize("selection", ["even", "learned"])
def test_a_row_of_a_mixed_batch_has_the_loss_it_has_alone(llama: Nugget2D, selection: str) -> None:
    ids = tiny.random_ids(3, 16)

    def loss(rows: Tensor, counts: list[int]) -> float:
        return reconstruct_loss(llama, rows, counts, selection, torch.Generator())[0].item()  # type: ignore[arg-type]

    alone = [loss(ids[row : row + 1], [count]) for row, count in enumerate(COUNTS)]
    assert loss(ids, COUNTS) == pytest.approx(sum(alone) / 3, abs=1e-5)
    assert len({round(one, 3) for one in alone}) == 3


def test_segments_of_a_mixed_batch_are_joined_as_they_are_alone(llama: Nugget2D) -> None:
    ids = tiny.random_ids(3, 2 * 16 + 8)

    def loss(rows: Tensor, counts: list[int]) -> float:
        return continue_loss(llama, Contexts(rows, 2, 16, counts, "even", torch.Generator())).item()

    alone = [loss(ids[row : row + 1], [count]) for row, count in enumerate(COUNTS)]
    assert loss(ids, COUNTS) == pytest.approx(sum(alone) / 3, abs=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_every_row_draws_its_ratio_if_the_recipe_says_so(monkeypatch: pytest.MonkeyPatch, mixed: bool) -> None:
    model = tiny.make("llama", "copies")
    stage = CompressStage.model_validate(
        {
            "tokens": 1, "batch_tokens": 256, "optim": {"lr": 1}, "mixed_ratios": mixed,
            "ratios": {"start": [1, 16], "end": [1, 16]},
            "phases": [{"objectives": {"uniform": 1}, "windows": {32: 1}}],
        }
    )  # fmt: skip
    drawn: list[list[int]] = []
    encode = model.encode

    def watched(ids: Tensor, lengths: list[int], counts: list[int], **options: object) -> object:
        drawn.append(counts)
        return encode(ids, lengths, counts, **options)  # type: ignore[arg-type]

    class Blank(Pack):
        def __init__(self) -> None:
            self.ids = torch.zeros(32, dtype=torch.long).numpy()  # type: ignore[assignment]

    monkeypatch.setattr(model, "encode", watched)
    generator = torch.Generator().manual_seed(0)
    CompressTask(model, stage, Blank(), Blank()).loss(0.0, generator, generator)
    assert len(drawn[0]) == 8 and (len(set(drawn[0])) > 3) == mixed


@pytest.mark.slow
def test_ratios_vary_without_recompilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    model = tiny.trained("llama", "copies")
    compile_blocks(model.parameters_by_role)
    torch._dynamo.reset()

    def step(counts: list[int], *, grad: bool = True) -> None:
        with torch.set_grad_enabled(grad):
            reconstruct_loss(model, tiny.random_ids(3, 32), counts, "even", torch.Generator())

    step([8, 8, 8])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ([4, 4, 4], [1, 9, 32], [2, 2, 31]):
            step(counts)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            step([8, 8, 8], grad=False)  # else the steps above would pass whatever happened
