"""Which LMs can be wrapped, which are refused and why; model folders; options that cannot work."""

import threading

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import ContextWarning, InputError, ModelError, OutputError
from nugget2d.inference.placement import segment_nuggets
from nugget2d.modeling.compatibility import as_cache
from nugget2d.text.segmentation import tokenize

V = len(tiny.tokenizer())
SMALL = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def wrap(lm: hf.PreTrainedModel, **options) -> Nugget2D:
    return Nugget2D.from_base(lm, tiny.tokenizer(), **({"scorer_layer": 1, "window": 32} | options))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SMALL, **GPT2))


def rope(kind: str) -> hf.PreTrainedModel:
    return tiny.lm(rope_parameters={"rope_type": kind, "factor": 2.0, "rope_theta": 1e4})


REFUSED = {
    "sliding window": (lambda: tiny.lm("mistral", sliding_window=63), "window up to 31 and context up to 63, got 32"),
    "sliding window in some layers": (lambda: tiny.lm("gemma3", sliding_window=63), "sliding_attention layers"),
    "local attention": (
        lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                **SMALL, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
            )
        ),
        "type local",
    ),
    "shared keys": (
        lambda: tiny.lm("llama", num_kv_shared_layers=1),
        "share the keys of others",
    ),
    "dynamic rotary in some layers": (
        lambda: tiny.lm(
            "gemma3",
            rope_parameters={
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        "dynamic rotary embeddings",
    ),
    "more than a language model": (
        lambda: hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                text_config=tiny.lm("gemma3").config,
                vision_config={
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 1,
                    "image_size": 8,
                    "patch_size": 4,
                },
                mm_tokens_per_image=4,
            )
        ),
        "load its text part alone",
    ),
    "encoder-decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=V, d_model=32, d_ff=48, num_layers=1, num_heads=2)
        ),
        "not a decoder-only",
    ),
    "dynamic rotary": (lambda: rope("dynamic"), "dynamic rotary embeddings"),
    "state space": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1)),
        "one key and value per token",
    ),
    "no positions": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL, hidden_size=32, n_layer=1, n_head=2)),
        "position_ids",
    ),
    "alibi": (lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL, **PLAIN, alibi=True)), "ALiBi"),
}


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
@pytest.mark.parametrize("build, reason", REFUSED.values(), ids=REFUSED.keys())
def test_models_that_cannot_work_are_refused(build, reason: str, adapters: str) -> None:
    with pytest.raises(ModelError, match=reason):
        wrap(build(), adapters=adapters)


def test_choices_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(ModelError, match="scorer_layer is 9"):
        wrap(tiny.lm(), scorer_layer=9)
    with pytest.raises(ModelError, match="set lora_targets"):
        wrap(gpt2(), adapters="lora", lora_targets=("q_proj",))
    wrap(gpt2(), adapters="lora", lora_targets=("c_attn",), lora_rank=2)
    for kind, options in (("gpt2", {"window": 1025}), ("opt", {"context": 1025})):
        with pytest.raises(ModelError, match="has 1024 positions"):
            wrap(tiny.lm(kind), **options)
    with pytest.raises(InputError, match="tokenizer"):
        Nugget2D.from_base(tiny.lm())


@pytest.mark.parametrize(
    "build",
    [
        gpt2,
        lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**SMALL, **GPT2, rotary_dim=8)),
    ],
    ids=["learned positions", "rotary inside attention"],
)
def test_keys_that_cannot_move_are_read_where_they_are(build) -> None:
    model = wrap(build(), adapters="copies")
    text = tiny.TEXT[:60]
    one = model.compress(text, ratio=1, exact=True)
    assert len(one.segments) == 1
    assert model.reconstruct(one) == text
    model.generate("The", memory=one, max_new_tokens=3)
    several = Memory.join([one, one])
    assert model.reconstruct(several) == text * 2  # each segment at its own positions
    with pytest.raises(ModelError, match="one segment only"):
        model.generate("The", memory=several, max_new_tokens=3)


# ---- models whose positions end ----


