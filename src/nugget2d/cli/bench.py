"""`nugget2d bench`: benchmarks of a model."""

from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from lzma import LZMAError
from math import isfinite
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from nugget2d.cli.options import DEFAULT_MODEL, Dtype, Force, ModelName, SelectionOption, finite, to_write
from nugget2d.cli.shared import bundled_text, load_model, progress, safe_to_interrupt, say
from nugget2d.errors import InputError
from nugget2d.files import atomic_write

WINDOWS = 100

Number = TypeVar("Number", int, float)

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure a model on held-out text.")


@bench.command()
def distortion(
    out: Annotated[Path, typer.Option("--out", "-o", callback=to_write, help="Folder for metrics, tables and plots.")],
    model: ModelName = DEFAULT_MODEL,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Held-out .txt, .jsonl or .jsonl.xz.", show_default="a bundled article"),
    ] = None,
    ratios: Annotated[str, typer.Option("--ratios", help="Tokens for each nugget.")] = "1,2,4,8,10,16,20,32,50",
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of a window.")] = "64,128,256,512",
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows", min=1, help="Windows of each length.", show_default=f"{WINDOWS}; of the bundled article, all"
        ),
    ] = None,
    selection: SelectionOption = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="How to keep the states.", show_default="the model's precision"),
    ] = None,
    force: Force = False,
) -> None:
    """Measure rate and distortion: fidelity, what continuation retains, bits.

    Cells that the folder has already are not measured again.
    """
    wanted_ratios, wanted_lengths = _numbers(ratios, "--ratios", float), _numbers(lengths, "--lengths", int)
    _require_packages()
    compressor = load_model(model)
    with safe_to_interrupt():
        from nugget2d.evaluation.distortion_run import Settings, run_distortion
        from nugget2d.evaluation.distortion_tables import markdown
        from nugget2d.evaluation.plots import plot_distortion
    texts, digest = read_documents(data)
    settings = Settings(
        config=compressor.config,
        weights=compressor.legacy_fingerprint.model,
        tokenizer=compressor.legacy_fingerprint.tokenizer,
        data=data.name if data else "the bundled article",
        data_sha256=digest,
        windows=windows or (WINDOWS if data else None),
        selection=selection or compressor.config.selection,
        dtype=dtype,
    )
    with progress("measuring", unit="window tokens") as on_progress:
        report = run_distortion(
            compressor, texts, settings, wanted_ratios, wanted_lengths, out, force=force, on_progress=on_progress
        )
    with atomic_write(out / "distortion.md") as file:
        file.write(markdown(report).encode())
    plots = plot_distortion(report, out)
    say("wrote", f"{out}: distortion.json, distortion.md, {', '.join(path.name for path in plots)}")


@bench.command()
def lm(
    out: Annotated[Path, typer.Option("--out", "-o", callback=to_write, help="Folder for metrics and table.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="FILE[:FIELD=VALUE]",
            help="Held-out .txt(.xz), .jsonl(.xz); of records, those with this value. Repeat for more corpora.",
        ),
    ],
    model: ModelName = DEFAULT_MODEL,
    compressive: Annotated[
        Path | None, typer.Option("--compressive", help="Folder of a model trained on pooled memories: one row more.")
    ] = None,
    states: Annotated[str, typer.Option("--states", help="Most keys that a query attends to.")] = "256,128,64",
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens between two slides, of all methods.")] = 20,
    share: Annotated[
        float,
        typer.Option("--share", callback=finite, min=0.01, max=0.99, help="The part of the states that are nuggets."),
    ] = 0.5,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens scored of each corpus, in whole blocks.")
    ] = 100_000,
    force: Force = False,
) -> None:
    """Measure language modelling when no query sees more than so many states.

    Nuggets at 10x, the plain LM, StreamingLLM and pooled memories. Cells that the folder has already are not measured
    again.
    """
    columns = tuple(_numbers(states, "--states", int))
    corpora, digests = {}, {}
    for source in data:
        path, where = parse_source(source)
        name = Path(source).name
        corpora[name], digests[name] = read_documents(path, where)
    compressor = load_model(model)
    with safe_to_interrupt():
        from nugget2d.evaluation.streaming.run import LmSettings, run_lm
        from nugget2d.evaluation.streaming.tables import markdown
        from nugget2d.evaluation.streaming.text import articles
        from nugget2d.pooled import PooledMemory
    pooled = None if compressive is None else PooledMemory.from_pretrained(compressive, device=compressor.device)
    settings = LmSettings(
        config=compressor.config,
        weights=compressor.legacy_fingerprint.model,
        tokenizer=compressor.legacy_fingerprint.tokenizer,
        data_sha256=digests,
        states=columns,
        chunk=chunk,
        share=share,
        tokens=tokens,
    )
    documents = {name: [part for text in texts for part in articles(text)] for name, texts in corpora.items()}
    with progress("measuring", unit="tokens") as on_progress:
        report = run_lm(compressor, pooled, documents, settings, out, force=force, on_progress=on_progress)
    with atomic_write(out / "lm.md") as file:
        file.write(markdown(report).encode())
    say("wrote", f"{out}: lm.json, lm.md")


