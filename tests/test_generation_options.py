"""Every option of transformers' generate either gives the same after a memory as after its text, or is refused."""

import inspect
import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

import tiny
from nugget2d import Memory, Nugget2D
from nugget2d.errors import InputError, ModelError
from nugget2d.inference.options import REFUSED, GenerationOptions

TEXT, PROMPT, TOKENS = tiny.TEXT[:200], " He", 8
NAMES = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters} - {"self", "kwargs"}
OTHERS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "tokenizer", "trust_remote_code", "cache")


@pytest.fixture(scope="module")
def lm() -> Nugget2D:
    """Its encoder and decoder compute as the base."""
    return tiny.make("llama", "copies")


@pytest.fixture(scope="module")
def memory(lm: Nugget2D) -> Memory:
    """All of the text: it reads as the text does."""
    return lm.compress(TEXT, method="knorm", ratio=1)


@pytest.fixture(scope="module")
def greedy(lm: Nugget2D) -> list[int]:
    """The tokens that options avoid, prefer or end at."""
    return lm.ids_after(lm.generate(TEXT + PROMPT, max_new_tokens=TOKENS))[0].tolist()


def after_four(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.full(ids.shape[:1], ids.shape[1] >= 4)


def accepted(greedy: list[int]) -> list[dict[str, Any]]:
    """Every option, with values that change the answer where any do."""
    first, second, third = greedy[:3]
    draws = {"do_sample": True, "temperature": 2.0}
    return [
        *({"num_beams": 3}, {"num_beams": 3, "length_penalty": -3.0, "early_stopping": True}),
        *({"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never"}, {"num_beams": 2, **draws}),
        *(draws, draws | {"num_return_sequences": 3}, draws | {"top_k": 3}, draws | {"top_p": 0.5}),
        *(draws | {"min_p": 0.1}, draws | {"top_h": 0.5}, draws | {"typical_p": 0.5}),
        *(draws | {"epsilon_cutoff": 0.01}, draws | {"eta_cutoff": 0.01}, draws | {"renormalize_logits": True}),
        *({"repetition_penalty": 0.2}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}),
        *({"bad_words_ids": [[first], [second, third]]}, {"suppress_tokens": [first, second]}),
        *({"begin_suppress_tokens": [first]}, {"sequence_bias": {(first,): -9.0, (second, third): -5.0}}),
        *({"exponential_decay_length_penalty": (2, 5.0)}, {"max_time": 60.0}, {"stop_strings": ["e", "zz"]}),
        *({"eos_token_id": third}, {"eos_token_id": [third, second]}, {"eos_token_id": third, "min_new_tokens": 5}),
        {"logits_processor": LogitsProcessorList([lambda ids, scores: -scores])},
        {"stopping_criteria": [after_four]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [first, third]},
    ]


def answer(lm: Nugget2D, memory: Memory | None, stream: bool = False, **options: Any) -> str | list[str]:
    torch.manual_seed(3)
    prompt = PROMPT if memory is not None else TEXT + PROMPT
    text = lm.generate(prompt, memory=memory, max_new_tokens=TOKENS, stream=stream, **options)
    return "".join(text) if stream else text


def require_same(lm: Nugget2D, memory: Memory, options: dict[str, Any]) -> None:
    text = answer(lm, None, **options)
    assert answer(lm, memory, **options) == text, options
    if options.keys().isdisjoint({"num_beams", "num_return_sequences"}):
        assert answer(lm, memory, stream=True, **options) == text, options


def test_what_is_accepted_gives_after_a_memory_what_it_gives_after_the_text(
    lm: Nugget2D, memory: Memory, greedy: list[int]
) -> None:
    cases = accepted(greedy)
    assert {name for options in cases for name in options} == GenerationOptions.model_fields.keys() - {"max_new_tokens"}
    for options in cases:
        require_same(lm, memory, options)


