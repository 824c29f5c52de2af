"""The cache with a length per layer and head: exact against a dense mask, small, and usable wherever a cache is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tiny
from nugget2d.errors import InputError, ModelError
from nugget2d.modeling.cache import cached_states
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.headwise import HeadwiseCache, HeadwiseStates
from nugget2d.modeling.headwise_attention import headwise_attention

_SMALL: dict[str, Any] = {
    "vocab_size": len(tiny.tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
# attention scores that are capped, and attention with sinks: what the fused attention of torch cannot do
OTHERS = {
    "gemma2": hf.Gemma2Config(**_SMALL, attn_logit_softcapping=2.0),
    "gpt-oss": hf.GptOssConfig(**_SMALL, num_local_experts=2, num_experts_per_tok=1),
}
SHARES = (0.05, 0.6, 0.25, 0.4)

Kept = list[list[Tensor]]  # by layer and KV head: the tokens of the context that are kept


def make_lm(kind: str) -> PreTrainedModel:
    if kind not in OTHERS:
        return tiny.lm(kind)
    torch.manual_seed(0)
    lm = hf.AutoModelForCausalLM.from_config(OTHERS[kind]).eval()
    if kind == "gpt-oss":
        for layer in lm.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return lm


class Row(NamedTuple):
    """A context, what is kept of it, and what is read after it."""

    context: Tensor  # (1, n)
    kept: Kept
    prompt: Tensor  # (1, q)

    @property
    def positions(self) -> Tensor:
        return self.context.shape[1] + torch.arange(self.prompt.shape[1])[None]


def read_context(lm: PreTrainedModel, context: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    cache = DynamicCache(config=lm.config)
    lm(input_ids=context, **as_cache(lm, cache), use_cache=True)
    return cached_states(cache)


def make_row(lm: PreTrainedModel, seed: int = 0, length: int = 40, shares: Sequence[float] = SHARES) -> Row:
    """Every layer and head keeps a share of its own; the first head of the last layer keeps nothing."""
    context, prompt = tiny.random_ids(1, length, seed), tiny.random_ids(1, 8, seed + 100)
    keys = read_context(lm, context)[0]
    generator = torch.Generator().manual_seed(seed)
    kept = [
        [
            torch.randperm(length, generator=generator)[: int(length * shares[(layer + head) % len(shares)])].sort()[0]
            for head in range(states.shape[1])
        ]
        for layer, states in enumerate(keys)
    ]
    kept[-1][0] = kept[-1][0][:0]
    return Row(context, kept, prompt)


def memory(lm: PreTrainedModel, row: Row) -> HeadwiseStates:
    keys, values = (
        [
            [layer[0, head, tokens] for head, tokens in enumerate(heads)]
            for layer, heads in zip(states, row.kept, strict=True)
        ]
        for states in read_context(lm, row.context)
    )
    return HeadwiseStates(keys, values)


def read(lm: PreTrainedModel, cache: HeadwiseCache, ids: Tensor, positions: Tensor) -> Tensor:
    with headwise_attention(lm):
        return lm(input_ids=ids, position_ids=positions, **as_cache(lm, cache), use_cache=True).logits


def read_stepwise(lm: PreTrainedModel, cache: HeadwiseCache, rows: Sequence[Row], first: int = 5) -> Tensor:
    """Prompts side by side: `first` tokens at once, then one by one."""
    ids, positions = torch.cat([row.prompt for row in rows]), torch.cat([row.positions for row in rows])
    steps = [slice(first), *(slice(step, step + 1) for step in range(first, ids.shape[1]))]
    return torch.cat([read(lm, cache, ids[:, step], positions[:, step]) for step in steps], dim=1)


@contextmanager
def masks_by_layer(lm: PreTrainedModel, masks: Sequence[Tensor]) -> Iterator[None]:
    def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": masks[module.layer_idx]}

    attentions = [m for m in lm.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    assert len(attentions) == len(masks)
    hooks = [module.register_forward_pre_hook(swap, with_kwargs=True) for module in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def dense(lm: PreTrainedModel, row: Row) -> Tensor:
    """One pass over context and prompt by the model's own eager attention, whose masks hide what was dropped."""
    ids, start = torch.cat([row.context, row.prompt], dim=1), row.context.shape[1]
    length = ids.shape[1]
    masks = []
    for heads in row.kept:
        seen = torch.ones(1, len(heads), length, length, dtype=torch.bool).tril()
        for head, tokens in enumerate(heads):
            dropped = torch.ones(length, dtype=torch.bool)
            dropped[start:], dropped[tokens] = False, False
            seen[0, head, start:, dropped] = False
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        masks.append(mask.repeat_interleave(lm.config.num_attention_heads // len(heads), dim=1))
    before = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    with masks_by_layer(lm, masks):
        logits = lm(input_ids=ids).logits[:, start:]
    lm.set_attn_implementation(before)
    return logits


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", [*tiny.KINDS, *OTHERS])
def test_reads_as_a_dense_pass_that_hides_what_was_dropped(kind: str) -> None:
    lm = make_lm(kind)
    row = make_row(lm)
    expected = dense(lm, row)
    torch.testing.assert_close(
        read_stepwise(lm, HeadwiseCache([memory(lm, row)]), [row]), expected, atol=2e-4, rtol=1e-4
    )
    # what is dropped matters, and so does what is kept
    everything = [[torch.arange(40) for _ in heads] for heads in row.kept]
    assert (dense(lm, row._replace(kept=everything)) - expected).abs().max() > 0.05
    assert not torch.allclose(dense(lm, row._replace(kept=[[t[:0] for t in heads] for heads in row.kept])), expected)


def test_heads_and_layers_may_be_empty_while_others_keep_much() -> None:
    lm = tiny.lm()
    row = make_row(lm, length=200)
    share = [torch.arange(200)[::20], torch.arange(200)[:120]]
    row = row._replace(kept=[share, [torch.arange(0), torch.arange(0)], [torch.arange(200), torch.arange(0)]])
    torch.testing.assert_close(
        read_stepwise(lm, HeadwiseCache([memory(lm, row)]), [row]), dense(lm, row), atol=2e-4, rtol=1e-4
    )


def test_rows_of_different_lengths_read_as_each_does_alone() -> None:
    lm = tiny.lm()
    rows = [make_row(lm, 0, 40), make_row(lm, 1, 64), make_row(lm, 2, 25, SHARES[::-1]), make_row(lm, 3, 64)]
    together = read_stepwise(lm, HeadwiseCache([memory(lm, row) for row in rows]), rows)
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(logits[None], dense(lm, row), atol=2e-4, rtol=1e-4)


def test_rows_and_heads_of_one_length_need_not_be_neighbours() -> None:
    lm = tiny.lm("neox")
    some, more = torch.arange(0, 40, 5), torch.arange(0, 40, 3)
    alike = [[some, more, some, more], [more, some, some, more]]
    other = [[more, some, more, some], [more, more, more, some]]
    rows = [make_row(lm, seed)._replace(kept=kept) for seed, kept in enumerate((alike, other, alike))]
    cache = HeadwiseCache([memory(lm, row) for row in rows])
    assert ([0, 2], [0, 2]) in [(block.rows, block.heads) for block in cache.layers[0].blocks]
    for row, logits in zip(rows, read_stepwise(lm, cache, rows), strict=True):
        torch.testing.assert_close(logits[None], dense(lm, row), atol=2e-4, rtol=1e-4)


def test_rows_and_heads_of_one_length_share_a_block() -> None:
    lm = tiny.lm("neox")
    rows = [make_row(lm, seed) for seed in range(3)]
    cache = HeadwiseCache([memory(lm, row) for row in rows])
    assert [len(layer.blocks) for layer in cache.layers] == [4, 4]  # four heads, each with its own length
    uniform = [[torch.arange(9)] * 4, [torch.arange(7)] * 4]
    cache = HeadwiseCache([memory(lm, row._replace(kept=uniform)) for row in rows])
    assert [len(layer.blocks) for layer in cache.layers] == [1, 1]


def test_takes_no_more_memory_than_states_and_room() -> None:
    lm = tiny.lm()
    rows = [make_row(lm, seed, length) for seed, length in enumerate((40, 200, 90))]
    room = 8
    cache = HeadwiseCache([memory(lm, row) for row in rows], room)
    heads = sum(len(heads) for heads in rows[0].kept)
    tokens = sum(len(tokens) for row in rows for layer in row.kept for tokens in layer)
    bytes_per_token = 2 * 8 * 4  # key and value, head_dim, float32
    assert cache.nbytes == (tokens + len(rows) * heads * room) * bytes_per_token
    buffers = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in storages(cache)}
    assert sum(buffers.values()) == cache.nbytes
    read_stepwise(lm, cache, rows)
    assert {buffer.untyped_storage().data_ptr() for buffer in storages(cache)} == set(buffers)  # written in place


def storages(cache: HeadwiseCache) -> list[Tensor]:
    return [states for layer in cache.layers for block in layer.blocks for states in (block.keys, block.values)]


def test_reads_on_beyond_its_room() -> None:
    lm = tiny.lm()
    row = make_row(lm)._replace(prompt=tiny.random_ids(1, 300, 7))
    cache = HeadwiseCache([memory(lm, row)], room=3)
    torch.testing.assert_close(read_stepwise(lm, cache, [row], 150), dense(lm, row), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_computes_as_before_afterwards(attention: str) -> None:
    lm = tiny.lm()
    lm.set_attn_implementation(attention)
    row = make_row(lm)
    before = lm(input_ids=row.context).logits
    logits = read_stepwise(lm, HeadwiseCache([memory(lm, row)]), [row])
    torch.testing.assert_close(logits, dense(lm, row), atol=2e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="other"), headwise_attention(lm):
        raise RuntimeError("other")
    assert lm.config._attn_implementation == attention
    assert torch.equal(lm(input_ids=row.context).logits, before)


def test_bfloat16() -> None:
    lm = tiny.lm().bfloat16()
    row = make_row(lm)
    states = memory(lm, row)
    cache = HeadwiseCache([states], room=8)
    logits = read_stepwise(lm, cache, [row])
    assert logits.dtype == cache.layers[0].blocks[0].keys.dtype == torch.bfloat16
    lm = lm.float()
    exact = read_stepwise(lm, HeadwiseCache([as_float(states)]), [row])
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


def as_float(states: HeadwiseStates) -> HeadwiseStates:
    keys, values = ([[t.float() for t in layer] for layer in part] for part in (states.keys, states.values))
    return HeadwiseStates(keys, values)


# ---- transformers' generate ----


def generate(lm: PreTrainedModel, cache: hf.Cache, rows: Sequence[Row], copies: int, **options: Any) -> Any:
    """As inference/generation.py does it: embeddings, mask and positions as long as what the cache says it holds."""
    embeds = lm.get_input_embeddings()(torch.cat([row.prompt for row in rows]))
    past = cache.get_seq_length()
    embeds = torch.nn.functional.pad(embeds, (0, 0, past, 0))
    positions = torch.cat([torch.nn.functional.pad(row.positions, (past, 0)) for row in rows])
    cache.batch_repeat_interleave(copies)
    torch.manual_seed(0)
    with headwise_attention(lm) if isinstance(cache, HeadwiseCache) else nullcontext():
        return lm.generate(
            inputs_embeds=embeds,
            attention_mask=embeds.new_ones(embeds.shape[:2]).long(),
            position_ids=positions,
            **as_cache(lm, cache),
            max_new_tokens=12,
            eos_token_id=None,
            **options,
        )


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "several beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generates_what_an_ordinary_cache_gives(kind: str, way: str) -> None:
    lm = make_lm(kind)
    rows = [make_row(lm, seed) for seed in range(2)]
    memories = [read_context(lm, row.context) for row in rows]
    ordinary = DynamicCache(config=lm.config)
    for layer in range(lm.config.num_hidden_layers):
        keys, values = (torch.cat([states[part][layer][:, :, ::3] for states in memories]) for part in (0, 1))
        ordinary.update(keys, values, layer)
    cache = HeadwiseCache(
        [HeadwiseStates(*([layer[0, :, ::3] for layer in part] for part in states)) for states in memories], room=20
    )
    options = WAYS[way]
    copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    written = generate(lm, cache, rows, copies, **options)
    assert torch.equal(written, generate(lm, ordinary, rows, copies, **options))
    assert len({tuple(ids) for ids in written.tolist()}) == len(written)


def test_beams_of_ragged_rows_score_as_dense_passes_do() -> None:
    lm = tiny.lm()
    rows = [make_row(lm, 0), make_row(lm, 1, 64)]
    cache = HeadwiseCache([memory(lm, row) for row in rows], room=20)
    found = generate(
        lm, cache, rows, 4, num_beams=4, num_return_sequences=4, output_scores=True,
        return_dict_in_generate=True, length_penalty=0.0, do_sample=False,
    )  # fmt: skip
    for index, (ids, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        row = rows[index // 4]
        prompt = torch.cat([row.prompt, ids[None]], dim=1)
        logits = dense(lm, row._replace(prompt=prompt))[0, row.prompt.shape[1] - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(logits.gather(1, ids[:, None]).sum(), score, atol=1e-3, rtol=1e-4)


# ---- rows that come and go ----


def test_rows_join_and_leave() -> None:
    lm = tiny.lm()
    rows = [make_row(lm, 0, 40), make_row(lm, 1, 64), make_row(lm, 2, 25), make_row(lm, 3, 40)]
    expected = [dense(lm, row) for row in rows]
    cache = HeadwiseCache()
    for row in rows[:2]:  # each reads the first two tokens of its prompt by itself
        alone = HeadwiseCache([memory(lm, row)], room=2)
        read(lm, alone, row.prompt[:, :2], row.positions[:, :2])
        cache.add([alone.row(0)], room=6)
    at = {0: 2, 1: 2, 2: 0, 3: 0}
    running = [0, 1]

    def step() -> None:
        ids = torch.cat([rows[i].prompt[:, at[i]] for i in running])[:, None]
        positions = torch.cat([rows[i].positions[:, at[i]] for i in running])[:, None]
        for i, logits in zip(running, read(lm, cache, ids, positions), strict=True):
            torch.testing.assert_close(logits[0], expected[i][0, at[i]], atol=2e-4, rtol=1e-4)
            at[i] += 1

    step()
    cache.add([memory(lm, rows[2]), memory(lm, rows[3])], room=8)
    running += [2, 3]
    step()
    cache.drop(0)
    running = [3, 1, 2]
    step()
    cache.drop(2)
    running = [3, 1]
    step()
    again = HeadwiseCache([cache.row(1), cache.row(0)])
    torch.testing.assert_close(
        read(lm, again, torch.cat([rows[i].prompt[:, at[i]] for i in (1, 3)])[:, None],
             torch.cat([rows[i].positions[:, at[i]] for i in (1, 3)])[:, None])[:, 0],
        torch.cat([expected[i][:, at[i]] for i in (1, 3)]), atol=2e-4, rtol=1e-4,
    )  # fmt: skip
    cache.drop(1)
    cache.drop(0)
    assert cache.nbytes == 0 and cache.batch_size == 0
    cache.add([memory(lm, rows[0])])
    torch.testing.assert_close(read_stepwise(lm, cache, rows[:1]), expected[0], atol=2e-4, rtol=1e-4)


def test_rows_that_share_blocks_are_selected_and_cropped() -> None:
    lm = tiny.lm()
    rows = [make_row(lm, seed) for seed in range(4)]
    cache = HeadwiseCache([memory(lm, row) for row in rows], room=8)
    read(lm, cache, torch.cat([row.prompt for row in rows]), torch.cat([row.positions for row in rows]))
    cache.crop(-8)
    assert cache.get_seq_length() == 0
    cache.batch_select_indices(torch.tensor([3, 1, 3]))
    logits = read_stepwise(lm, cache, [rows[3], rows[1], rows[3]])
    for row, found in zip([rows[3], rows[1], rows[3]], logits, strict=True):
        torch.testing.assert_close(found[None], dense(lm, row), atol=2e-4, rtol=1e-4)


# ---- what cannot be read ----


def test_refuses_what_it_would_read_wrong() -> None:
    lm = tiny.lm()
    row = make_row(lm)
    states = memory(lm, row)

    def run(cache: hf.Cache | None, rows: int = 1, mask: Tensor | None = None) -> None:
        ids, positions = row.prompt.expand(rows, -1), row.positions
        lm(input_ids=ids, position_ids=positions, attention_mask=mask, **as_cache(lm, cache), use_cache=True)

    with pytest.raises(ModelError, match="with headwise_attention"):
        run(HeadwiseCache([states]))
    with headwise_attention(lm):
        with pytest.raises(ModelError, match="HeadwiseCache only"):
            run(DynamicCache(config=lm.config))
        with pytest.raises(InputError, match=r"reads 2 rows .* its cache has 1"):
            run(HeadwiseCache([states]), rows=2)
        with pytest.raises(InputError, match="no padding"):
            run(HeadwiseCache([states]), mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))
        with pytest.raises(ModelError, match="4D mask"):
            run(HeadwiseCache([states]), mask=torch.zeros(1, 1, 8, 8))
    with pytest.raises(InputError, match="must agree"):
        HeadwiseCache([states]).add([HeadwiseStates(states.keys[:2], states.values[:2])])


def test_refuses_a_model_whose_attention_cannot_be_chosen() -> None:
    lm = hf.AutoModelForCausalLM.from_config(hf.FalconConfig(hidden_size=71, num_hidden_layers=1))
    before = lm.config._attn_implementation
    with pytest.raises(ModelError, match="FalconForCausalLM cannot be chosen"), headwise_attention(lm):
        pass
    assert lm.config._attn_implementation == before
