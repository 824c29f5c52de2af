r"""Was text that a model is measured on in what it was trained on? Looks for passages of the one in the other.

    python benchmarks/overlap.py research/recipes/nano-gpu.yaml --out benchmarks/results/overlap.json \
        --data ../shared/data/lm/wikitext-2.test.txt.xz --data ../shared/data/lm/novels100.jsonl.xz:split=val

From every document evenly spaced passages of so many letters, whatever stands between the letters; looked for in all
documents that the recipe names as training text. A quotation or a phrase in common is a passage or two of one document;
a document that was trained on is most of its passages in another one.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nugget2d.cli.bench import parse_source, read_documents
from nugget2d.evaluation.report import write_report
from nugget2d.evaluation.streaming.text import articles
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import load_recipe

_NO_LETTERS = re.compile(r"[\W\d_]+")


def main() -> None:
    """Look, print a line for each corpus, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=parse_source, action="append", required=True, metavar="FILE[:FIELD=VALUE]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=20, help="of a document")
    parser.add_argument("--letters", type=int, default=40, help="of a passage")
    options = parser.parse_args()

    held_out: list[tuple[str, list[str]]] = []  # corpus and passages of each document
    for path, where in options.data:
        texts = [part for text in read_documents(path, where)[0] for part in articles(text)]
        held_out += [(path.name, passages(text, options.passages, options.letters)) for text in texts]
    recipe = load_recipe(options.recipe)
    trained_on = chain.from_iterable(documents(source, options.recipe.parent) for source in recipe.data.train)
    most = most_in_one([found for _, found in held_out], trained_on, options.letters)
    results = [summary(path.name, held_out, most) for path, _ in options.data]
    print(*results, sep="\n")
    write_report(options.out, {"recipe": options.recipe.name, "letters": options.letters, "results": results})


def passages(text: str, count: int, length: int) -> list[str]:
    """Up to `count` passages of `length` letters each, evenly spaced; none across what WikiText left out as <unk>."""
    stretches = [_NO_LETTERS.sub("", part.lower()) for part in text.split("<unk>")]
    found = [part[start : start + length] for part in stretches for start in range(0, len(part) - length + 1, length)]
    count = min(count, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def most_in_one(held_out: Sequence[Sequence[str]], texts: Iterable[str], length: int) -> list[int]:
    """For each document the most of its passages, of `length` letters, that any one of the `texts` has."""
    owners: dict[str, set[int]] = {}
    for number, found in enumerate(held_out):
        for passage in found:
            owners.setdefault(passage, set()).add(number)
    most = [0] * len(held_out)
    for text in texts:
        letters = _NO_LETTERS.sub("", text.lower())
        spans = (letters[start : start + length] for start in range(len(letters) - length + 1))
        common = {span for span in spans if span in owners}
        for number, count in Counter(number for passage in common for number in owners[passage]).items():
            most[number] = max(most[number], count)
    return most


def summary(corpus: str, held_out: list[tuple[str, list[str]]], most: list[int]) -> dict[str, Any]:
    """Documents of a corpus by the most passages of theirs that one training document has."""
    numbers = [number for number, (name, found) in enumerate(held_out) if name == corpus and found]
    counts = Counter(most[number] for number in numbers)
    return {"corpus": corpus, "documents": len(numbers), "documents_by_passages_found": dict(sorted(counts.items()))}


if __name__ == "__main__":
    main()
