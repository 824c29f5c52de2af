"""The measuring instruments themselves: known inputs, known metrics."""

import json
from pathlib import Path

import pytest
import torch

from nugget2d import Nugget2D
from nugget2d.evaluation.fidelity import bleu
from nugget2d.evaluation.report import environment, markdown_table, write_report
from nugget2d.evaluation.teacher_forced import (
    continuation_loss,
    copy_span_profile,
    lm_loss_per_token,
    reconstruction_hits,
)
from nugget2d.text.segmentation import tokenize

TEXT = "The lamp was lit at dusk, and the keeper wrote it down. Nothing else happened that night! Did it? " * 12


def test_distance_runs_to_the_next_nugget(llama: Nugget2D) -> None:
    windows = torch.randint(0, 200, (5, 12))
    hits, distance = reconstruction_hits(llama, windows, 4, selection="even", rows=2)
    assert hits.shape == distance.shape == (5, 12)
    assert distance[0].tolist() == [3, 2, 1, 0] * 3


def test_hits_are_what_the_decoder_predicts(llama: Nugget2D) -> None:
    windows = torch.randint(0, 200, (3, 10))
    hits, _ = reconstruction_hits(llama, windows, 2, selection="even")
    for row in range(3):
        ids = windows[row : row + 1]
        encoded = llama.encode(ids, [10], [5], selection="even")
        logits = llama.decode(encoded.nuggets, ids[:, :-1], prompt="reconstruct")
        assert hits[row].tolist() == (logits[0].argmax(-1) == ids[0]).tolist()


def test_profile_is_the_mean_by_distance() -> None:
    hits = torch.tensor([[True, False, True], [True, True, False]])
    distance = torch.tensor([[0, 1, 3], [0, 1, 1]])
    assert copy_span_profile(hits, distance) == [1.0, 0.3333, 0.0, 1.0]


def test_losses_agree_with_score(llama: Nugget2D) -> None:
    ids = llama.ids(TEXT)[:, :40]
    head, tail = llama.text(ids[0, :24].tolist()), llama.text(ids[0, 24:].tolist())
    if tokenize(llama.tokenizer, head)[0] + tokenize(llama.tokenizer, tail)[0] != ids[0].tolist():
        pytest.skip("the cut changes how the text tokenizes")
    memory = llama.compress(head, ratio=4)
    assert continuation_loss(llama, ids, 24, 4) == pytest.approx(llama.score(tail, memory=memory), abs=1e-4)
    assert lm_loss_per_token(llama, ids, 0) > 0


def test_bleu() -> None:
    assert bleu(["the same text , word by word"], ["the same text , word by word"]) == pytest.approx(100)
    assert bleu(["nothing alike at all in here"], ["the same text , word by word"]) < 10


def test_report(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "a.json", {"x": 1})
    content = json.loads((tmp_path / "new" / "a.json").read_text())
    assert content["x"] == 1
    assert content["environment"]["versions"].keys() == environment()["versions"].keys()
    assert markdown_table(["a", "b"], [[1, 0.5]]).splitlines() == ["| a | b |", "|---|---|", "| 1 | 0.50 |"]
