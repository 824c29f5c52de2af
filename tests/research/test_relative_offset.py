"""Relative-offset initialisation: attention peaks at the distance of each head before anything is trained."""

import re

import pytest
import torch

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import RecipeError
from nugget2d.modeling.readout import head_readout
from nugget2d.training.plugins import load_plugins
from nugget2d.training.recipe import CompressStage, ShapeConfig
from nugget2d.training.run import make_lm
from research.relative_offset import set_relative_offsets
from test_training import COMPRESS

OFFSETS = {"use": "research.relative_offset:RelativeOffsets"}


def compressor(**options: object) -> Nugget2D:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 3, "num_heads": 2, "rope_theta": 100} | options
    lm = make_lm(ShapeConfig.model_validate(shape), tiny.tokenizer())
    lm.set_attn_implementation("eager")  # shows its attention
    return Nugget2D.from_base(lm, tiny.tokenizer(), adapters="copies", scorer_layer=1, window=64)


@torch.no_grad()
def test_queries_peak_at_the_distance_of_their_head() -> None:
    model = compressor()
    set_relative_offsets(model, tiny.random_ids(8, 64))
    layout = head_readout(model)
    for layer in layout.layers:
        keys = layout.encoder[layer].self_attn.k_proj.bias.view(1, 2, 1, 32).expand(-1, -1, 16, -1).contiguous()
        queries = layout.decoder[layer].self_attn.q_proj.bias.view(2, 32)
        # column d: the key of a nugget d places after the query, which is at position 0
        moved = model.rotation([keys] * 3, torch.arange(16)[None])[layer]
        logits = torch.einsum("hc,hdc->hd", queries, moved[0])
        assert logits.argmax(1).tolist() == layout.distances(layer).tolist()


@torch.no_grad()
def test_nuggets_look_back_and_other_tokens_at_themselves() -> None:
    """In the encoder: a head of layer l fetches what the same head of layer l + 1 is to carry."""
    model = compressor()
    ids = tiny.random_ids(1, 64)
    set_relative_offsets(model, ids)
    chosen = torch.zeros(1, 64, 1)
    chosen[:, [20, 40]] = 1.0
    with model.parameters_by_role.role("encoder") as body:
        embeds = model.embed(ids) + chosen * model.flag
        attentions = body(inputs_embeds=embeds, output_attentions=True).attentions
    others = torch.tensor([token for token in range(64) if token not in (20, 40)])
    for layer in (0, 1):
        seen, distances = attentions[layer][0].argmax(-1), head_readout(model).distances(layer + 1)
        assert torch.equal(seen[:, 20], 20 - distances) and torch.equal(seen[:, 40], 40 - distances)
        assert (seen[:, others] == others).double().mean() > 0.9


def test_what_has_no_biases_or_too_few_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="attention_bias: true"):
        set_relative_offsets(compressor(attention_bias=False), tiny.random_ids(2, 32))
    with pytest.raises(RecipeError, match="two layers or more"):
        set_relative_offsets(compressor(num_layers=1), tiny.random_ids(2, 32))


def test_a_trained_compressor_keeps_its_weights() -> None:
    stage = CompressStage.model_validate(COMPRESS | {"plugins": [OFFSETS], "init": "nano"})
    with pytest.raises(RecipeError, match=re.escape("remove RelativeOffsets")):
        load_plugins(stage)