@bench.command()
def breakeven(
    out: Annotated[Path, typer.Option("--out", "-o", callback=to_write, help="Folder for metrics, table and plot.")],
    model: ModelName = DEFAULT_MODEL,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="A .txt, .jsonl or .jsonl.xz to take contexts from.", show_default="a bundled article"
        ),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of a context.")] = "1024,4096,16384",
    ratio: Annotated[float, typer.Option("--ratio", min=1, callback=finite, help="Tokens for each nugget.")] = 20,
    question: Annotated[int, typer.Option("--question", min=1, help="Tokens of a question.")] = 32,
    answer: Annotated[int, typer.Option("--answer", min=1, help="Tokens of an answer.")] = 64,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Rounds of measuring.")] = 5,
    force: Force = False,
) -> None:
    """Measure what compressing a context costs and saves, and after how many questions it breaks even.

    Against sending the text again with every question, and against keeping its KV cache.
    """
    wanted = _numbers(lengths, "--lengths", int)
    _require_packages()
    compressor = load_model(model)
    with safe_to_interrupt():
        from nugget2d.evaluation.breakeven_plot import plot_breakeven
        from nugget2d.evaluation.breakeven_run import Settings, run_breakeven
        from nugget2d.evaluation.breakeven_tables import markdown, print_tables
    texts, digest = read_documents(data)
    settings = Settings(
        config=compressor.config,
        weights=compressor.legacy_fingerprint.model,
        data=data.name if data else "the bundled article",
        data_sha256=digest,
        lengths=tuple(wanted),
        ratio=ratio,
        question=question,
        answer=answer,
        runs=runs,
    )
    with progress("measuring", unit="context tokens") as on_progress:
        report = run_breakeven(compressor, texts, settings, out, force=force, on_progress=on_progress)
    print_tables(report)
    with atomic_write(out / "breakeven.md") as file:
        file.write(markdown(report).encode())
    plot_breakeven(report, out / "breakeven.png")
    say("wrote", f"{out}: breakeven.json, breakeven.md, breakeven.png")


def parse_source(source: str) -> tuple[Path, dict[str, str]]:
    """FILE, or FILE:FIELD=VALUE."""
    path, colon, condition = source.rpartition(":")
    field, equals, value = condition.partition("=")
    return (Path(path), {field: value}) if colon and equals else (Path(source), {})


def _numbers(values: str, option: str, kind: type[Number]) -> list[Number]:
    try:
        numbers = [kind(value) for value in values.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes numbers with commas between them, not {values!r}") from error
    if not all(number >= 1 and isfinite(number) for number in numbers):
        raise InputError(f"{option} takes numbers of at least 1, not {values!r}")
    return numbers


def _require_packages() -> None:
    """Check for packages that are needed at the end of a long measurement."""
    missing = [name for name in ("sacrebleu", "zstandard", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"bench needs {', '.join(missing)}: pip install 'nugget2d[bench]'")


def read_documents(data: Path | None, where: Mapping[str, str] | None = None) -> tuple[list[str], str]:
    """Texts, of records those with the values of `where`; and the SHA-256 of the bytes they come from."""
    if data is None:
        text = bundled_text()
        return [text], sha256(text.encode()).hexdigest()
    from nugget2d.training.corpus import documents
    from nugget2d.training.recipe import Source

    try:
        source = Source(path=data.name, where=dict(where or {}))
        return list(documents(source, data.parent)), sha256(data.read_bytes()).hexdigest()
    except (UnicodeDecodeError, LZMAError, EOFError, OSError) as error:
        raise InputError(f"cannot read {data}: {error}; give UTF-8 text as .txt, .jsonl or .jsonl.xz") from error
