"""lm-evaluation-harness reads whole contexts and memories of them."""

import json
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance

import endings
import tiny
from nugget2d import Nugget2D
from nugget2d.errors import InputError
from nugget2d.integrations import lm_eval as harness
from nugget2d.integrations.lm_eval import NuggetLM
from nugget2d.text.segmentation import split

pytestmark = pytest.mark.slow

CONTEXT, QUESTION, ANSWER = tiny.TEXT[:300], "\nQuestion: what bends?\nAnswer:", " peas"


def ask(reader: object, method: str, *arguments: object) -> object:
    """The answer to one request."""
    return getattr(reader, method)([Instance(method, {}, arguments=arguments, idx=0)])[0]


def total(model: Nugget2D, text: str, memory: object = None) -> float:
    """Log-probability of a text in nats."""
    return -model.score(text, memory=memory) * model.ids(text).shape[1]


def test_memory_mode_compresses_what_stands_before_the_question(llama: Nugget2D) -> None:
    reader = NuggetLM(llama, context="memory", ratio=4)
    memory = llama.compress(CONTEXT, ratio=4)
    expected = total(llama, QUESTION + ANSWER, memory) - total(llama, QUESTION, memory)
    assert ask(reader, "loglikelihood", CONTEXT + QUESTION, ANSWER)[0] == pytest.approx(expected, rel=1e-3)
    assert ask(reader, "loglikelihood", CONTEXT, ANSWER)[0] == pytest.approx(total(llama, ANSWER, memory), rel=1e-4)
    assert ask(reader, "loglikelihood", QUESTION, ANSWER) == ask(
        NuggetLM(llama, context="full"), "loglikelihood", QUESTION, ANSWER
    )


def test_full_mode_is_the_plain_lm_and_none_knows_no_context(llama: Nugget2D) -> None:
    full, none = NuggetLM(llama, context="full"), NuggetLM(llama, context="none")
    expected = total(llama, CONTEXT + QUESTION + ANSWER) - total(llama, CONTEXT + QUESTION)
    assert ask(full, "loglikelihood", CONTEXT + QUESTION, ANSWER)[0] == pytest.approx(expected, rel=1e-3)
    expected = total(llama, QUESTION + ANSWER) - total(llama, QUESTION)
    assert ask(none, "loglikelihood", CONTEXT + QUESTION, ANSWER)[0] == pytest.approx(expected, rel=1e-3)
    assert ask(none, "loglikelihood", CONTEXT, ANSWER)[0] == pytest.approx(total(llama, ANSWER), rel=1e-4)


@pytest.mark.parametrize("mode", ["full", "memory", "none"])
def test_what_is_generated_is_greedy_and_ends_at_the_stop_string(llama: Nugget2D, mode: str) -> None:
    reader = NuggetLM(llama, context=mode, ratio=4)
    answer = ask(reader, "generate_until", CONTEXT + QUESTION, {"until": [], "max_gen_toks": 4})
    assert answer
    assert not ask(reader, "loglikelihood", CONTEXT + QUESTION, ANSWER)[1]
    stop = answer[1:3]
    assert ask(reader, "generate_until", CONTEXT + QUESTION, {"until": [stop], "max_gen_toks": 4}) == answer[:1]
    greedy = []
    for word in tiny.TEXT.split()[:40]:
        text = f"{CONTEXT}\nQuestion: {word}"
        first = ask(reader, "generate_until", text, {"until": "", "max_gen_toks": 1})
        if first.isascii() and first:  # else a byte of a longer character, or the end of the text
            greedy.append(ask(reader, "loglikelihood", text, first)[1])
    assert len(greedy) > 3
    assert all(greedy)


def test_rolling_predicts_each_piece_from_those_before(llama: Nugget2D) -> None:
    segments = [segment.text for segment in split(llama.tokenizer, CONTEXT, llama.config.window)]
    assert len(segments) > 2
    memory = llama.compress("".join(segments[:1]), ratio=4)
    results = {mode: NuggetLM(llama, context=mode, ratio=4) for mode in ("full", "memory", "none")}
    assert ask(results["full"], "loglikelihood_rolling", CONTEXT) == pytest.approx(total(llama, CONTEXT), rel=1e-3)
    none = ask(results["none"], "loglikelihood_rolling", CONTEXT)
    assert none == pytest.approx(sum(total(llama, segment) for segment in segments), rel=1e-4)
    two = total(llama, segments[0]) + total(llama, segments[1], memory)
    assert ask(results["memory"], "loglikelihood_rolling", segments[0] + segments[1]) == pytest.approx(two, rel=1e-4)


def test_impossible_options_are_refused(llama: Nugget2D) -> None:
    with pytest.raises(InputError, match="full, memory or none"):
        NuggetLM(llama, context="half")
    with pytest.raises(InputError, match="separator"):
        NuggetLM(llama, separator="")


def test_the_harness_compares_modes_on_a_local_file(llama: Nugget2D, tmp_path: Path, monkeypatch) -> None:
    """The whole of benchmarks/endings.py, and the harness by the model's registered name."""
    harness.register()
    harness.register()
    llama.save_pretrained(tmp_path / "model")
    assert isinstance(
        lm_eval.api.registry.get_model(harness.NAME).create_from_arg_string(
            f"pretrained={tmp_path / 'model'},context=full", {"batch_size": 1, "device": None}
        ),
        NuggetLM,
    )
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": tiny.TEXT[i:]}) + "\n" for i in (0, 90, 200)), encoding="utf-8")
    command = f"endings --model {tmp_path / 'model'} --data {stories} --out {tmp_path / 'r.json'}"
    command += " --context 24 --ending 6 --questions 6 --ratios 1 4"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    endings.main()
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["reads"] for row in report["results"]] == ["full", "none", "memory 1x", "memory 4x"]
    assert all(row["accuracy"] * 6 == pytest.approx(round(row["accuracy"] * 6), abs=1e-2) for row in report["results"])
    items = endings.questions(llama, [tiny.TEXT], 6, 24, 6)
    for item in items:
        assert item["context"] + item["endings"][item["answer"]] in tiny.TEXT
        assert len(set(item["endings"])) == 4