@pytest.mark.slow
def test_so_it_is_with_a_trained_lm() -> None:
    nano = Nugget2D.from_pretrained("nano")
    memory = nano.compress(TEXT, method="knorm", ratio=1)
    for options in accepted(nano.ids_after(nano.generate(TEXT + PROMPT, max_new_tokens=TOKENS))[0].tolist()):
        require_same(nano, memory, options)


def test_and_what_transformers_gives_for_the_tokens_of_the_text(
    lm: Nugget2D, memory: Memory, greedy: list[int]
) -> None:
    """Options that look at no tokens, or count them from the beginning of the answer."""
    others = {"repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "stop_strings"}
    others |= {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "eos_token_id"}
    ids = torch.tensor([[lm.start_token, *lm.ids(TEXT + PROMPT)[0].tolist()]])
    compared = [options for options in accepted(greedy) if others.isdisjoint(options)]
    assert len(compared) > 15
    for options in compared:
        torch.manual_seed(3)
        rows = lm.lm.generate(ids, max_new_tokens=TOKENS, **{"top_k": 0} | options)
        texts = [lm.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in rows]
        mine = answer(lm, memory, **options)
        assert (mine if isinstance(mine, list) else [mine]) == texts, options


@pytest.mark.parametrize("name", sorted({*NAMES, *OTHERS, *REFUSED} - GenerationOptions.model_fields.keys()))
def test_all_else_is_refused_by_name(lm: Nugget2D, memory: Memory, name: str) -> None:
    for before in (memory, None):
        with pytest.raises(InputError, match=rf"option {name}[:;]"):
            lm.generate(PROMPT, memory=before, **{"max_new_tokens": 2, name: 3})


def test_every_option_of_the_installed_transformers_has_a_reason() -> None:
    private = {"transformers_version", "_from_model_config"}
    assert NAMES - private <= GenerationOptions.model_fields.keys() | REFUSED.keys()
    assert not GenerationOptions.model_fields.keys() & REFUSED.keys()


def test_a_misspelt_option_is_told_the_right_one(llama: Nugget2D) -> None:
    for wrong, right in (("temprature", "temperature"), ("num_beam", "num_beams"), ("max_tokens", "max_new_tokens")):
        with pytest.raises(InputError, match=f"no option {wrong}; is {right} meant"):
            llama.generate("a", **{wrong: 1})


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ({"temperature": 0.7}, "temperature without do_sample=True has no effect"),
        ({"top_p": 0.9, "top_k": 5}, "top_k, top_p without do_sample=True"),
        ({"early_stopping": True}, "early_stopping without num_beams"),
        ({"num_beams": 2, "num_return_sequences": 3}, "transformers cannot generate with these options"),
        ({"num_beams": 0}, "num_beams: .*greater than or equal to 1; got 0"),
        ({"num_beams": "many"}, "num_beams: .*valid integer"),
        ({"do_sample": True, "temperature": math.nan}, "temperature: .*finite"),
        ({"do_sample": True, "temperature": math.inf}, "temperature: .*finite"),
        ({"do_sample": True, "temperature": -1.0}, "temperature: "),
        ({"stop_strings": ""}, "stop_strings: "),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"max_new_tokens": None}, "max_new_tokens: .*got None"),
        ({"suppress_tokens": list(range(len(tiny.tokenizer())))}, "leave no token"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: []}, "cannot generate with these options"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [10**6]}, "cannot generate with these options"),
        ({"eos_token_id": 10**6, "exponential_decay_length_penalty": (0, 2.0)}, "cannot generate with these options"),
    ],
)
def test_values_that_cannot_be_are_refused(llama: Nugget2D, options: dict[str, Any], saying: str) -> None:
    with pytest.raises(InputError, match=saying):
        llama.generate("a", **options)
    with pytest.raises(InputError, match=saying):
        list(llama.generate("a", stream=options.get("num_beams", 1) == 1, **options))


