"""The read-out loss: what it is of, by hand, and that a run with it decodes tokens from states."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import ModelError
from nugget2d.modeling.readout import final_norm, head_readout
from nugget2d.training.objectives import reconstruct_loss
from nugget2d.training.run import train
from research.readout_loss import readout_loss
from test_training import small_recipe

READOUT = {"use": "research.readout_loss:ReadoutLoss", "weight": 0.5}


@pytest.fixture(scope="module")
def separate() -> Nugget2D:
    """Two copies of a Llama with one key-value head for each head."""
    base = tiny.lm("llama", num_key_value_heads=4)
    return Nugget2D.from_base(base, tiny.tokenizer(), adapters="copies", scorer_layer=1, window=32)


@torch.no_grad()
def test_every_head_is_to_predict_the_token_at_its_distance(separate: Nugget2D) -> None:
    ids = tiny.random_ids(2, 16)
    _, encoded = reconstruct_loss(separate, ids, [2, 2], "even", torch.Generator())
    layout, norm = head_readout(separate), final_norm(separate.lm)
    words = sorted(set(ids.flatten().tolist()))
    table, layers = separate.embed(torch.tensor(words)), []
    for number, layer in enumerate(layout.layers):
        losses = []
        for row, ends in enumerate(encoded.index.tolist()):
            for nugget, (end, last) in enumerate(zip(ends, [-1, *ends], strict=False)):
                for head in range(4):
                    distance = 4 * number + head
                    if distance >= end - last:
                        continue
                    own = layout.decoder[layer].self_attn.o_proj.weight[:, 8 * head : 8 * head + 8]
                    logits = table @ norm(own @ encoded.nuggets.values[layer][row, head, nugget])
                    wanted = words.index(int(ids[row, end - distance]))
                    losses.append(float(-logits.log_softmax(0)[wanted]))
        layers.append(sum(losses) / len(losses))
    assert len(layers) == 2
    assert float(readout_loss(separate, encoded, ids)) == pytest.approx(sum(layers) / 2, rel=1e-4)


def test_padding_has_nothing_to_read_out() -> None:
    base = tiny.lm("llama", num_hidden_layers=2, num_key_value_heads=4)
    model = Nugget2D.from_base(base, tiny.tokenizer(), adapters="copies", scorer_layer=1, window=32)
    row = tiny.random_ids(1, 16)  # the same tokens twice: the same words to tell apart

    def loss(rows: Tensor, counts: list[int]) -> float:
        _, encoded = reconstruct_loss(model, rows, counts, "even", torch.Generator())
        return readout_loss(model, encoded, rows).item()

    # four heads: 4 nuggets of 4 tokens, or 8 of 2
    assert loss(row.repeat(2, 1), [4, 8]) == pytest.approx((loss(row, [4]) + loss(row, [8])) / 2, abs=1e-5)


@pytest.mark.parametrize("adapters", ["copies", "lora"])
def test_a_run_says_that_its_tokens_can_be_decoded(tmp_path: Path, adapters: str) -> None:
    content = yaml.safe_load(small_recipe(tmp_path, pretrain=None).read_text())
    phases = [{"objectives": {"reconstruct": 1}, "windows": {32: 1}}]
    content["compress"] |= {"plugins": [READOUT], "phases": phases, "tokens": 512, "adapters": adapters}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    if adapters == "lora":
        with pytest.raises(ModelError, match="adapters: copies"):
            train(path)
    else:
        assert Nugget2D.from_pretrained(train(path) / "model").config.token_readout
