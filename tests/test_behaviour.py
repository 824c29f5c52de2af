"""What every compressor guarantees, over kinds of LM and kinds of parameters: one suite, tiny random models."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import ContextWarning, ModelError
from nugget2d.inference.placement import segment_nuggets
from nugget2d.inference.prefix import prefix
from nugget2d.methods.nugget.encoding import pad
from nugget2d.modeling.cache import Nuggets, cached_states, gather_nuggets
from nugget2d.modeling.compatibility import as_cache
from nugget2d.modeling.losses import token_losses

SELECTIONS = ("learned", "window", "even", "random", "punctuation")
close = pytest.approx


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def full_logits(model: Nugget2D, ids: torch.Tensor, **inputs: object) -> torch.Tensor:
    with torch.no_grad(), model.parameters_by_role.role("base") as lm:
        return lm(input_ids=ids, **inputs).logits


def placed(model: Nugget2D, memory: Memory) -> tuple[Nuggets, int]:
    """What a memory puts before a prompt: its states, and the position after them."""
    before = prefix(model, memory)
    return Nuggets(*cached_states(before.cache)), before.position


# ---- reading nuggets is attention ----


@pytest.mark.parametrize("rows", [1, 3])
def test_all_tokens_read_as_full_attention(plain: Nugget2D, rows: int) -> None:
    ids = tiny.random_ids(rows, 30)
    with torch.no_grad():
        encoded = plain.encode(ids[:, :20], [20] * rows, [20] * rows)
        read = plain.decode(encoded.nuggets, ids[:, 20:], prompt=None, start=20)
    same(read, full_logits(plain, ids)[:, 20:])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_subset_reads_as_one_pass_with_a_dense_mask(plain: Nugget2D, selection: str) -> None:
    ids = tiny.random_ids(2, 30)
    with torch.no_grad():
        encoded = plain.encode(ids[:, :20], [20, 20], [6, 6], selection=selection)
        read = plain.decode(encoded.nuggets, ids[:, 20:], prompt=None, start=20)
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((30, 30), lowest).triu(1).repeat(2, 1, 1, 1)
    for row, index in enumerate(encoded.index):
        hidden = torch.ones(20, dtype=torch.bool)
        hidden[index] = False
        mask[row, 0, 20:, :20].masked_fill_(hidden, lowest)
    positions = torch.arange(30).expand(2, -1)
    same(read, full_logits(plain, ids, attention_mask=mask, position_ids=positions)[:, 20:])


def test_decoding_with_a_prompt_equals_the_lm_on_the_same_embeddings(plain: Nugget2D) -> None:
    ids = tiny.random_ids(1, 12)
    with torch.no_grad():
        encoded = plain.encode(ids, [12], [12])
        read = plain.decode(encoded.nuggets, ids[:, :5], prompt="continue", start=12)
        embeds = torch.cat([plain.embed(ids), plain.prompt("continue", 1), plain.embed(ids[:, :5])], dim=1)
        with plain.parameters_by_role.role("decoder") as lm:
            whole = lm(inputs_embeds=embeds).logits[:, 12:]
    same(read, whole)


# ---- padding changes nothing ----


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_padded_batch_equals_single_rows(model: Nugget2D, selection: str) -> None:
    rows = [tiny.random_ids(1, n, seed=n)[0].tolist() for n in (5, 17, 29)]
    lengths, counts = [5, 17, 29], [2, 3, 7]
    ids = pad(rows, model.device)
    query = tiny.random_ids(3, 6)
    with torch.no_grad():
        batch = model.encode(ids, lengths, counts, selection=selection)
        logits = model.decode(batch.nuggets, query, prompt="continue", start=torch.tensor(lengths))
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            alone = model.encode(torch.tensor([rows[row]]), [length], [count], selection=selection)
            assert alone.index[0].tolist() == batch.index[row, -count:].tolist()
            for mine, theirs in zip(alone.nuggets.keys, batch.nuggets.keys, strict=True):
                same(mine[0], theirs[row, :, -count:])
                assert not theirs[row, :, :-count].any()
            single = model.decode(alone.nuggets, query[row : row + 1], prompt="continue", start=length)
            same(single[0], logits[row])


def test_padding_does_not_leak_through_the_additive_mask(model: Nugget2D) -> None:
    """The training path: a float mask with the scorer's bias, on a padded batch."""
    rows = [tiny.random_ids(1, n, seed=n)[0].tolist() for n in (7, 19)]
    batch = model.encode(pad(rows, model.device), [7, 19], [2, 5])
    assert batch.nuggets.bias is not None
    query = tiny.random_ids(2, 6)
    logits = model.decode(batch.nuggets, query, prompt="reconstruct")
    without = model.decode(
        Nuggets(batch.nuggets.keys, batch.nuggets.values, batch.nuggets.valid), query, prompt="reconstruct"
    )
    same(logits, without)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("selection", ["learned", "random"])