def test_none_is_as_if_left_out_and_an_explicit_no_stays(lm: Nugget2D, memory: Memory) -> None:
    plain = answer(lm, memory)
    assert plain == answer(lm, memory, num_return_sequences=None, num_beams=None, temperature=None)
    assert plain == answer(lm, memory, do_sample=False, temperature=2.0, top_p=0.5)


# ---- the LM's own generation_config ----


def test_the_config_of_the_lm_decides_nothing_but_ends(memory: Memory) -> None:
    model = tiny.make("llama", "copies")
    plain = answer(model, memory), answer(model, None)
    drawn = answer(model, memory, do_sample=True)
    stream = "".join(model.stream(16, 4).generate("The lamp", max_new_tokens=TOKENS))
    model.lm.generation_config.update(
        do_sample=True,
        temperature=3.0,
        top_k=2,
        top_p=0.5,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(1, 300)),
        num_beams=3,
        num_return_sequences=2,
        min_length=50,
        max_length=3,
        guidance_scale=2.0,
        prompt_lookup_num_tokens=3,
        return_dict_in_generate=True,
        cache_implementation="static",
    )
    before = model.lm.generation_config.to_dict()
    assert (answer(model, memory), answer(model, None)) == plain
    assert answer(model, memory, do_sample=True) == drawn
    assert answer(model, memory, stream=True) == plain[0]
    assert "".join(model.stream(16, 4).generate("The lamp", max_new_tokens=TOKENS)) == stream
    assert model.lm.generation_config.to_dict() == before


# ---- numbers at their ends ----


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-320, 1e-46, 1e-40, 1e-6])
def test_tiny_temperatures_are_greedy(lm: Nugget2D, memory: Memory, temperature: float) -> None:
    wanted = answer(lm, memory)
    for options in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 3, "top_p": 0.5}):
        assert answer(lm, memory, temperature=temperature, **options) == wanted
        assert answer(lm, None, stream=True, temperature=temperature, **options) == wanted


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 1e5, 1e38, 3.5e38, 1e308])
def test_others_draw_what_is_allowed(lm: Nugget2D, memory: Memory, temperature: float) -> None:
    likeliest = answer(lm, memory)
    draws = {"do_sample": True, "temperature": temperature}
    allowed = lm.ids("e")[0].tolist()
    assert set(answer(lm, memory, prefix_allowed_tokens_fn=lambda row, ids: allowed, **draws)) == {"e"}
    for one in ({"top_k": 1}, {"top_p": 1e-40}, {"top_p": 5e-324}):
        assert temperature > 1e5 or answer(lm, memory, **draws, **one) == likeliest
    for every in ({"top_k": 0}, {"top_k": 10**9}, {"top_p": 1.0}):
        assert answer(lm, memory, **draws, **every) == answer(lm, memory, **draws)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_an_output_that_is_no_number_is_reported(lm: Nugget2D, options: dict[str, Any]) -> None:
    memory = lm.compress(TEXT, method="knorm", ratio=2)
    memory.values[0].data[3, 0] = math.nan
    with pytest.raises(ModelError, match="not a number"):
        answer(lm, memory, **options)


# ---- where answers end ----


def test_rows_of_several_lengths_end_where_they_end(lm: Nugget2D, memory: Memory) -> None:
    """Padding after an end is no text, and neither is the end."""
    draws = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 8}
    whole = answer(lm, memory, **draws)
    ended = answer(lm, memory, eos_token_id=list(range(100, 150)), **draws)
    assert all(longer.startswith(text) for text, longer in zip(ended, whole, strict=True))
    assert len({len(lm.ids(text)[0]) for text in ended}) > 2


@pytest.mark.parametrize("stop", ["e", "he", "\n"])
def test_an_answer_ends_before_a_stop_string(lm: Nugget2D, memory: Memory, stop: str) -> None:
    whole = answer(lm, memory, do_sample=True)
    text = answer(lm, memory, do_sample=True, stop_strings=stop)
    assert text == whole.split(stop)[0]