def with_window(kind: str, adapters: str, tokens: int) -> Nugget2D:
    """The same weights with a sliding window of `tokens`; 64 just leaves room for segments of 32."""
    lm, options = tiny.lm(kind, sliding_window=tokens), {"scorer_layer": 1, "lora_rank": 2}
    torch.manual_seed(1)
    return Nugget2D.from_base(lm, tiny.tokenizer(), adapters=adapters, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind, adapters", [("mistral", "lora"), ("gemma3", "copies")])
def test_a_sliding_window_is_read_exactly_to_its_end(kind: str, adapters: str) -> None:
    """Every state and every position is in use, which a window by cache index would get wrong."""
    model, full = with_window(kind, adapters, 64), with_window(kind, adapters, 4096)
    assert (model.config.window, model.config.context, model.max_positions) == (32, 64, 64)
    ids = tiny.random_ids(2, 32)
    with torch.no_grad():
        everything = model.encode(ids, [32, 32], [32, 32]).nuggets
        same(model.decode(everything, ids, prompt=None), full.decode(everything, ids, prompt=None))
        text = tiny.random_ids(1, 32, seed=3)
        later = tiny.random_ids(1, 32, seed=4)
        nuggets = model.encode(text, [32], [32]).nuggets
        with model.parameters_by_role.role("base") as lm:
            wanted = lm(input_ids=torch.cat([text, later], dim=1)).logits[:, 32:]
        same(model.decode(nuggets, later, prompt=None, start=32), wanted)
        with pytest.raises(InputError, match="65 positions are needed"):
            model.decode(nuggets, later, prompt=None, start=33)
    memory = model.compress(["The dog.", model.text(ids[0].tolist())], ratio=1)
    assert model.reconstruct(memory) == full.reconstruct(memory)


@pytest.mark.slow
@pytest.mark.parametrize("kind, adapters", [("mistral", "lora"), ("gemma3", "copies")])
def test_generation_stops_where_a_sliding_window_ends(kind: str, adapters: str) -> None:
    model = with_window(kind, adapters, 64)
    text = "The dog looked up."
    memory = model.compress(text, ratio=2)
    room = 64 - memory.num_tokens - 1
    ids, nuggets = model.ids("S"), segment_nuggets(model, [(memory, 0)])
    for _ in range(room):
        logits = model.decode(nuggets, ids, prompt="continue", start=memory.num_tokens)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    wanted = model.text(ids[0, 1:].tolist())
    assert tiny.END not in wanted
    assert model.generate("S", memory=memory, max_new_tokens=room) == wanted
    with pytest.raises(InputError, match="65 positions are needed"):
        model.generate("S", memory=memory, max_new_tokens=room + 1)
    longer = model.compress(tiny.TEXT[:120], ratio=2)
    with pytest.warns(ContextWarning, match="only the last"):
        assert model.generate("S", memory=longer, max_new_tokens=20)
    assert model.generate("S", max_new_tokens=80)  # without a memory, transformers slides the window


def test_learned_positions_end() -> None:
    model = wrap(gpt2())
    memory = model.compress("The dog looked up.", ratio=2)
    room = 128 - memory.num_tokens - 1
    assert model.generate("S", memory=memory, max_new_tokens=room)
    for call in (
        lambda: model.generate("S", memory=memory, max_new_tokens=room + 1),
        lambda: model.generate("S", max_new_tokens=200),
        lambda: model.score(tiny.TEXT[:500]),
        lambda: model.score(tiny.TEXT[:500], memory=memory),
        lambda: model.encode(tiny.random_ids(1, 129), [129], [3]),
    ):
        with pytest.raises(InputError, match="positions are needed"):
            call()


@pytest.mark.parametrize(
    "build",
    [
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **PLAIN, intermediate_size=48)),
        lambda: tiny.lm(
            rope_parameters={
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        ),
        lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, **PLAIN, intermediate_size=48)),
        lambda: hf.Glm4ForCausalLM(
            hf.Glm4Config(**SMALL, **PLAIN, intermediate_size=48, num_key_value_heads=2, head_dim=16, pad_token_id=0)
        ),
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(
                **SMALL,
                **PLAIN,
                intermediate_size=48,
                num_key_value_heads=2,
                head_dim=16,
                sliding_window=128,
                num_local_experts=2,
                num_experts_per_tok=1,
            )
        ),
    ],
    ids=["partial rotary", "yarn", "cohere", "glm4", "gpt-oss"],
)
def test_other_rotary_models_move_their_keys(build) -> None:
    """k = n in two segments: a continuation is read as if the second segment had been encoded at its place."""
    model = wrap(build(), adapters="copies")
    keys = model.compress("The dog looked up.", ratio=1).keys
    moved = model.rotation([states.restore()[None] for states in keys], torch.full((1, keys[0].data.shape[1]), 11))
    ids = model.ids("The dog looked up.")
    cache = hf.DynamicCache(config=model.lm.config)
    positions = 11 + torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        model.lm(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, **as_cache(model.lm, cache)
        )
    for mine, layer in zip(moved, cache.layers, strict=True):
        torch.testing.assert_close(mine, layer.keys, atol=1e-4, rtol=1e-4)


def test_a_half_precision_model_works_throughout() -> None:
    model = tiny.trained("qwen2", "lora").to(torch.bfloat16)
    memory = model.compress(tiny.TEXT[:200], ratio=4)
    assert memory.dtype == "bfloat16"
    assert memory.token_nbytes == sum(2 * 2 * heads * width for heads, width in model.readable.kv_shape)
    assert isinstance(model.generate("The", memory=memory, max_new_tokens=4), str)
    assert model.score("The", memory=memory) > 0
    encoded = model.encode(tiny.random_ids(2, 20), [20, 12], [5, 3])
    model.decode(encoded.nuggets, tiny.random_ids(2, 6), prompt="reconstruct").float().sum().backward()
    assert model.scorer.output.weight.grad.abs().sum() > 0


# ---- folders ----


