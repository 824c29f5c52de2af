"""What runs on CUDA alone: FlexAttention, compiled, behind the same function as the other ways."""

import pytest
import torch

import tiny
from nugget2d import Nugget2D
from nugget2d.modeling.losses import token_losses
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import Way, mixed_logits
from test_streaming_parts import nuggets_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("layout", [Layout(20, 32, 4), Layout(20, 32, 6, 2)], ids=str)
@pytest.mark.parametrize("way", ["flex", "chunked"])
def test_every_way_is_the_dense_mask(layout: Layout, way: Way) -> None:
    """Logits, and the gradients of both parameter sets and of the soft prompt."""

    def read(way: Way) -> list[torch.Tensor]:
        # its compiled kernel takes heads of 16 numbers at least
        base = tiny.lm(hidden_size=64)
        model = Nugget2D.from_base(base, tiny.tokenizer(), adapters="copies", scorer_layer=2, window=32).to("cuda")
        ids = tiny.random_ids(2, layout.length).cuda()
        logits = mixed_logits(model, nuggets_of(model, ids, layout), ids, layout, way)
        token_losses(logits[:, :-1], ids[:, 1:]).mean().backward()
        weights = [*model.parameters_by_role.encoder_parameters(), *model.parameters_by_role.decoder_parameters()]
        gradients = [weight.grad for weight in [*weights, model.prompts["continue"]] if weight.grad is not None]
        return [logits.detach(), *gradients]

    found, expected = read(way), read("dense")
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-3 * float(other.abs().max()) + 1e-6)
