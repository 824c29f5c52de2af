"""Runs the rate-distortion benchmark over a grid of lengths and ratios; a later run resumes from its file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nugget2d.config import Frozen, NuggetConfig, SelectionName
from nugget2d.evaluation.distortion import describe_reference, measure_cell, measure_reference
from nugget2d.evaluation.report import environment, load_report, make_folder, write_report
from nugget2d.evaluation.windows import sample_windows
from nugget2d.memory.states import StoreDtype
from nugget2d.model import Nugget2D
from nugget2d.text.segmentation import tokenize

REPORT_FILE = "distortion.json"


class Settings(Frozen):
    """The settings that all cells of a report share.

    Attributes:
        config: the model's own.
        weights: fingerprint of its weights.
        tokenizer: fingerprint of its tokenizer.
        data: name of the text.
        data_sha256: of the file's bytes.
        windows: of each length; None takes all that the text has.
        target: tokens after each window, to measure what continuation retains.
        selection: how nuggets are chosen.
        dtype: how states are kept; None keeps the model's precision.
        seed: of windows and bootstrap.
    """

    config: NuggetConfig
    weights: str
    tokenizer: str
    data: str
    data_sha256: str
    windows: int | None
    target: int = 128
    selection: SelectionName
    dtype: StoreDtype | None = None
    seed: int = 0


def run_distortion(
    model: Nugget2D,
    texts: Sequence[str],
    settings: Settings,
    ratios: Sequence[float],
    lengths: Sequence[int],
    folder: Path,
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every (length, ratio) that `folder` has no cell of yet; each is written as soon as it is done.

    Args:
        model: the compressor.
        texts: held-out documents.
        settings: of this report; `folder` may hold cells of the same settings only.
        ratios: tokens for each nugget.
        lengths: tokens of a window.
        folder: is made if it is missing.
        force: forget what `folder` holds.
        on_progress: called with (window tokens done, in all), for the cells that this call measures.

    Returns:
        What the file holds: environment, settings, chars_per_token, one entry of `lengths` a length, `cells` sorted.

    Raises:
        InputError: the folder holds another report, or there is too little text.
        OutputError: the folder cannot be written.
    """
    make_folder(folder)
    path = folder / REPORT_FILE
    report = None if force else load_report(path, settings, ("cells", "lengths"))
    done = {(cell["length"], cell["ratio"]) for cell in report["cells"]} if report else set()
    left = {length: [ratio for ratio in ratios if (length, ratio) not in done] for length in lengths}
    total = sum(length * len(wanted) for length, wanted in left.items())
    if report is not None and not total:
        return report
    documents = [tokenize(model.tokenizer, text)[0] for text in texts]
    windows = {
        length: sample_windows(
            model.tokenizer, documents, settings.windows, length, target=settings.target, seed=settings.seed
        )
        for length, wanted in left.items()
        if wanted
    }
    report = report or {
        "settings": settings.model_dump(mode="json"),
        "chars_per_token": round(sum(map(len, texts)) / sum(map(len, documents)), 4),
        "lengths": [],
        "cells": [],
    }
    commit = environment()["commit"]
    measured = 0
    for length, chosen in windows.items():
        reference = measure_reference(model, chosen)
        described = describe_reference(chosen, reference, seed=settings.seed)
        others = [entry for entry in report["lengths"] if entry["length"] != length]
        report["lengths"] = sorted([*others, described], key=lambda entry: entry["length"])
        for ratio in left[length]:
            cell = measure_cell(
                model,
                chosen,
                ratio,
                reference,
                selection=settings.selection,
                dtype=settings.dtype,
                seed=settings.seed,
            )
            # code may have changed between two runs into one file
            cells = [*report["cells"], cell | {"commit": commit}]
            report["cells"] = sorted(cells, key=lambda cell: (cell["length"], cell["ratio"]))
            write_report(path, report)
            measured += length
            if on_progress is not None:
                on_progress(measured, total)
    return report
