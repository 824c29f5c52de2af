"""What this package relies on in transformers and peft; a new version that behaves otherwise fails here first."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import DynamicCache, LlamaForCausalLM

import tiny
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.digest import sampled_digest, weights_digest

LENGTH, KEPT = 12, [1, 4, 5, 11]


@pytest.fixture(params=["sdpa", "eager"])
def lm(request) -> LlamaForCausalLM:
    model = tiny.lm()
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture
def fill(lm) -> Callable[[], DynamicCache]:
    """Makes a cache of the tokens KEPT out of LENGTH, by hand."""
    full = DynamicCache(config=lm.config)
    with torch.no_grad():
        lm(input_ids=tiny.random_ids(1, LENGTH), **as_cache(lm, full))

    def make() -> DynamicCache:
        cache = DynamicCache(config=lm.config)
        for number, layer in enumerate(full.layers):
            cache.update(layer.keys[:, :, KEPT], layer.values[:, :, KEPT], number)
        return cache

    return make


def dense(lm: LlamaForCausalLM, query: torch.Tensor) -> torch.Tensor:
    """Logits of `query` after the tokens KEPT, in one pass with a float mask."""
    ids = torch.cat([tiny.random_ids(1, LENGTH), query], dim=1)
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((ids.shape[1],) * 2, lowest).triu(1)[None, None]
    hidden = [token for token in range(LENGTH) if token not in KEPT]
    mask[:, :, LENGTH:, hidden] = lowest
    with torch.no_grad():
        return lm(input_ids=ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits[:, LENGTH:]


def read(lm: LlamaForCausalLM, cache: DynamicCache, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    positions = LENGTH + torch.arange(query.shape[1])[None]
    with torch.no_grad():
        return lm(input_ids=query, attention_mask=mask, position_ids=positions, **as_cache(lm, cache)).logits


def test_a_cache_goes_by_the_name_that_the_model_gives_it(lm) -> None:
    """That is "cache" since transformers 5.24; models that bring their own code may know "past_key_values" alone."""

    class New(LlamaForCausalLM):
        def forward(self, input_ids=None, cache=None): ...

    class Old(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None): ...

    cache = DynamicCache(config=lm.config)
    for kind, name in ((New, "cache"), (Old, "past_key_values")):
        lm.__class__ = kind
        assert as_cache(lm, cache) == {name: cache}


def test_a_cache_filled_by_hand_is_exact(lm, fill) -> None:
    """Fact 1: also with gaps between positions, when they are given."""
    query = tiny.random_ids(1, 4, seed=1)
    torch.testing.assert_close(read(lm, fill(), query, None), dense(lm, query), atol=1e-4, rtol=1e-4)


def test_float_masks_are_read_right(lm, fill) -> None:
    """Fact 5: a 4D additive float mask, by sdpa and eager attention alike."""
    query = tiny.random_ids(1, 4, seed=1)
    causal = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)
    mask = torch.cat([torch.zeros(4, len(KEPT)), causal], dim=1)[None, None]
    torch.testing.assert_close(read(lm, fill(), query, mask), dense(lm, query), atol=1e-4, rtol=1e-4)
    mask[..., 2] = torch.finfo(torch.float32).min  # and what it hides is hidden
    assert not torch.allclose(read(lm, fill(), query, mask), dense(lm, query), atol=1e-2)


def test_generate_needs_positions_and_changes_the_cache(lm, fill) -> None:
    """Fact 2: without position ids a filled cache gives other logits and no error; a cache serves one call only."""
    query = tiny.random_ids(1, 3, seed=1)
    embeds = torch.nn.functional.pad(lm.get_input_embeddings()(query), (0, 0, len(KEPT), 0))

    def first_logits(positions: torch.Tensor | None) -> torch.Tensor:
        cache = fill()
        result = lm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.long),
            position_ids=positions,
            **as_cache(lm, cache),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert cache.get_seq_length() > len(KEPT)
        return result.logits[0]

    right = dense(lm, query)[:, -1]
    torch.testing.assert_close(first_logits(LENGTH + torch.arange(-len(KEPT), 3)[None]), right, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first_logits(None), right, atol=1e-2)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_switching_adapters_freezes_the_other() -> None:
    """Fact 8: which is why every switch is followed by set_requires_grad."""
    lm = tiny.lm()
    for name in ("encoder", "decoder"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), lm, adapter_name=name)
    tuner = lm.model.layers[0].self_attn.q_proj
    tuner.set_adapter("encoder")
    assert not tuner.lora_A["decoder"].weight.requires_grad
    tuner.set_requires_grad(["encoder", "decoder"], True)
    assert tuner.lora_A["decoder"].weight.requires_grad


def test_packed_weights_are_digested_as_what_they_stand_for() -> None:
    """Tensors of quantization libraries override `dequantize` and refuse to be flattened or sliced."""

    class Packed(torch.Tensor):
        def dequantize(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor) * 2

        def flatten(self, *_: object) -> torch.Tensor:
            raise NotImplementedError

    weights = torch.arange(6.0)
    packed = {"weight": weights.as_subclass(Packed)}
    for digest in (sampled_digest, weights_digest):
        assert digest(packed) == digest({"weight": weights * 2})
    assert weights_digest(packed) != weights_digest({"weight": weights})