def test_unknown_and_damaged_models_are_refused(tmp_path) -> None:
    for name in ("no-such-model", tmp_path / "missing", "someone/unknown-model"):
        with pytest.raises(ModelError):
            Nugget2D.from_pretrained(name)
    with pytest.raises(ModelError, match="is no model"):
        Nugget2D.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load base"):
        Nugget2D.from_base(tmp_path)


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
def test_damaged_files_of_a_model_are_refused(adapters: str, tmp_path) -> None:
    for number, file in enumerate(
        [
            "nugget2d.json",
            "nugget2d.safetensors",
            "base/model.safetensors",
            "base/config.json",
            "tokenizer/tokenizer.json",
        ]
    ):
        folder = tmp_path / str(number)
        tiny.make("llama", adapters).save_pretrained(folder)
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelError):
            Nugget2D.from_pretrained(folder)
        (folder / file).unlink()
        with pytest.raises(ModelError):
            Nugget2D.from_pretrained(folder)


def test_a_base_with_weights_missing_is_refused(tmp_path) -> None:
    """transformers alone would go on with random ones."""
    tiny.make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="no weights for"):
        Nugget2D.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path) -> None:
    for number, adapters in enumerate(tiny.ADAPTERS):
        tiny.make("llama", adapters).save_pretrained(tmp_path / str(number))
    weights = (tmp_path / "0" / "nugget2d.safetensors").read_bytes()
    (tmp_path / "1" / "nugget2d.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="does not fit"):
        Nugget2D.from_pretrained(tmp_path / "1")


def test_a_model_cannot_be_saved_over_a_file(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write model"):
        tiny.make().save_pretrained(tmp_path / "file")


def test_a_base_folder_can_be_wrapped(tmp_path) -> None:
    tiny.lm().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = Nugget2D.from_base(tmp_path, adapters="copies", scorer_layer=1, window=32)
    assert model.fingerprint.name == str(tmp_path)
    assert model.compress("The dog.", ratio=2).num_nuggets > 0


# ---- calls that cannot work ----


def test_bad_calls_are_refused(llama: Nugget2D) -> None:
    memory = llama.compress("The dog.", ratio=2)
    calls = [
        lambda: llama.compress(""),
        lambda: llama.compress(["fine", ""]),
        lambda: llama.compress(b"bytes"),
        lambda: llama.compress([None]),
        lambda: llama.compress("a", ratio=0.5),
        lambda: llama.compress("a", selection="best"),
        lambda: llama.compress("a", dtype="int4"),
        lambda: llama.generate(),
        lambda: llama.generate("a", max_new_tokens=0),
        lambda: llama.generate("a", memory=memory, no_such_option=1),
        lambda: llama.generate("a", memory=memory, do_sample=True, temperature=-1.0),
        lambda: llama.generate("a", memory=memory, stream=True, num_beams=2),
        lambda: llama.score(""),
        lambda: llama.score("", memory=memory),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(InputError):
            call()
            pytest.fail(f"call {number} went through")
    assert llama.compress([]) == []


# ---- streams run in a thread of their own ----


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
def test_other_calls_during_a_stream_disturb_nothing(adapters: str) -> None:
    model = tiny.trained("llama", adapters)
    text = tiny.TEXT[:200]
    memory = model.compress(text, ratio=4)
    wanted = model.generate("The", memory=memory, max_new_tokens=60)
    stream = model.generate("The", memory=memory, max_new_tokens=60, stream=True)
    pieces = [next(stream)]
    again = model.compress(text, ratio=4)
    assert again.positions == memory.positions
    assert all(torch.equal(a.data, b.data) for a, b in zip(again.keys, memory.keys, strict=True))
    assert "".join([*pieces, *stream]) == wanted


@pytest.mark.parametrize("adapters", tiny.ADAPTERS)
def test_a_role_belongs_to_one_thread_at_a_time(adapters: str) -> None:
    sets = tiny.make("llama", adapters).parameters_by_role
    entered = threading.Event()

    def other() -> None:
        with sets.role("decoder"):
            entered.set()

    thread = threading.Thread(target=other)
    with sets.role("encoder"), sets.role("base"):
        thread.start()
        assert not entered.wait(0.1)
    thread.join()
    assert entered.is_set()


def test_an_abandoned_stream_stops() -> None:
    model = tiny.trained("llama", "lora")
    before = threading.active_count()
    stream = model.generate("The", memory=model.compress("The dog.", ratio=2), max_new_tokens=4000, stream=True)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert model.compress("The dog.", ratio=2).num_nuggets > 0


def test_an_error_in_a_stream_reaches_the_reader(llama: Nugget2D) -> None:
    with pytest.raises(InputError):
        list(llama.generate("The", stream=True, no_such_option=1))


def test_a_stream_goes_on_behind_a_line_end(llama: Nugget2D) -> None:
    text = "one, two\n three\n\nfour"
    ids = tokenize(llama.tokenizer, text)[0]

    def recite(before: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([ids[before.shape[1]]]), 0)

    options = {"logits_processor": hf.LogitsProcessorList([recite])}
    pieces = llama.generate("The", max_new_tokens=len(ids), stream=True, **options)
    assert "".join(pieces) == text


def test_a_name_too_long_is_an_unknown_model() -> None:
    for load in (Nugget2D.from_pretrained, Nugget2D.from_base):
        with pytest.raises(ModelError, match="cannot look up"):
            load("n" * 5000)
