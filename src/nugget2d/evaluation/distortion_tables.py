"""A rate-distortion report as Markdown, for docs/RESULTS.md."""

from collections.abc import Iterable
from typing import Any

from nugget2d.evaluation.intervals import Estimate
from nugget2d.evaluation.report import markdown_table, metric_text

_WITHOUT_GAIN = "-"
_RETAINED = ("retained by last k %", "without memory %", "with memory %")
PROFILE_RATIO = 20


def markdown(report: dict[str, Any]) -> str:
    """Tables of reconstruction, continuation and bits, and the copy-span profile, with definitions and settings."""
    settings, cells = report["settings"], report["cells"]
    lengths = {entry["length"]: entry for entry in report["lengths"]}
    windows = ", ".join(f"{entry['windows']} of {length} tokens" for length, entry in lengths.items())
    blocks = [
        "# Rate and distortion",
        f"Model `{settings['config']['name']}` (weights {settings['weights'][:12]}), `{settings['selection']}` "
        f"selection, on `{settings['data']}` ({report['chars_per_token']:.3f} characters a token). Windows: {windows}; "
        f"those longer than {settings['config']['window']} tokens are compressed in segments, as any text. In "
        "brackets: 95 % bootstrap intervals over windows.",
        "## Reconstruction",
        "Corpus BLEU and exact matches of windows by greedy decoding; token accuracy and nats per token, teacher-"
        "forced.",
        _table(
            (
                "tokens",
                "ratio",
                "tokens a nugget",
                "characters a nugget",
                "BLEU",
                "accuracy %",
                "exact match %",
                "nats",
            ),
            (_fidelity(cell) for cell in cells),
        ),
        "## Continuation",
        f"Nats a token of the {settings['target']} tokens after a window: by the plain LM after nothing, the last k "
        "tokens of the window (k = its nuggets) and the whole window, all from position 0; by the decoder without and "
        "with its memory. Retained: (nothing - this) / (nothing - all); where all is not significantly better than "
        f"nothing, it is undefined ({_WITHOUT_GAIN}). What is retained without memory is due to the decoder's weights.",
        _table(
            ("tokens", "ratio", "nothing", "last k", "all", "no memory", "memory", *_RETAINED),
            (_continuation(cell, lengths[cell["length"]]) for cell in cells),
        ),
        "## Bits a character",
        "Exact int8 memories, one file a window: what the patch adds, the nuggets' states, and the file with its "
        "lossless copy. A patch has a few bytes even where nothing is missed. Replayed: windows that come back from "
        "nuggets and patch without that copy.",
        _table(
            ("tokens", "ratio", "patch", "nuggets", "file", "replayed %"),
            (_bits(cell) for cell in cells),
        ),
        "The same windows' text by xz (-9e) and zstd (-19), each by itself and all as one stream:",
        _table(
            ("tokens", "characters", "xz each", "xz stream", "zstd each", "zstd stream"),
            (_coders(entry) for entry in lengths.values()),
        ),
        "## Copy-span profile",
        "Accuracy (%) by the distance from a token to the nugget that follows it, from 0 on.",
        "\n".join(["```text", *(_profile(cell) for cell in nearest_to_profile_ratio(cells)), "```"]),
    ]
    return "\n\n".join(blocks) + "\n"


def nearest_to_profile_ratio(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cell of each length at the ratio nearest to 20x."""
    ratio = min((cell["ratio"] for cell in cells), key=lambda ratio: abs(ratio - PROFILE_RATIO))
    return [cell for cell in cells if cell["ratio"] == ratio]


def _table(header: Iterable[str], rows: Iterable[list[str]]) -> str:
    return markdown_table(list(header), list(rows))


def _fidelity(cell: dict[str, Any]) -> list[str]:
    return [
        *_place(cell),
        f"{cell['achieved_ratio']:.2f}",
        f"{cell['chars_per_nugget']:.1f}",
        _number(cell["bleu"], 2),
        _number(cell["token_accuracy"], 2, 100),
        _number(cell["exact_windows"], 0, 100),
        _number(cell["nll"], 4),
    ]


def _continuation(cell: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    return [
        *_place(cell),
        f"{reference['nll_none']['value']:.3f}",
        f"{cell['nll_truncation']['value']:.3f}",
        f"{reference['nll_full']['value']:.3f}",
        f"{reference['nll_no_memory']['value']:.3f}",
        f"{cell['nll_memory']['value']:.3f}",
        _number(cell["truncation_retained"], 0, 100),
        _number(reference["no_memory_retained"], 0, 100),
        _number(cell["retained"], 0, 100),
    ]


def _bits(cell: dict[str, Any]) -> list[str]:
    return [
        *_place(cell),
        f"{cell['patch_bits_per_char']:.3f}",
        f"{cell['int8_nugget_bits_per_char']:.1f}",
        f"{cell['exact_file_bits_per_char']:.1f}",
        f"{100 * cell['exact_replays']:.0f}",
    ]


def _coders(reference: dict[str, Any]) -> list[str]:
    bits = reference["coder_bits_per_char"]
    names = ("xz_each", "xz_stream", "zstd_each", "zstd_stream")
    return [str(reference["length"]), f"{reference['characters']:,}", *(f"{bits[name]:.3f}" for name in names)]


def _profile(cell: dict[str, Any]) -> str:
    values = " ".join(f"{100 * value:.0f}" for value in cell["copy_span_profile"])
    return f"{cell['length']} tokens, {cell['ratio']:g}x: {values}"


def _place(cell: dict[str, Any]) -> list[str]:
    return [str(cell["length"]), f"{cell['ratio']:g}x"]


def _number(metric: Estimate | None, digits: int, scale: float = 1) -> str:
    return _WITHOUT_GAIN if metric is None else metric_text(metric, digits, scale)
