"""The layer of induction heads: how it is inserted into a trained compressor, and the losses that teach it."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import tiny
from nugget2d import Nugget2D
from nugget2d.errors import ModelError, RecipeError
from nugget2d.inference.placement import join_rows
from nugget2d.inference.token_decoding import decode_tokens
from nugget2d.modeling.hooks import inputs_of
from nugget2d.modeling.network import Encoded
from nugget2d.modeling.readout import head_readout, unrotated_layers
from nugget2d.modeling.rotation import KeyRotation
from nugget2d.pooled import PooledMemory
from nugget2d.streaming.layout import Layout
from nugget2d.streaming.parallel import mixed_logits, parted
from nugget2d.training.corpus import Pack
from nugget2d.training.recipe import CompressStage
from nugget2d.training.run import train
from nugget2d.training.tasks import CompressTask
from research import induction_loss as module
from research.induction import PLACE, insert_layer
from research.induction_loss import InductionLoss, induction_keys, induction_loss, value_matching_loss
from test_training import losses, small_recipe

pytestmark = pytest.mark.slow

OFFSETS = {"use": "research.relative_offset:RelativeOffsets"}
READOUT = {"use": "research.readout_loss:ReadoutLoss", "weight": 0.5}
INSERT = {"use": "research.induction:InsertLayer"}
INDUCTION = {"use": "research.induction_loss:InductionLoss", "weight": 1.0}
SEPARATE = {"num_key_value_heads": 4, "attention_bias": True, "num_hidden_layers": 3}
LAYOUT = Layout(recent_window=8, chunk=6, steps=4)


def compressor(**changes: object) -> Nugget2D:
    """Two copies of a Llama whose heads can be told apart, their weights apart as after training."""
    lm = tiny.lm("llama", **(SEPARATE | changes))
    torch.manual_seed(1)
    model = Nugget2D.from_base(lm, tiny.tokenizer(), adapters="copies", scorer_layer=1, token_readout=True, window=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Random tokens."""
    path = tmp_path_factory.mktemp("pack") / "train.bin"
    (path.parent / "done").write_text("uint16")
    ids = torch.randint(1, len(tiny.tokenizer()), (4096,), generator=torch.Generator().manual_seed(0))
    path.write_bytes(ids.numpy().astype(np.uint16).tobytes())
    return Pack(path)


@pytest.fixture(scope="module")
def before() -> Nugget2D:
    return compressor()


@pytest.fixture(scope="module")
def after(before: Nugget2D, pack: Pack) -> Nugget2D:
    return insert_layer(before, pack)


# ---- inserting ----


@torch.no_grad()
def test_the_encoder_computes_as_before(before: Nugget2D, after: Nugget2D) -> None:
    ids = tiny.random_ids(2, 24)
    old, new = (model.encode(ids, [24, 24], [4, 4], selection="even").nuggets for model in (before, after))
    kept = [number for number in range(4) if number != PLACE]
    for number, layer in zip(kept, range(3), strict=True):
        assert torch.allclose(new.keys[number], old.keys[layer], atol=1e-5)
        assert torch.allclose(new.values[number], old.values[layer], atol=1e-5)
    # the new values are those that stood there, centred
    shift = new.values[PLACE] - old.values[PLACE]
    assert torch.allclose(shift, shift[:1, :, :1].expand_as(shift), atol=1e-4)


@torch.no_grad()
def test_a_key_is_a_function_of_the_next_value(before: Nugget2D, after: Nugget2D) -> None:
    ids = tiny.random_ids(64, 24)
    nuggets = after.encode(ids, [24] * 64, [6] * 64, selection="even").nuggets
    keys, values = (states[PLACE].transpose(0, 1).flatten(1, 2).double() for states in (nuggets.keys, nuggets.values))
    for head in range(3):
        slot = torch.cat([values[head + 1], torch.ones_like(values[0, :, :1])], dim=1)
        assert torch.allclose(slot @ torch.linalg.lstsq(slot, keys[head]).solution, keys[head], atol=1e-3)
    assert not keys[3].any()  # there is no code to the left of the last
    assert keys[:3].norm(dim=-1).mean() > 1


@torch.no_grad()
def test_the_decoder_is_that_of_before_but_for_what_the_new_layer_adds(before: Nugget2D, after: Nugget2D) -> None:
    ids = tiny.random_ids(2, 24)
    projection = head_readout(after).decoder[PLACE].self_attn.o_proj
    kept, old = projection.weight.clone(), before.decode(None, ids, prompt=None)
    assert not torch.allclose(after.decode(None, ids, prompt=None), old, atol=1e-3)
    try:
        projection.weight.zero_()
        assert torch.allclose(after.decode(None, ids, prompt=None), old, atol=1e-4)
    finally:
        projection.weight.copy_(kept)


