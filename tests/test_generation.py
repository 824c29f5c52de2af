"""Where answers end: at the tokenizer's end of text, and at every end token that the LM itself names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from cli_fixtures import save_tiny_model
from nugget2d import Nugget2D
from nugget2d.cli.app import app
from nugget2d.errors import InputError
from serving import serving

PROMPT = "The lamp"


class Recorded:
    """The tokens of every call of transformers' generate."""

    def __init__(self, model: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[list[int]] = []
        generate = model.lm.generate

        def recording(**arguments: Any) -> Any:
            ids = generate(**arguments)
            self.ids.append(ids[0].tolist())
            return ids

        monkeypatch.setattr(model.lm, "generate", recording)


@pytest.mark.parametrize("listed", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("remembers", [False, True], ids=["text", "memory"])
def test_an_answer_ends_at_the_end_tokens_of_the_generation_config(
    listed: bool, remembers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.trained("llama", "copies")
    memory = model.compress(tiny.TEXT[:200], ratio=4) if remembers else None
    recorded = Recorded(model, monkeypatch)
    whole = model.generate("The keeper", memory=memory, max_new_tokens=12)
    ids = recorded.ids[0]
    end = next(place for place in range(3, 12) if ids[place] not in ids[:place])
    model.lm.generation_config.eos_token_id = [ids[end], 0] if listed else ids[end]
    shorter = model.generate("The keeper", memory=memory, max_new_tokens=12)
    assert recorded.ids[1] == ids[: end + 1]
    assert whole.startswith(shorter[:-1])
    assert "".join(model.generate("The keeper", memory=memory, max_new_tokens=12, stream=True)) == shorter


def test_ends_that_are_asked_for_replace_them(llama: Nugget2D, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(llama, monkeypatch)
    llama.generate("The keeper", max_new_tokens=8)
    ids = recorded.ids[0]
    end = next(place for place in range(2, 8) if ids[place] not in ids[:place])
    llama.generate("The keeper", max_new_tokens=8, eos_token_id=ids[end])
    assert recorded.ids[1] == ids[: end + 1]


@pytest.mark.parametrize("wrong", ["a.nugget", [], 3])
def test_what_is_no_memory_is_named(llama: Nugget2D, wrong: Any) -> None:
    for read in (llama.generate, llama.score):
        with pytest.raises(InputError, match=f"memory is {type(wrong).__name__}, not a Memory"):
            read("The keeper", memory=wrong)


# ---- every way to answer ends alike ----


def by_generate(model: Nugget2D, folder: Path) -> str:
    return model.generate(PROMPT, max_new_tokens=12)


def by_stream(model: Nugget2D, folder: Path) -> str:
    return "".join(model.generate(PROMPT, max_new_tokens=12, stream=True))


def by_samples(model: Nugget2D, folder: Path) -> str:
    """At temperature 0 they are greedy."""
    return model.generate(PROMPT, max_new_tokens=12, num_return_sequences=1, do_sample=True, temperature=0)[0]


def by_bounded_stream(model: Nugget2D, folder: Path) -> str:
    return "".join(model.stream(64).generate(PROMPT, max_new_tokens=12))


def by_chat(model: Nugget2D, folder: Path) -> str:
    command = ["chat", "--model", str(folder), "--recent-window", "64", "--max-new-tokens", "12"]
    return CliRunner().invoke(app, command, input=PROMPT + "\n").stdout.removesuffix("\n")


def by_lm_eval(model: Nugget2D, folder: Path) -> str:
    lm_eval = pytest.importorskip("nugget2d.integrations.lm_eval")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    request = instance("generate_until", {}, arguments=(PROMPT, {"until": [], "max_gen_toks": 12}), idx=0)
    return lm_eval.NuggetLM(model, context="full").generate_until([request])[0]


def by_server(model: Nugget2D, folder: Path) -> str:
    with serving(model, folder / "store") as running:
        answer = running.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    return answer.choices[0].text


WAYS = [by_generate, by_stream, by_samples, by_bounded_stream, by_chat, by_lm_eval, by_server]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("ends") / "m")


@pytest.mark.parametrize("listed", ["none", "one", "several"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_answer_ends_at_the_same_tokens(way: Callable, listed: str, saved: Path, tmp_path: Path) -> None:
    """As saved beside the weights: Llama 3 and Gemma 3 list several end tokens, the tokenizer knows one."""
    whole = Nugget2D.from_pretrained(saved).generate(PROMPT, max_new_tokens=12)
    ids = tiny.tokenizer()(whole)["input_ids"]
    end = next(place for place in range(3, 12) if ids[place] not in ids[:place])
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    config = folder / "base" / "generation_config.json"
    eos = {"none": None, "one": ids[end], "several": [0, ids[end], 399]}[listed]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": eos}))
    wanted = whole if eos is None else tiny.tokenizer().decode(ids[:end])
    assert way(Nugget2D.from_pretrained(folder), folder) == wanted