def test_compress_and_reconstruct_are_the_same_in_any_batch(model: Nugget2D, selection: str, exact: bool) -> None:
    texts = ["Short.", tiny.TEXT[:90], tiny.TEXT[:300], "Beans, peas."]
    together = model.compress(texts, ratio=5, selection=selection, exact=exact)
    back = model.reconstruct(together)
    for text, memory, read in zip(texts, together, back, strict=True):
        alone = model.compress(text, ratio=5, selection=selection, exact=exact)
        assert alone.positions == memory.positions
        for mine, theirs in zip((*alone.keys, *alone.values), (*memory.keys, *memory.values), strict=True):
            same(mine.data, theirs.data)
        assert model.reconstruct(alone) == read
        assert not exact or read == text


def test_compressing_twice_gives_the_same_bytes(model: Nugget2D) -> None:
    for selection in SELECTIONS:
        first, second = (model.compress(tiny.TEXT[:200], ratio=4, selection=selection) for _ in range(2))
        assert first.positions == second.positions
        assert all(torch.equal(a.data, b.data) for a, b in zip(first.keys, second.keys, strict=True))


# ---- kept memories ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_stored_and_loaded_equals_in_memory(model: Nugget2D, dtype: str, tmp_path) -> None:
    memory = model.compress(tiny.TEXT[:300], ratio=4)
    kept = memory.to(dtype)
    size = memory.save(tmp_path / "a.nugget", dtype=dtype)
    loaded = Memory.load(tmp_path / "a.nugget")
    assert size == (tmp_path / "a.nugget").stat().st_size
    for mine, theirs in zip((*kept.keys, *kept.values), (*loaded.keys, *loaded.values), strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert torch.equal(mine.restore(), theirs.restore())
    for name in ("num_tokens", "num_nuggets", "ratio", "nbytes", "full_nbytes", "positions", "spans", "segments"):
        assert getattr(loaded, name) == getattr(kept, name), name
    assert torch.equal(loaded.scores, kept.scores)
    assert loaded.fingerprint == kept.fingerprint
    assert model.reconstruct(loaded) == model.reconstruct(kept)
    assert model.generate("The", memory=loaded, max_new_tokens=8) == model.generate(
        "The", memory=kept, max_new_tokens=8
    )
    assert model.score("The dog.", memory=loaded) == model.score("The dog.", memory=kept)


def test_compress_to_a_dtype_equals_converting_afterwards(model: Nugget2D) -> None:
    text = tiny.TEXT[:150]
    for dtype in ("bfloat16", "int8"):
        direct, converted = model.compress(text, ratio=4, dtype=dtype), model.compress(text, ratio=4).to(dtype)
        assert all(torch.equal(a.data, b.data) for a, b in zip(direct.keys, converted.keys, strict=True))


def test_reading_leaves_the_memory_as_it_was(model: Nugget2D) -> None:
    memory = model.compress(tiny.TEXT[:200], ratio=4)
    before = [states.data.clone() for states in (*memory.keys, *memory.values)]
    for _ in range(2):
        results = (
            model.reconstruct(memory),
            model.generate("And", memory=memory, max_new_tokens=6),
            "".join(model.generate("And", memory=memory, max_new_tokens=6, stream=True)),
            model.score("And so on", memory=memory),
        )
    assert results == (
        model.reconstruct(memory),
        model.generate("And", memory=memory, max_new_tokens=6),
        results[1],
        model.score("And so on", memory=memory),
    )
    assert all(torch.equal(a, b.data) for a, b in zip(before, (*memory.keys, *memory.values), strict=True))


# ---- joining ----


def test_joined_keys_equal_encoding_at_the_later_positions(case, plain: Nugget2D) -> None:
    first, second = (plain.compress(text, ratio=3) for text in ("A dog looked up.", "Rain before noon, wind at dusk."))
    if not tiny.KINDS[case[0]].movable:
        with pytest.raises(ModelError, match="one segment only"):
            placed(plain, Memory.join([first, second]))
        return
    joined, _ = placed(plain, Memory.join([first, second]))
    ids = plain.ids("Rain before noon, wind at dusk.")
    cache = DynamicCache(config=plain.lm.config)
    with torch.no_grad(), plain.parameters_by_role.role("encoder") as body:
        body(
            inputs_embeds=plain.embed(ids),
            attention_mask=torch.ones_like(ids),
            position_ids=first.num_tokens + torch.arange(ids.shape[1])[None],
            **as_cache(body, cache),
        )
    there = gather_nuggets(
        cache, second.local_positions.long()[None], torch.ones(1, second.num_nuggets, dtype=torch.bool)
    )
    for mine, theirs in zip(joined.keys, there.keys, strict=True):
        same(mine[:, :, first.num_nuggets :], theirs)
    for mine, theirs in zip(joined.values, there.values, strict=True):
        same(mine[:, :, first.num_nuggets :], theirs)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_join_rebases_and_loses_nothing(model: Nugget2D, dtype: str) -> None:
    texts = [tiny.TEXT[:60], tiny.TEXT[60:200], tiny.TEXT[200:230]]
    parts = model.compress(texts, ratio=4, dtype=dtype)
    joined = Memory.join(parts)
    tokens = chars = 0
    positions, spans = [], []
    for part, text in zip(parts, texts, strict=True):
        positions += [tokens + p for p in part.positions]
        spans += [(chars + a, chars + b) for a, b in part.spans]
        tokens += part.num_tokens
        chars += len(text)
    assert (joined.num_tokens, joined.num_chars) == (tokens, chars)
    assert joined.positions == positions == sorted(set(positions))
    assert joined.spans == spans
    for layer in range(len(joined.keys)):
        assert torch.equal(joined.keys[layer].restore(), torch.cat([p.keys[layer].restore() for p in parts], dim=1))
        assert torch.equal(joined.values[layer].restore(), torch.cat([p.values[layer].restore() for p in parts], dim=1))
    assert model.reconstruct(joined) == "".join(model.reconstruct(parts))
    nested = Memory.join([Memory.join(parts[:2]), parts[2]])
    assert (nested.positions, nested.segments) == (joined.positions, joined.segments)


def test_spans_are_the_chosen_tokens(case, model: Nugget2D) -> None:
    text = "Tea 🫖 and «naïve» Ωmega. " + tiny.TEXT[:200]
    memory = model.compress(text, ratio=3)
    assert (len(memory.segments) > 1) == tiny.KINDS[case[0]].movable
    for segment in memory.segments:
        assert 0 <= segment.start < segment.end <= len(text)
    assert [memory.segments[0].start, memory.segments[-1].end] == [0, len(text)]
    for (start, end), position in zip(memory.spans, memory.positions, strict=True):
        assert 0 <= start < end <= len(text)
        assert 0 <= position < memory.num_tokens
    one = model.compress("The dog", ratio=1)
    assert "".join(one_text for one_text in ("The dog"[a:b] for a, b in one.spans)) == "The dog"


@pytest.mark.parametrize("ratio", [1, 1.5, 2, 4, 7.3, 10, 20, 50])
def test_one_model_serves_every_ratio(model: Nugget2D, ratio: float) -> None:
    memory = model.compress(tiny.TEXT[:400], ratio=ratio)
    wanted = -(-memory.num_tokens // ratio)
    assert memory.num_nuggets == max(wanted, len(memory.segments))
    assert memory.nbytes == memory.full_nbytes * memory.num_nuggets // memory.num_tokens
    assert isinstance(model.reconstruct(memory), str)


# ---- gradients ----


def loss_of(model: Nugget2D, ids: torch.Tensor, selection: str) -> torch.Tensor:
    encoded = model.encode(ids, [ids.shape[1]] * len(ids), [5] * len(ids), selection=selection)
    logits = model.decode(encoded.nuggets, ids[:, :-1], prompt="reconstruct")
    return token_losses(logits, ids).mean()


def gradients(model: Nugget2D) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("selection", ["learned", "window"])
def test_gradient_reaches_both_parameter_sets_and_the_scorer(case, selection: str) -> None:
    model = tiny.trained(*case)
    loss_of(model, tiny.random_ids(2, 20), selection).backward()
    sets = model.parameters_by_role
    used = [p for p in sets.encoder_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    # the last layer's output, feed-forward and norm feed nothing that is kept
    assert len(used) >= len(sets.encoder_parameters()) * 0.6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sets.decoder_parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.scorer.parameters() if p is not model.scorer.output.bias)
    assert model.flag.grad.abs().sum() > 0
    assert model.prompts["reconstruct"].grad.abs().sum() > 0


def test_lora_leaves_the_base_frozen() -> None:
    model = tiny.trained("llama", "lora")
    loss_of(model, tiny.random_ids(2, 20), "learned").backward()
    for name, parameter in model.parameters_by_role.lm.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


def test_encoder_and_decoder_parameters_share_nothing(model: Nugget2D) -> None:
    sets = model.parameters_by_role
    assert not {id(p) for p in sets.encoder_parameters()} & {id(p) for p in sets.decoder_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_straight_through_bias(case, attention: str) -> None:
    """s - sg(s) leaves the forward value alone; its gradient is that of an additive bias on the nugget's logits."""
    model = tiny.trained(*case)
    model.lm.set_attn_implementation(attention)
    ids = tiny.random_ids(1, 16)
    with torch.no_grad():
        encoded = model.encode(ids, [16], [4])
    count = encoded.nuggets.count

    def loss(bias: torch.Tensor | None) -> torch.Tensor:
        nuggets = Nuggets(encoded.nuggets.keys, encoded.nuggets.values, None, bias)
        return token_losses(model.decode(nuggets, ids[:, :-1], prompt="reconstruct"), ids).double().mean()

    scores = torch.randn(1, count, requires_grad=True)
    value = loss(scores - scores.detach())
    value.backward()
    assert value.item() == close(loss(None).item(), abs=1e-6)
    step = 0.01  # norms and softmax compute in float32: a smaller step drowns in rounding
    for nugget in range(count):
        bump = torch.zeros(1, count)
        bump[0, nugget] = step
        with torch.no_grad():
            slope = (loss(bump) - loss(-bump)) / (2 * step)
        assert scores.grad[0, nugget].item() == close(slope.item(), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("selection", ["learned", "even"])
def test_checkpointed_gradients_equal_plain_ones(case, selection: str) -> None:
    model = tiny.trained(*case)
    ids = tiny.random_ids(2, 20)
    loss_of(model, ids, selection).backward()
    plain = gradients(model)
    model.zero_grad()
    checkpoint(loss_of, model, ids, selection, use_reentrant=False).backward()
    saved = gradients(model)
    assert plain.keys() == saved.keys()
    for name in plain:
        same(plain[name], saved[name], 1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_precision_trains_everything(case, attention: str) -> None:
    """Under autocast the mask that carries the scorer's gradient must have the dtype of the queries."""
    model = tiny.trained(*case)
    model.lm.set_attn_implementation(attention)
    ids = tiny.random_ids(2, 20)
    wanted = loss_of(model, ids, "learned").item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, ids, "learned")
    loss.backward()
    assert loss.item() == close(wanted, rel=0.05)
    assert model.scorer.output.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters_by_role.decoder_parameters())


# ---- writing on ----


def test_generate_equals_a_loop_of_single_steps(case, model: Nugget2D) -> None:
    memory = model.compress(tiny.TEXT[:250], ratio=4)
    assert (len(memory.segments) > 1) == tiny.KINDS[case[0]].movable
    ids = model.ids("The engineer")
    nuggets, _ = placed(model, memory)
    for _ in range(8):
        with torch.no_grad():
            logits = model.decode(nuggets, ids, prompt="continue", start=memory.num_tokens)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    wanted = model.text(ids[0, model.ids("The engineer").shape[1] :].tolist())
    assert tiny.END not in wanted
    assert model.generate("The engineer", memory=memory, max_new_tokens=8) == wanted


def test_generate_without_memory_is_the_base_alone(model: Nugget2D) -> None:
    ids = torch.cat([torch.tensor([[model.start_token]]), model.ids("The sea")], dim=1)
    prompt = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, full_logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert model.generate("The sea", max_new_tokens=6) == model.text(ids[0, prompt:].tolist())


def test_sampling_follows_the_seed(model: Nugget2D) -> None:
    memory = model.compress(tiny.TEXT[:100], ratio=4)

    def sample(seed: int) -> str:
        torch.manual_seed(seed)
        return model.generate("", memory=memory, max_new_tokens=12, do_sample=True, temperature=2.0, top_k=0)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_beams_read_the_memory(model: Nugget2D) -> None:
    """One beam is greedy; two beams find a continuation at least as likely, and every beam sees the memory."""
    memory = model.compress(tiny.TEXT[:100], ratio=4)
    beams = model.generate("Sails", memory=memory, max_new_tokens=6, num_beams=2)
    assert beams == model.generate("Sails", memory=memory, max_new_tokens=6, num_beams=2)
    one = model.generate("Sails", memory=memory, max_new_tokens=1)
    assert model.generate("Sails", memory=memory, max_new_tokens=1, num_beams=3) == one


def test_several_sequences_are_those_of_the_lm_on_the_whole_text(plain: Nugget2D) -> None:
    """k = n: transformers' own beams and samples over the text itself, soft prompt included."""
    text, prompt = "Rain before noon. ", "The dog"
    memory = plain.compress(text, ratio=1)
    embeds = torch.cat([plain.embed(plain.ids(text)), plain.prompt("continue", 1), plain.embed(plain.ids(prompt))], 1)
    ways = (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5, "top_k": 0},
    )
    for options in ways:
        torch.manual_seed(5)
        with plain.parameters_by_role.role("base") as lm:
            rows = lm.generate(
                inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=6, **options
            )
        torch.manual_seed(5)
        texts = plain.generate(prompt, memory=memory, max_new_tokens=6, **options)
        assert texts == [plain.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        assert len(set(map(tuple, rows.tolist()))) > 1


def test_streamed_pieces_are_the_whole(model: Nugget2D) -> None:
    memory = model.compress(tiny.TEXT[:100], ratio=4)
    for prompt in ("", "The keeper "):
        whole = model.generate(prompt, memory=memory, max_new_tokens=20)
        assert "".join(model.generate(prompt, memory=memory, max_new_tokens=20, stream=True)) == whole


def test_score_is_the_mean_loss_of_the_lm(plain: Nugget2D) -> None:
    """k = n: scoring after a memory equals scoring after the text, soft prompt apart."""
    text = "He planted beans."
    ids = torch.cat([torch.tensor([[plain.start_token]]), plain.ids(text)], dim=1)
    losses = token_losses(full_logits(plain, ids)[:, :-1], ids[:, 1:])
    assert plain.score(text) == close(losses.mean().item(), abs=1e-4)
    memory = plain.compress("The wall. ", ratio=1)
    embeds = torch.cat(
        [plain.embed(plain.ids("The wall. ")), plain.prompt("continue", 1), plain.embed(plain.ids(text))], 1
    )
    with torch.no_grad():
        logits = plain.lm(inputs_embeds=embeds).logits[:, memory.num_tokens : -1]
    assert plain.score(text, memory=memory) == close(token_losses(logits, plain.ids(text)).mean().item(), abs=1e-4)


# ---- checkpoints ----


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_model_is_the_same_model(model: Nugget2D, dtype, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m", dtype=dtype)
    again = Nugget2D.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    assert again.legacy_fingerprint == model.legacy_fingerprint
    memory = model.compress(tiny.TEXT[:200], ratio=4)
    again.reconstruct(memory)  # its fingerprint is accepted
    if dtype is None:
        assert again.reconstruct(memory) == model.reconstruct(memory)
        wanted = model.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_a_copied_model_is_independent(model: Nugget2D) -> None:
    other = copy.deepcopy(model)
    memory = model.compress(tiny.TEXT[:60], ratio=4)
    assert other.reconstruct(memory) == model.reconstruct(memory)
    with torch.no_grad():
        other.lm.get_input_embeddings().weight.zero_()
    assert model.reconstruct(memory) == model.reconstruct(memory) != other.reconstruct(memory)


def test_segments_read_with_int8_scales_of_their_own(model: Nugget2D) -> None:
    """Rows of a batch with different segments restore their own scales."""
    memory = model.compress(tiny.TEXT[:250], ratio=4, dtype="int8")
    rows = [(memory, number) for number in range(len(memory.segments))]
    batch = segment_nuggets(model, rows)
    start = 0
    for row, segment in enumerate(memory.segments):
        own = memory.keys[1].restore()[:, start : start + segment.num_nuggets]
        same(batch.keys[1][row, :, -segment.num_nuggets :], own)
        start += segment.num_nuggets


def test_of_a_memory_beyond_the_context_the_last_segments_are_read(llama: Nugget2D) -> None:
    memory = llama.compress(tiny.TEXT, ratio=3)
    segments = memory.segments
    limit = segments[-1].num_tokens + segments[-2].num_tokens
    short = Nugget2D(llama.lm, llama.tokenizer, llama.config.model_copy(update={"context": limit + 1}))
    short.load_state_dict(llama.state_dict())
    with pytest.warns(ContextWarning, match=f"last 2 of its {len(segments)} segments"):
        nuggets, end = placed(short, memory)
    assert end == limit
    whole, _ = placed(llama, memory)
    assert nuggets.count == segments[-1].num_nuggets + segments[-2].num_nuggets
    moved = llama.rotation(nuggets.keys, torch.full((1, nuggets.count), memory.num_tokens - limit))
    for layer, keys in enumerate(moved):
        assert torch.allclose(keys, whole.keys[layer][:, :, -nuggets.count :], atol=1e-4)
    with pytest.warns(ContextWarning):
        assert short.score("It rained.", memory=memory) > 0
