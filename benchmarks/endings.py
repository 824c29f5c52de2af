"""Full context against memories on a task of lm-evaluation-harness: which of four endings follows a text?

    python benchmarks/endings.py --model runs/stories/lora/model --data runs/stories/test.jsonl \\
        --out benchmarks/results/stories/endings-lora.json

A document gives `--context` tokens and the `--ending` tokens after them; the wrong endings are those of the next
documents. Needs `pip install lm-eval`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
import yaml

from nugget2d import Nugget2D
from nugget2d.evaluation.report import markdown_table, write_report
from nugget2d.evaluation.windows import sample_windows
from nugget2d.integrations.lm_eval import NuggetLM
from nugget2d.text.detokenizer import detokenize_answer
from nugget2d.text.segmentation import tokenize
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source

TASK = Path(__file__).with_suffix(".yaml")
CHOICES = 4


def main() -> None:
    """Write the task's file, run the harness for each mode, print and keep the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=128, help="tokens")
    parser.add_argument("--ending", type=int, default=16, help="tokens")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 2, 4, 10])
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()

    model = Nugget2D.from_pretrained(options.model)
    texts = list(documents(Source(path=options.data.name), options.data.parent))
    items = questions(model, texts, options.questions, options.context, options.ending)
    readers = {"full": NuggetLM(model, context="full"), "none": NuggetLM(model, context="none")}
    readers |= {f"memory {ratio:g}x": NuggetLM(model, context="memory", ratio=ratio) for ratio in options.ratios}
    rows = [{"reads": name, **evaluate(reader, items)} for name, reader in readers.items()]
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    settings = {key: getattr(options, key) for key in ("model", "context", "ending", "questions")}
    write_report(options.out, settings | {"data": options.data.name, "harness": lm_eval.__version__, "results": rows})


def questions(model: Nugget2D, texts: Sequence[str], count: int, context: int, ending: int) -> list[dict[str, Any]]:
    """`count` questions with contexts of `context` tokens and endings of `ending` tokens."""
    ids = [tokenize(model.tokenizer, text)[0] for text in texts]
    windows = sample_windows(model.tokenizer, ids, count, context, target=ending)
    endings = [detokenize_answer(model.tokenizer, window.target) for window in windows]
    items = []
    for number, window in enumerate(windows):
        answer = number % CHOICES
        # the right one of document n stands at place n % 4, those after it in a circle around
        order = [(number + place - answer) % count for place in range(CHOICES)]
        items.append({"context": window.text, "endings": [endings[other] for other in order], "answer": answer})
    return items


def evaluate(reader: NuggetLM, items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and its standard error, by the harness."""
    task = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / task["dataset_kwargs"]["data_files"]["test"]
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        task["dataset_kwargs"] = {"data_files": {"test": str(path)}, "cache_dir": folder}
        results = lm_eval.simple_evaluate(model=reader, tasks=[task])["results"][task["task"]]
    return {"accuracy": round(results["acc,none"], 4), "stderr": round(results["acc_stderr,none"], 4)}


if __name__ == "__main__":
    main()
