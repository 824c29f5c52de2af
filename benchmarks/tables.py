"""The tables of docs/RESULTS.md and the model card, from what the benchmarks wrote.

    python benchmarks/tables.py

Replaces what stands between `<!-- table NAME -->` and `<!-- end -->`; a test holds the pages to benchmarks/results.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nugget2d.evaluation.report import markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESEARCH = ROOT / "research" / "results"
PAGES = (ROOT / "docs" / "RESULTS.md", ROOT / "src" / "nugget2d" / "models" / "nano" / "README.md")
POLICIES = ("even", "window", "learned", "random", "punctuation")

_BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write every page anew."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """`text` with all of its tables made again."""
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def reconstruction() -> str:
    """Reconstruction of 128 tokens."""
    header = ["ratio asked", "tokens a nugget", "characters a nugget", "BLEU", "token accuracy %", "exact matches"]
    rows = [
        [
            f"{cell['ratio']:g}x",
            cell["achieved_ratio"],
            f"{cell['chars_per_nugget']:.0f}",
            _interval(cell["bleu"], 1),
            _interval(cell["token_accuracy"], 100),
            f"{cell['exact_windows']['value']:.0%}",
        ]
        for cell in _read("reconstruction/distortion.json")["cells"]
    ]
    return markdown_table(header, rows)


def profile() -> str:
    """Accuracy by distance from a nugget."""
    cells = _read("reconstruction/distortion.json")["cells"]
    lines = [f"{c['ratio']:g}x: " + " ".join(f"{100 * hit:.0f}" for hit in c["copy_span_profile"]) for c in cells]
    return "\n".join(["```text", *lines, "```"])


def grid() -> str:
    """BLEU and accuracy by ratio and length."""
    cells = _read("distortion/distortion.json")["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    found = {
        (cell["ratio"], cell["length"]): f"{cell['bleu']['value']:.1f} / {100 * cell['token_accuracy']['value']:.1f}"
        for cell in cells
    }
    ratios = sorted({cell["ratio"] for cell in cells})
    rows = [[f"{ratio:g}x", *(found[ratio, length] for length in lengths)] for ratio in ratios]
    return markdown_table(["ratio asked", *(f"{length} tokens" for length in lengths)], rows)


def bits() -> str:
    """What exact int8 memories of 128 tokens weigh."""
    rows = [
        [
            f"{cell['ratio']:g}x",
            f"{cell['patch_bits_per_char']:.3f}",
            f"{cell['int8_nugget_bits_per_char']:.1f}",
            f"{cell['exact_file_bits_per_char']:.1f}",
        ]
        for cell in _read("distortion/distortion.json")["cells"]
        if cell["length"] == 128
    ]
    return markdown_table(["ratio asked", "patch", "nuggets (int8)", "whole file"], rows)


def continuation() -> str:
    """Nats of the continuation."""
    report = _read("reconstruction/distortion.json")
    (reference,) = report["lengths"]
    seen = [
        ("nothing (plain LM)", reference["nll_none"]),
        ("the whole window (plain LM)", reference["nll_full"]),
        ("nothing (decoder)", reference["nll_no_memory"]),
    ]
    seen += [
        (f"memory at {cell['ratio']:g}x (decoder)", cell["nll_memory"])
        for cell in report["cells"]
        if cell["ratio"] in (4, 10, 20)
    ]
    return markdown_table(["what is seen", "nats a token"], [[what, f"{one['value']:.3f}"] for what, one in seen])


def policies() -> str:
    """One checkpoint, other selections."""
    ratios = (4, 10, 20)
    rows = []
    for policy in POLICIES:
        folder = "distortion" if policy == "even" else f"selection-{policy}"
        cells = {c["ratio"]: c for c in _read(f"{folder}/distortion.json")["cells"] if c["length"] == 128}
        metrics = [f"{cells[r]['bleu']['value']:.1f} / {100 * cells[r]['token_accuracy']['value']:.1f}" for r in ratios]
        rows.append([policy, *metrics])
    return markdown_table(["selection", *(f"{ratio}x BLEU / accuracy %" for ratio in ratios)], rows)


def selection_study() -> str:
    """The variants of the selection study."""
    return _table_of(RESEARCH / "studies/selection/study.md")


def studies() -> str:
    """Every other study: its question, and what its variants reached."""
    rows = []
    for path in sorted(RESEARCH.glob("studies/*/study.json")):
        report, name = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        if name == "selection":
            continue
        means = {variant: one["mean"] for variant, one in report["summary"].items()}
        rows.append(
            [
                f"[{name}](../research/results/studies/{name}/study.md)",
                yaml.safe_load(report["text"])["question"],
                ", ".join(f"{variant} {100 * mean['accuracy_20x']:.1f}" for variant, mean in means.items()),
                ", ".join(f"{mean['lm_loss']:.3f}" for mean in means.values()),
            ]
        )
    return markdown_table(["study", "question", "20x accuracy %", "LM, nats a token"], rows)


def selection_bound() -> str:
    """The gain of a search with hindsight."""
    rows = [
        [f"{r['ratio']}x", r["nuggets"], r["round"], f"{r['nats']:.3f}", f"{100 * r['accuracy']:.1f}", r["longest_gap"]]
        for r in _read("selection-bound.json", RESEARCH)["results"]
    ]
    return markdown_table(["ratio asked", "nuggets", "rounds", "nats a token", "accuracy %", "longest gap"], rows)


def novel() -> str:
    """A book from its nuggets."""
    book = _read("novel.json")
    same = "yes" if book["exact_mode_same_bytes"] else "NO"
    rows = [
        ["BLEU over the book", book["bleu"]],
        ["exactly reconstructed segments", f"{book['exact_segments']:.1%}"],
        ["seconds to compress / to reconstruct", f"{book['compress_seconds']} / {book['reconstruct_seconds']}"],
        ["exact mode returns the book byte for byte", f"{same}, {len(book['exact_mode_fallbacks'])} fallbacks"],
        ["tokens patched, bytes of the patch", f"{book['patched_tokens']}, {book['patch_bytes']}"],
        ["bytes of the lossless copy kept for safety (xz)", f"{book['lossless_copy_bytes']:,}"],
    ]
    return markdown_table(["", ""], rows)


def bounded_states() -> str:
    """Perplexities when no query sees more than so many states."""
    page = (RESULTS / "lm" / "lm.md").read_text(encoding="utf-8")
    return page[page.index("Perplexity per token") :].replace("\n## ", "\n### ").strip()


def shares() -> str:
    """Nats by how many of the states are nuggets."""
    lines: dict[tuple[Any, ...], dict[float, float]] = {}
    for path in sorted(RESULTS.glob("shares/*.json"), reverse=True):
        report = json.loads(path.read_text(encoding="utf-8"))
        for r in sorted(report["results"], key=lambda r: -r["states"]):
            lines.setdefault((report["corpus"], r["states"], r["method"]), {})[r["share"]] = r["nats"]
    columns = sorted(next(iter(lines.values())))
    header = ["corpus", "states", "method", *(f"{share:g}" if share else "none" for share in columns)]
    return markdown_table(header, [[*place, *(f"{nats[c]:.3f}" for c in columns)] for place, nats in lines.items()])


def long_stream() -> str:
    """A novel, by position: nats, time and bytes of every way to read it."""
    ways = _read("streams/streaming.json")["results"]
    header = ["tokens read"]
    header += [f"{what}: {way}" for what in ("nats", "ms a token", "MB held") for way in ways]
    found = {way: {point["position"]: point for point in points} for way, points in ways.items()}
    scales = {"nats": 1.0, "ms_per_token": 1.0, "bytes": 1e-6}
    rows = []
    for position in next(iter(found.values())):
        cells = [found[way].get(position) for way in ways]
        rows.append(
            [f"{position:,}"]
            + ["" if cell is None else f"{scale * cell[key]:.2f}" for key, scale in scales.items() for cell in cells]
        )
    return markdown_table(header, rows)


def streaming_mask_cuda() -> str:
    """All ways to read a stream in training, on a GPU."""
    header = ["tokens", "nuggets", *(f"{way}, ms" for way in ("chunked", "flex", "dense"))]
    rows = [
        [
            f"{r['tokens']:,}",
            r["nuggets"],
            *(f"{1000 * _layers_s(r, way):.0f}" for way in ("chunked", "flex", "dense")),
        ]
        for r in _read("cuda/streaming_mask.json")["results"]
    ]
    return markdown_table(header, rows)


def streaming_mask() -> str:
    """Chunks that gather their keys against one dense mask."""
    rows = [
        [
            f"{r['tokens']:,}",
            r["nuggets"],
            f"{_layers_s(r, 'chunked'):.1f}",
            f"{_layers_s(r, 'dense'):.1f}",
            f"{_layers_s(r, 'dense') / _layers_s(r, 'chunked'):.1f}",
        ]
        for r in _read("streaming_mask.json")["results"]
    ]
    return markdown_table(["tokens", "nuggets", "chunked, s", "dense, s", "factor"], rows)


def refinement() -> str:
    """Quality against seconds."""
    header = ["ratio asked", "tokens a nugget", "steps", "seconds a window", "BLEU", "accuracy %"]
    rows = [
        [
            f"{r['ratio']:g}x",
            f"{r['achieved']:.1f}",
            r["steps"],
            r["seconds_each"],
            f"{r['bleu']:.1f}",
            f"{100 * r['accuracy']:.1f}",
            *(f"{r[key]:.3f}" for key in ("nll_memory", "nll_no_memory", "nll_full")),
        ]
        for r in _read("refinement.json")["results"]
    ]
    return markdown_table([*header, "next 64 tokens, nats", "no memory", "all"], rows)


def overlap() -> str:
    """Documents by how many passages of theirs were trained on."""
    results = _read("overlap.json")["results"]
    counts = sorted({int(count) for r in results for count in r["documents_by_passages_found"]})
    rows = [
        [r["corpus"], r["documents"], *(r["documents_by_passages_found"].get(str(count), 0) for count in counts)]
        for r in results
    ]
    return markdown_table(["corpus", "documents", *(f"{count} found" for count in counts)], rows)


def speed(report: str = "speed.json") -> str:
    """Compressing and decoding against a plain prefill and a full cache."""
    columns = {
        "tokens": "tokens",
        "nuggets": "nuggets",
        "prefill ms": "prefill_ms",
        "compress ms": "compress_ms",
        "compress / prefill": "compress_over_prefill",
        "full cache tokens/s": "full_tokens_per_s",
        "memory tokens/s": "memory_tokens_per_s",
        "decode speed-up": "decode_speedup",
        "full cache bytes": "full_cache_bytes",
        "memory file bytes": "memory_file_bytes",
    }
    rows = [[_number(r[key]) for key in columns.values()] for r in _read(report)["results"]]
    return markdown_table(list(columns), rows)


def breakeven() -> str:
    """What a context costs once and a question, three ways."""
    return _table_of(RESULTS / "breakeven/breakeven.md")


def serving() -> str:
    """Questions by memory against questions that send the text."""
    header = ["clients", "context", "requests a second", "tokens a second", "first token s, p50 / p99", "last token s"]
    rows = [
        [
            r["clients"],
            r["context"],
            f"{r['requests_per_s']:.2f}",
            f"{r['tokens_per_s']:.1f}",
            *(f"{r[f'{what}_p50_s']:.2f} / {r[f'{what}_p99_s']:.2f}" for what in ("first", "last")),
            *(f"{r[key]:g}x" if key in r else "" for key in ("first_token_sooner", "requests_more")),
        ]
        for r in _read("serving.json")["results"]
    ]
    return markdown_table([*header, "first token sooner", "more requests"], rows)


def indexing() -> str:
    """A corpus into a store, against a plain prefill."""
    keys = ("what", "processes", "documents", "tokens", "seconds", "documents_per_s", "tokens_per_s", "over_prefill")
    header = [*keys[:5], "documents a second", "tokens a second", "over prefill"]
    rows = [[r["what"], *(_number(r[key]) for key in keys[1:])] for r in _read("indexing.json")["results"]]
    return markdown_table(header, rows)


def store_scale() -> str:
    """What a large store costs."""
    rows = [[r["step"], f"{r['seconds']:.4f}", r["peak_rss_mb"]] for r in _read("store_scale.json")["results"]]
    return markdown_table(["step", "seconds", "peak RSS, MB"], rows)


def store_search() -> str:
    """What `store search` finds."""
    reports = [_read(f"store_search/{name}.json") for name in ("cranfield", "cisi")]
    head = [f"{one['corpus'].split('.')[0]}, {one['queries']} queries, {one['documents']} documents" for one in reports]
    rows = [
        [results[0]["ranking"], *(_interval(result["ndcg_at_10"], 100) for result in results)]
        for results in zip(*(one["results"] for one in reports), strict=True)
    ]
    return markdown_table(["ranking", *head], rows)


def int8() -> str:
    """What is lost where states are kept as int8."""
    reports = {name: _read(f"int8/{name}/distortion.json")["cells"] for name in ("float32", "int8")}
    rows = [
        [f"{one['ratio']:g}x", one["length"], *(_interval(cell["bleu"], 1) for cell in (one, other))]
        for one, other in zip(*reports.values(), strict=True)
    ]
    return markdown_table(["ratio asked", "tokens", *reports], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "reconstruction": reconstruction,
    "profile": profile,
    "grid": grid,
    "bits": bits,
    "continuation": continuation,
    "policies": policies,
    "selection-study": selection_study,
    "studies": studies,
    "selection-bound": selection_bound,
    "novel": novel,
    "bounded-states": bounded_states,
    "shares": shares,
    "long-stream": long_stream,
    "streaming-mask": streaming_mask,
    "streaming-mask-cuda": streaming_mask_cuda,
    "refinement": refinement,
    "overlap": overlap,
    "speed": speed,
    "speed-cuda": partial(speed, "cuda/speed.json"),
    "breakeven": breakeven,
    "serving": serving,
    "indexing": indexing,
    "store-scale": store_scale,
    "store-search": store_search,
    "int8": int8,
}


def _read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _table_of(report: Path) -> str:
    """The table of a Markdown report that has one."""
    lines = report.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def _layers_s(result: dict[str, float], way: str) -> float:
    """Seconds of a way to read a stream, without the output projection and the loss that all ways share."""
    return result[f"{way}_s"] - result["head_s"]


def _interval(metric: dict[str, float], scale: float) -> str:
    value, low, high = (scale * metric[key] for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


if __name__ == "__main__":
    main()
