"""Runs the benchmark of language modelling over corpora, budgets and methods; a later run resumes from its file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nugget2d.config import Frozen, NuggetConfig
from nugget2d.errors import InputError
from nugget2d.evaluation.intervals import Estimate, Sums, estimate, quotient
from nugget2d.evaluation.report import environment, load_report, make_folder, write_report
from nugget2d.evaluation.streaming.methods import COMPRESSIVE, OURS, readers
from nugget2d.evaluation.streaming.reader import Budget
from nugget2d.evaluation.streaming.text import Block, cut
from nugget2d.modeling.network import Network

REPORT_FILE = "lm.json"


class LmSettings(Frozen):
    """The settings that all cells of a report share.

    Attributes:
        config: the model's own.
        weights: fingerprint of its weights.
        tokenizer: fingerprint of its tokenizer.
        data_sha256: of each corpus' file, by the corpus' name.
        states: the columns.
        chunk: tokens between two slides, in all columns.
        ratio: tokens of a nugget.
        share: the part of the states that are nuggets.
        tokens: to score of each corpus, at most, rounded up to whole blocks.
        block: scored tokens of a block.
        seed: of the bootstrap.
    """

    config: NuggetConfig
    weights: str
    tokenizer: str
    data_sha256: dict[str, str]
    states: tuple[int, ...]
    chunk: int
    ratio: int = 10
    share: float = Field(gt=0, lt=1)
    tokens: int
    block: int = 2048
    seed: int = 0

    @property
    def budgets(self) -> list[Budget]:
        """One for each column."""
        return [Budget(states=one, chunk=self.chunk, ratio=self.ratio, share=self.share) for one in self.states]

    @property
    def warm_up(self) -> int:
        """First tokens of a block, not scored: before them no method has all the states that a budget allows."""
        return max(budget.text for budget in self.budgets)


def run_lm(
    model: Network,
    pooled: Network | None,
    corpora: Mapping[str, Sequence[str]],
    settings: LmSettings,
    folder: Path,
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every (corpus, states, method) that `folder` has no cell of yet; each is written as soon as it is done.

    Args:
        model: what is measured; its base is the LM of the other methods.
        pooled: a model of pooled memories with the same tokenizer; None leaves that row out.
        corpora: documents by name.
        settings: of this report; `folder` may hold cells of the same settings only.
        folder: is made if it is missing.
        force: forget what `folder` holds.
        on_progress: called with (tokens scored, in all), for the cells that this call measures.

    Returns:
        What the file holds: settings, corpora, cells (summed nats of each block), and the rows of the table.

    Raises:
        InputError: the folder holds another report, a budget that a model cannot read, too short documents, or pooled
            memories of other tokens.
        OutputError: the folder cannot be written.
    """
    for one in (model, pooled):
        if one is not None:
            for budget in settings.budgets:
                budget.check(one.config.window, one.config.context)
    if pooled is not None and pooled.legacy_fingerprint.tokenizer != settings.tokenizer:
        raise InputError(f"{pooled.config.name!r} has another tokenizer: perplexities per token could not be compared")
    make_folder(folder)
    path = folder / REPORT_FILE
    report = None if force else load_report(path, settings, ("cells", "corpora"))
    blocks = {
        name: cut(model.tokenizer, texts, settings.warm_up, settings.block, settings.tokens)
        for name, texts in corpora.items()
    }
    cells = {_place(cell): cell for cell in report["cells"]} if report else {}
    weights_of = {COMPRESSIVE: pooled.legacy_fingerprint.model} if pooled is not None else {}
    wanted = [
        (name, budget.states, method, reader, weights_of.get(method, settings.weights))
        for name in corpora
        for budget in settings.budgets
        for method, reader in readers(model, pooled, budget).items()
    ]
    left = [one for one in wanted if cells.get(one[:3], {}).get("weights") != one[4]]
    total = settings.block * sum(len(blocks[name]) for name, *_ in left)
    commit = environment()["commit"]
    scored = 0
    # the table's order, whatever order cells were measured in
    order = [one[:3] for one in wanted]
    report = {
        "settings": settings.model_dump(mode="json"),
        "corpora": [_described(name, blocks[name], settings) for name in corpora],
        "cells": list(cells.values()),
    }
    for name, states, method, reader, weights in left:
        start = perf_counter()
        nats = []
        for block in blocks[name]:
            nats.append(round(float(reader(block.ids.to(model.device), settings.warm_up).double().sum()), 4))
            scored += settings.block
            if on_progress is not None:
                on_progress(scored, total)
        seconds = round(perf_counter() - start, 1)
        cells[name, states, method] = {
            "corpus": name,
            "states": states,
            "method": method,
            "weights": weights,
            "nats": nats,
            "seconds": seconds,
            "commit": commit,
        }
        report["cells"] = [cells[place] for place in order if place in cells]
        write_report(path, report | {"rows": rows(report)})
    return report | {"rows": rows(report)}


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of every cell, with 95 % intervals over blocks.

    `more` is by how many per cent the method's perplexity per token is above Nugget2D's on the same blocks (paired).
    """
    seed, size = report["settings"]["seed"], report["settings"]["block"]
    words = {corpus["name"]: corpus["words"] for corpus in report["corpora"]}
    cells = {_place(cell): cell for cell in report["cells"]}
    found = []
    for (corpus, states, method), cell in cells.items():
        nats = np.array(cell["nats"])
        tokens = np.full(len(nats), size)
        ours = cells.get((corpus, states, OURS))
        more: Estimate | None = None
        if ours is not None and method != OURS:
            more = estimate(np.stack([nats - ours["nats"], tokens], axis=1), _per_cent, seed=seed)
        found.append(
            {
                "corpus": corpus,
                "states": states,
                "method": method,
                "nats_per_token": estimate(np.stack([nats, tokens], axis=1), seed=seed),
                "perplexity_per_token": estimate(np.stack([nats, tokens], axis=1), _perplexity, seed=seed),
                "perplexity_per_word": estimate(np.stack([nats, words[corpus]], axis=1), _perplexity, seed=seed),
                "more": more,
            }
        )
    return found


def _perplexity(sums: Sums) -> NDArray[Any]:
    return np.exp(quotient(sums))


def _per_cent(sums: Sums) -> NDArray[Any]:
    return 100 * np.expm1(quotient(sums))


def _place(cell: dict[str, Any]) -> tuple[str, int, str]:
    return cell["corpus"], cell["states"], cell["method"]


def _described(name: str, blocks: Sequence[Block], settings: LmSettings) -> dict[str, Any]:
    return {
        "name": name,
        "blocks": len(blocks),
        "tokens": len(blocks) * settings.block,
        "warm_up": len(blocks) * settings.warm_up,
        "words": [block.words for block in blocks],
    }
