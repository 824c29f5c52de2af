"""The distillation objective: both divergences from the LM that sees the whole context, worked out by hand."""

import pytest
import torch

import tiny
from nugget2d import Nugget2D
from nugget2d.training.objectives import Contexts, continue_loss, distill_loss


def test_distillation_is_both_divergences_from_the_lm_with_the_whole_context() -> None:
    model = tiny.trained("llama", "copies")
    ids = tiny.random_ids(2, 24)
    loss = distill_loss(model, Contexts(ids, 1, 16, [4, 4], "even", torch.Generator()))
    weight = model.lm.lm_head.weight
    (gradient,) = torch.autograd.grad(loss, weight)

    with torch.no_grad():
        teacher = torch.distributions.Categorical(logits=model.lm(ids).logits[:, 15:-1])
    encoded = model.encode(ids[:, :16], [16, 16], [4, 4], selection="even")
    logits = model.decode(encoded.nuggets, ids[:, 16:-1], prompt="continue", start=16)
    student = torch.distributions.Categorical(logits=logits)
    divergence = torch.distributions.kl_divergence
    wanted = (divergence(teacher, student) + divergence(student, teacher)).mean() / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4) and loss > 0.01
    assert torch.allclose(gradient, torch.autograd.grad(wanted, weight)[0], atol=1e-5)  # none through the teacher


def test_distillation_is_zero_for_a_student_that_predicts_what_its_teacher_does(
    llama: Nugget2D, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny.random_ids(2, 24)
    decode = llama.decode

    def all_seeing(nuggets: object, tokens: torch.Tensor, *, prompt: object, start: int = 0) -> torch.Tensor:
        everything = decode(None, ids[:, :-1], prompt=None)
        return everything[:, -tokens.shape[1] - 1 :] if prompt else everything

    monkeypatch.setattr(llama, "decode", all_seeing)
    contexts = Contexts(ids, 1, 16, [4, 4], "even", torch.Generator())
    assert distill_loss(llama, contexts).item() == pytest.approx(0, abs=1e-6)
    assert continue_loss(llama, contexts) > 1
