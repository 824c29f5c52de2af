"""A break-even report as tables for the terminal, and as Markdown for docs/RESULTS.md."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nugget2d.evaluation.breakeven import Payoff
from nugget2d.evaluation.report import markdown_table

WAYS = {"text": "text sent again", "cache": "cache kept", "memory": "memory"}
_HEADER = ("bytes", "once", "first token", "a question", "saved", "break-even")


def markdown(report: dict[str, Any]) -> str:
    """One table over all contexts, with the settings before and notes after it."""
    settings, environment = report["settings"], report["environment"]
    rows = []
    for context in report["contexts"]:
        place = [_tokens(context), f"{context['nuggets']:,}"]
        rows += [[*place, WAYS[way], *_cells(context, way, spread=True)] for way in WAYS]
    blocks = [
        "# Break-even",
        f"Model `{settings['config']['name']}` (weights {settings['weights'][:12]}), {settings['ratio']:g} tokens a "
        f"nugget, questions of {settings['question']} tokens, answers of {settings['answer']}, on "
        f"`{settings['data']}`; {environment['hardware']}, threads: {environment['threads']}, torch "
        f"{environment['versions']['torch']}, commit {environment['commit']}.",
        f"Rounds, in each of which everything was measured in turns: {settings['runs']}; medians (lowest .. highest). "
        "Seconds of what is done once, and of a question until its answer's first token and in all.",
        markdown_table(["tokens", "nuggets", "way", *_HEADER], rows),
        "\n".join(f"- {note}" for note in _notes(report)),
    ]
    return "\n\n".join(blocks) + "\n"


def print_tables(report: dict[str, Any]) -> None:
    """The medians of each context on standard output, and what is counted."""
    console = Console()
    for context in report["contexts"]:
        title = f"{_tokens(context)} tokens, {context['nuggets']:,} nuggets: bytes and seconds"
        table = Table(title=title, box=None, padding=(0, 1, 0, 0), title_justify="left", header_style="dim")
        table.add_column(no_wrap=True)
        for name in _HEADER:
            table.add_column(name, justify="right")
        for way, name in WAYS.items():
            table.add_row(name, *_cells(context, way, spread=False))
        console.print(table)
        console.print()
    for note in _notes(report):
        console.print(Text(note, "dim"))


def _notes(report: dict[str, Any]) -> list[str]:
    """What is counted, and its limits."""
    notes = [
        "Text sent again: a question reads context and question. Cache kept: the context is read once, its KV cache "
        "stays in the model's memory; a question reads the question. Memory: the context is compressed and written to "
        "a file once; a question loads the file (from the system's page cache), rotates its keys, reads the question. "
        "All from the string, all to the same number of tokens. Loading the model is not counted.",
        "Saved: what a question takes less from the memory. Break-even: the number of questions from which the "
        "memory's total, what is done once included, is no higher; 1 to 5 is a range that ends after 5. In brackets: "
        "the best and the worst of single rounds, where rounds differ.",
        "Bytes: what is held between questions, as text, in the model's memory, and as a file.",
        "All caches are preallocated. transformers' own are copied at every token, so that `generate` takes longer, "
        "especially after a text or a cache.",
    ]
    if any(context["beyond_context"] for context in report["contexts"]):
        notes.append(
            f"* Longer than the {report['settings']['config']['context']:,} tokens that this model continues from: "
            "`generate` would read the last segments only. Here every way reads everything: seconds and bytes are "
            "valid, answers would not be."
        )
    return notes


def _tokens(context: dict[str, Any]) -> str:
    return f"{context['tokens']:,}{'*' if context['beyond_context'] else ''}"


def _cells(context: dict[str, Any], way: str, *, spread: bool) -> list[str]:
    seconds = (context["seconds"][key][way] for key in ("once", "first_token", "question"))
    against = ["", ""] if way == "memory" else [f"{context['saved_per_question'][way]:.4f}", _break_even(context, way)]
    return [f"{context['bytes'][way]:,}", *(_seconds(one, spread=spread) for one in seconds), *against]


def _seconds(metric: dict[str, float], *, spread: bool) -> str:
    ends = f" ({metric['low']:.4f} .. {metric['high']:.4f})" if spread and metric["high"] else ""
    return f"{metric['median']:.4f}{ends}"


def _break_even(context: dict[str, Any], way: str) -> str:
    """By the medians; and by the best and the worst round, where rounds differ."""
    rounds = sorted((Payoff(**one) for one in context["pays_in_rounds"][way]), key=_order)
    text = _name(Payoff(**context["pays"][way]))
    ends = {_name(one) for one in rounds}
    return text if ends == {text} else f"{text} ({_name(rounds[0])} .. {_name(rounds[-1])})"


def _order(payoff: Payoff) -> tuple[float, float]:
    return payoff.first or math.inf, -(payoff.last or math.inf)


def _name(payoff: Payoff) -> str:
    if payoff.first is None:
        return "never"
    return f"{payoff.first:,}" if payoff.last is None else f"{payoff.first} to {payoff.last:,}"