@torch.no_grad()
def test_a_query_without_a_match_attends_to_the_start_token(after: Nugget2D) -> None:
    ids = torch.randperm(len(after.tokenizer) - 1, generator=torch.Generator().manual_seed(0))[:200].view(8, 25) + 1
    attention = head_readout(after).decoder[PLACE].self_attn
    with inputs_of(induction_keys(after)) as watched:
        after.decode(None, after.after_start(ids), prompt=None)
    queries, keys = (
        p(watched[-1]).unflatten(-1, (4, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
    )
    logits = (queries @ keys.transpose(2, 3))[:, :3] / attention.head_dim**0.5
    start, others = logits[:, :, 5:, 0], torch.tril(logits[:, :, 5:, 1:], diagonal=4)
    assert (start > others.amax(-1)).double().mean() > 0.5  # of some fifteen keys


def test_tokens_are_decoded_and_keys_moved_as_before(before: Nugget2D, after: Nugget2D) -> None:
    assert unrotated_layers(after.lm) == [PLACE] and unrotated_layers(before.lm) == []
    assert head_readout(after).layers == [2, 3]
    tokens = [decode_tokens(model, model.compress(tiny.TEXT, ratio=4)) for model in (before, after)]
    for old, new in zip(*tokens, strict=True):
        # of the decoder's own projections, which are those of before
        assert torch.equal(old, new)
    rotation = KeyRotation(after.parameters_by_role.body, 4)
    keys = [torch.randn(1, 4, 3, 8) for _ in range(4)]
    moved = rotation(keys, torch.full((1, 3), 5))
    assert [torch.equal(one, other) for one, other in zip(keys, moved, strict=True)] == [False, True, False, False]


def test_pooled_memories_get_the_same_layer(before: Nugget2D, after: Nugget2D, pack: Pack) -> None:
    pooled = PooledMemory(copy.deepcopy(before.lm), before.tokenizer, before.config)
    pooled.load_state_dict(before.state_dict())
    fitted = re.compile(r"(lm\.model|encoder)\.layers\.1\.self_attn\.[qkv]_proj")
    unread = "encoder.layers.1.self_attn.q_proj"  # random: the encoder's queries say nothing here
    expected = {name: one for name, one in after.state_dict().items() if fitted.search(name) and unread not in name}
    extended = insert_layer(pooled, pack).state_dict()
    assert len(expected) == 10 and all(torch.equal(extended[name], one) for name, one in expected.items())


@pytest.mark.parametrize("changes", [{"attention_bias": False}, {"num_key_value_heads": 2}, {"num_hidden_layers": 1}])
def test_what_cannot_get_one(changes: dict[str, object], pack: Pack) -> None:
    with pytest.raises((RecipeError, ModelError), match=r"InsertLayer|read-out"):
        insert_layer(compressor(**changes), pack)


def test_nothing_gets_two(after: Nugget2D, pack: Pack) -> None:
    with pytest.raises(RecipeError, match="InsertLayer needs a Llama"):
        insert_layer(after, pack)


# ---- the loss ----


def by_hand(
    model: Nugget2D, ids: Tensor, layout: Layout, inputs: Tensor, encoded: Encoded | None, kinds_found: int
) -> float:
    """The loss, key by key; all the kinds that it is to be of must occur."""
    attention = head_readout(model).decoder[PLACE].self_attn
    width, heads = attention.head_dim, len(attention.q_proj.bias) // attention.head_dim
    sinks, tokens = parted(inputs, len(ids), layout) if encoded else (inputs[:, :1], inputs[:, 1:])
    split = lambda states: states.unflatten(-1, (heads, width))  # noqa: E731
    queries, keys = split(attention.q_proj(tokens)), split(attention.k_proj(tokens))
    found: dict[str, list[float]] = {}
    for row, text in enumerate(ids.tolist()):
        for t, token in enumerate(text):
            step = max(0, (t - layout.recent_window) // layout.chunk)
            for head in range(heads):
                score = lambda key: float(queries[row, t, head] @ key) / width**0.5  # noqa: B023, E731
                silence = score(split(attention.k_proj(sinks))[row, step, head])
                whole, held, others = [], [], []
                for j in range(step * layout.chunk, t + 1):
                    place = whole if j and text[j - 1] == token else others
                    place.append(score(keys[row, j, head]))
                for segment in range(max(0, step - (layout.visible_segments or step)), step if encoded else 0):
                    number = row * layout.segments + segment
                    ends = encoded.index[number].tolist()
                    for one, (end, last) in enumerate(zip(ends, [-1, *ends], strict=False)):
                        key = score(encoded.nuggets.keys[PLACE][number, head, one])
                        known = head < end - last and end - head - 1 >= 0
                        answers = known and text[segment * layout.chunk + end - head - 1] == token
                        (held if answers else others).append(key)
                kinds = {"whole": (whole, [*others, silence]), "held": (held, [*others, silence])}
                if not whole and not held:
                    kinds = {"silence": ([silence], others)}
                for kind, (right, wrong) in kinds.items():
                    if right:
                        total = torch.tensor(right + wrong).logsumexp(0) - torch.tensor(right).logsumexp(0)
                        found.setdefault(kind, []).append(float(total))
    assert len(found) == kinds_found
    return sum(sum(one) / len(one) for one in found.values()) / len(found)


@torch.no_grad()
@pytest.mark.parametrize("visible", [None, 1])
@pytest.mark.parametrize("way", ["chunked", "dense"])
def test_the_loss_of_a_stream(after: Nugget2D, way: str, visible: int | None) -> None:
    layout = replace(LAYOUT, visible_segments=visible)
    ids = tiny.random_ids(2, layout.length) % 9 + 1  # few kinds of tokens: matches near and far
    rows = ids[:, : layout.segments * layout.chunk].reshape(-1, layout.chunk)
    encoded = after.encode(rows, [layout.chunk] * 6, [2] * 6, selection="random")
    nuggets = join_rows(after, encoded.nuggets, 2, layout.segments, layout.chunk)
    with inputs_of(induction_keys(after)) as watched:
        mixed_logits(after, nuggets, ids, layout, way)
    loss = induction_loss(after, watched[-1], ids, layout, encoded, torch.Generator())
    assert float(loss) == pytest.approx(by_hand(after, ids, layout, watched[-1], encoded, 3), rel=1e-4)


def test_the_output_of_a_nugget_is_matched_with_that_of_an_uncompressed_token(after: Nugget2D) -> None:
    ids = tiny.random_ids(2, LAYOUT.length)
    rows = ids[:, : LAYOUT.segments * LAYOUT.chunk].reshape(-1, LAYOUT.chunk)
    model = copy.deepcopy(after)
    encoded = model.encode(rows, [LAYOUT.chunk] * 6, [2] * 6, selection="random")
    nuggets = join_rows(model, encoded.nuggets, 2, LAYOUT.segments, LAYOUT.chunk)
    with inputs_of(induction_keys(model)) as watched:
        mixed_logits(model, nuggets, ids, LAYOUT)
    loss = value_matching_loss(model, watched[-1], LAYOUT, encoded)
    attention = head_readout(model).decoder[PLACE].self_attn
    tokens, output = parted(watched[-1], 2, LAYOUT)[1], attention.o_proj.weight
    spoken, wanted = [], []
    for number, ends in enumerate(encoded.index.tolist()):
        row, segment = divmod(number, LAYOUT.segments)
        for one, (end, last) in enumerate(zip(ends, [-1, *ends], strict=False)):
            for head in range(min(4, end - last)):
                own = output[:, 8 * head : 8 * head + 8]
                spoken.append(own @ encoded.nuggets.values[PLACE][number, head, one])
                whole = attention.v_proj(tokens[row, segment * LAYOUT.chunk + end - head])
                wanted.append(output @ whole + attention.o_proj.bias)
    said, meant = (torch.stack(found) - torch.stack(found).mean(0) for found in (spoken, wanted))
    assert float(loss.detach()) == pytest.approx(
        float(((said - meant).square().sum() / meant.square().sum()).detach()), rel=1e-4
    )
    loss.backward()
    moved = {name for name, one in model.named_parameters() if one.grad is not None}
    assert any("encoder" in name for name in moved) and not any("lm.model.layers" in name for name in moved)


@torch.no_grad()
def test_the_loss_of_a_text(after: Nugget2D) -> None:
    ids = tiny.random_ids(2, 20) % 9 + 1
    layout = Layout(recent_window=0, chunk=20, steps=1)
    with inputs_of(induction_keys(after)) as watched:
        after.decode(None, after.after_start(ids), prompt=None)
    loss = induction_loss(after, watched[-1], ids, layout, None, torch.Generator())
    assert float(loss) == pytest.approx(by_hand(after, ids, layout, watched[-1], None, 2), rel=1e-4)
    # nothing to find: all should look at the start token; where there is none, nothing is asked
    alone, inputs = torch.arange(1, 21)[None], watched[-1][:1]
    silence = induction_loss(after, inputs, alone, layout, None, torch.Generator())
    assert float(silence) == pytest.approx(by_hand(after, alone, layout, inputs, None, 1), rel=1e-4)
    assert float(induction_loss(after, inputs[:, 1:], alone, layout, None, torch.Generator())) == 0


def test_a_model_without_such_a_layer(before: Nugget2D) -> None:
    with pytest.raises(ModelError, match="InsertLayer before it"):
        induction_keys(before)


# ---- runs ----


@pytest.mark.parametrize("objective", ["lm", "stream"])
def test_recomputed_activations_change_nothing(after: Nugget2D, pack: Pack, objective: str) -> None:
    found = []
    for recomputed in (False, True):
        phase = {"objectives": {objective: 1}, "windows": {32: 1}}
        stage = CompressStage(
            tokens=64, batch_tokens=128, optim={"lr": 1e-3}, phases=[phase],
            streams={"recent_window": {8: 1}, "chunk": {8: 1}, "context": 32}, checkpoint_activations=recomputed,
        )  # fmt: skip
        model = copy.deepcopy(after)
        generator = torch.Generator().manual_seed(3)
        task = CompressTask(model, stage, pack, pack, [InductionLoss(weight=1.0)])
        loss, metrics = task.loss(0.75, generator, generator)
        loss.backward()
        main = metrics.pop(f"loss_{objective}")
        matched = {"loss_value_matching"} if objective == "stream" else set()
        assert metrics.keys() == {"loss_induction"} | matched
        assert float(loss.detach()) == pytest.approx(main + 0.4 * sum(metrics.values()), rel=1e-5)
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_both_losses_are_of_the_same_inputs(after: Nugget2D, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def recorded(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda model, inputs, *others: given.append(inputs) or loss(model, inputs, *others)

    monkeypatch.setattr(module, "induction_loss", recorded(induction_loss))
    monkeypatch.setattr(module, "value_matching_loss", recorded(value_matching_loss))
    phase = {"objectives": {"stream": 1}, "windows": {32: 1}}
    stage = CompressStage(
        tokens=64, batch_tokens=128, optim={"lr": 1e-3}, phases=[phase],
        streams={"recent_window": {8: 1}, "chunk": {8: 1}, "context": 32},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    CompressTask(after, stage, pack, pack, [InductionLoss(weight=1.0)]).loss(1.0, generator, generator)
    assert len(given) == 2 and given[0] is given[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe that was run."""
    path = small_recipe(tmp_path_factory.mktemp("trained"))
    content = yaml.safe_load(path.read_text())
    content["compress"]["plugins"] = [OFFSETS, READOUT]
    path.write_text(yaml.safe_dump(content))
    train(path)
    return path.parent


@pytest.mark.parametrize("memory", ["nuggets", "pooled"])
def test_a_run_that_inserts_the_layer_and_teaches_it(trained: Path, memory: str) -> None:
    content = yaml.safe_load((trained / "tiny.yaml").read_text())
    for key in ("tokenizer", "model", "pretrain"):
        del content[key]
    phase = {"objectives": {"stream": 1, "lm": 1}, "windows": {32: 1}, "segments": 3}
    content["compress"] |= {
        "init": "run/model", "phases": [phase], "memory": memory,
        "plugins": [INSERT, *([READOUT] if memory == "nuggets" else []), INDUCTION],
        "streams": {"recent_window": {8: 1}, "chunk": {8: 1}, "context": 64}, "tokens": 7680,
    }  # fmt: skip
    path = trained / f"{memory}.yaml"
    path.write_text(yaml.safe_dump(content | {"out": memory}))
    out = train(path)
    records = [line for line in (out / "compress" / "log.jsonl").read_text().splitlines() if "loss_induction" in line]
    found = losses(out / "compress" / "log.jsonl")
    assert len(records) == len(found) == 30
    curve = [yaml.safe_load(line)["loss_induction"] for line in records]
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    kind = {"nuggets": Nugget2D, "pooled": PooledMemory}[memory]
    model = kind.from_pretrained(out / "model")
    assert model.lm.config.model_type == "smollm3"
    stream = model.stream(8, 4, chunk=8)
    stream.append(tiny.TEXT)
    assert "".join(stream.generate(max_new_tokens=4))


def test_a_layer_is_inserted_into_something_trained(tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["compress"]["plugins"] = [INSERT]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="give `init`"):
        train(path)
