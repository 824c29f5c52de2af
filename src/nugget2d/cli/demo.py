"""`nugget2d demo`: compresses and reconstructs a document, and shows its nuggets."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nugget2d.cli.options import DEFAULT_MODEL, ModelName, finite
from nugget2d.cli.shared import against, bundled_text, load_model, progress
from nugget2d.files import read_text

if TYPE_CHECKING:
    from nugget2d import Memory, Nugget2D

RATIOS = (4.0, 10.0)


def demo(
    file: Annotated[
        Path | None, typer.Argument(help="A UTF-8 text.", show_default="a bundled article on lighthouses")
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", callback=finite, help="Tokens for each nugget, at least 1.", show_default="4, then 10"),
    ] = None,
    model: ModelName = DEFAULT_MODEL,
) -> None:
    """Compress a document, reconstruct it, and show what was kept."""
    text = bundled_text() if file is None else read_text(file)
    compressor = load_model(model)
    compressor.require_compressor()  # what comes back is half of the demo
    from nugget2d.inspection import inspect_text, print_inspection

    console = Console()
    ratios = RATIOS if ratio is None else (ratio,)
    memories = []
    for wanted in ratios:
        with progress(f"compressing {wanted:g}x") as on_progress:
            memories.append(compressor.compress(text, ratio=wanted, on_progress=on_progress))
        console.rule(f"nuggets at {wanted:g}x")
        print_inspection(inspect_text(compressor, text, memories[-1]), console)
    console.rule("reconstruction")
    console.print(_comparison(compressor, text, memories))
    _exact_round_trip(compressor, text, ratios[-1], console)


def _comparison(model: "Nugget2D", text: str, memories: "list[Memory]") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("tokens", "nuggets", "ratio", "memory against full KV cache", "BLEU", "seconds"):
        table.add_column(title, justify="right", header_style="dim")
    for memory in memories:
        start = perf_counter()
        with progress(f"reconstructing {memory.ratio:.1f}x") as on_progress:
            copy = model.reconstruct(memory, on_progress=on_progress)
        table.add_row(
            f"{memory.num_tokens:,}",
            f"{memory.num_nuggets:,}",
            f"{memory.ratio:.2f}",
            against(memory.nbytes, memory.full_nbytes),
            _bleu(copy, text),
            f"{perf_counter() - start:.1f}",
        )
    return table


def _bleu(copy: str, text: str) -> Text:
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        return Text("pip install 'nugget2d[bench]'")
    return Text(f"{corpus_bleu([copy], [[text]]).score:.1f}")


def _exact_round_trip(model: "Nugget2D", text: str, ratio: float, console: Console) -> None:
    """Print whether exact mode returned the identical string."""
    with progress("exact mode") as on_progress:
        memory = model.compress(text, ratio=ratio, exact=True, on_progress=on_progress)
        same = model.reconstruct(memory, on_progress=on_progress) == text
    patch = memory.exact.patch_nbytes if memory.exact else 0
    verdict = "[bold green]identical to[/]" if same else "[bold red]different from[/]"
    console.print(
        f"\nexact mode at {ratio:g}x: {verdict} the original, "
        f"{len(text.encode()):,} bytes of text from the nuggets and a patch of {patch:,} bytes",
        soft_wrap=True,
        highlight=False,
    )
