"""A report on language modelling with bounded states as Markdown, for docs/RESULTS.md."""

from typing import Any

from nugget2d.evaluation.report import markdown_table, metric_text


def markdown(report: dict[str, Any]) -> str:
    """One table per corpus, with definitions and settings."""
    settings = report["settings"]
    blocks = [
        "# Language modelling with bounded states",
        f"Model `{settings['config']['name']}` (weights {settings['weights'][:12]}), nuggets chosen by "
        f"`{settings['config']['selection']}` unless said otherwise, {settings['ratio']}x. No query attends to more "
        "keys than the column says, its own and sinks included; all methods slide by "
        f"{settings['chunk']} tokens. Of the states of Nugget2D and of pooled memories {100 * settings['share']:.3g} % "
        "are memory. `full, equal text` has no such limit: the base LM over as many tokens as nuggets and uncompressed "
        "tokens stand for, or a few more.",
        "Perplexity per token / per word: the same nats, divided by words between whitespace (line ends are not "
        "words). In brackets: by how many per cent the perplexity per token is above that of `nugget2d`, with the "
        "paired 95 % bootstrap interval over blocks.",
    ]
    for corpus in report["corpora"]:
        rows = {(row["states"], row["method"]): row for row in report["rows"] if row["corpus"] == corpus["name"]}
        methods = dict.fromkeys(method for _, method in rows)
        states = settings["states"]
        blocks += [
            f"## {corpus['name']}",
            f"{corpus['tokens']:,} tokens ({sum(corpus['words']):,} words) scored in {corpus['blocks']} blocks within "
            f"documents, each read from {corpus['warm_up'] // corpus['blocks']:,} tokens before it on, which are not "
            "scored.",
            markdown_table(
                ["method", *(f"{count} states" for count in states)],
                [[method, *(_cell(rows.get((count, method))) for count in states)] for method in methods],
            ),
        ]
    return "\n\n".join(blocks) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    text = f"{row['perplexity_per_token']['value']:.2f} / {row['perplexity_per_word']['value']:.1f}"
    return text if row["more"] is None else f"{text} ({metric_text(row['more'], 2)})"
