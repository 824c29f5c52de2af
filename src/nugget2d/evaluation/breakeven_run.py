"""Runs the break-even benchmark over contexts of several lengths."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nugget2d.config import NuggetConfig
from nugget2d.errors import InputError, OutputError
from nugget2d.evaluation.breakeven import Clock, Plan, device_clock, measure_context
from nugget2d.evaluation.report import environment, write_report
from nugget2d.files import check_writable
from nugget2d.model import Nugget2D
from nugget2d.text.segmentation import detokenize, tokenize

REPORT_FILE = "breakeven.json"


class Settings(Plan):
    """The settings of a report.

    Attributes:
        config: the model's own.
        weights: fingerprint of its weights.
        data: name of the text.
        data_sha256: of the file's bytes.
        lengths: tokens of a context.
        question: tokens of a question.
    """

    config: NuggetConfig
    weights: str
    data: str
    data_sha256: str
    lengths: tuple[int, ...]
    question: int


def run_breakeven(
    model: Nugget2D,
    texts: Sequence[str],
    settings: Settings,
    folder: Path,
    *,
    force: bool = False,
    clock: Clock | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure contexts of every length into a file of `folder`.

    Args:
        model: the compressor.
        texts: what contexts are made of, joined, and repeated where they are too short: seconds do not depend on it.
        settings: what to measure.
        folder: is made if it is missing; memories are written to and read from its disk, and removed.
        force: replace a report that is there.
        clock: seconds; None takes the time when the model's device has done its work.
        on_progress: called with (context tokens measured, in all), over all rounds.

    Returns:
        What the file holds: environment, settings, and one entry of `contexts` for each length: tokens, nuggets,
        whether it is longer than the model continues from (`beyond_context`), bytes held, and the results of
        `summarize`.

    Raises:
        InputError: there is no text, or the model has too few positions.
        ModelError: the model reads memories of one segment only, and a context is longer.
        OutputError: the folder cannot be written to, or has a report.
    """
    longest = max(settings.lengths)
    # the start token or the soft prompt has a position too; checked here, before minutes of measuring
    end = longest + 1 + settings.question + settings.answer
    model.require_positions(end, states=end)
    if longest > model.config.window:
        _ = model.rotation  # raises where keys cannot be moved
    ids = _tokens(model, texts, max(longest, settings.question))
    question = torch.tensor([ids[: settings.question]], device=model.device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {folder}: {error.strerror or error}") from error
    check_writable(folder / REPORT_FILE, force=force)
    clock = clock or device_clock(model.device)
    rounds = settings.runs + 1
    contexts = []
    with TemporaryDirectory(dir=folder) as scratch:
        for number, length in enumerate(settings.lengths):
            context = detokenize(model.tokenizer, ids[:length])
            before = rounds * sum(settings.lengths[:number])

            def on_round(measured: int, before: int = before, length: int = length) -> None:
                if on_progress is not None:
                    on_progress(before + measured * length, rounds * sum(settings.lengths))

            file = Path(scratch) / "context.nugget"
            contexts.append(measure_context(model, context, question, settings, file, clock, on_round))
    report = {"environment": environment(), "settings": settings.model_dump(mode="json"), "contexts": contexts}
    write_report(folder / REPORT_FILE, report)
    return report


def _tokens(model: Nugget2D, texts: Sequence[str], count: int) -> list[int]:
    """The first `count` tokens of the texts one after the other, again and again."""
    ids: list[int] = []
    for text in cycle([text for text in texts if text.strip()]):
        ids += tokenize(model.tokenizer, text + "\n")[0]
        if len(ids) >= count:
            return ids[:count]
    raise InputError("there is no text to measure on; give a file that has some")
