"""A whole novel to nuggets and back, and exact mode over it.

python benchmarks/novel.py --data ../shared/data/lm/novels100.jsonl.xz --out benchmarks/results/novel.json
"""

import argparse
import time
import warnings
from itertools import islice
from pathlib import Path

from nugget2d import Nugget2D
from nugget2d.errors import ExactFallbackWarning
from nugget2d.evaluation.fidelity import bleu
from nugget2d.evaluation.report import write_report
from nugget2d.inference.reconstruction import reconstruct_ids
from nugget2d.training.corpus import documents
from nugget2d.training.recipe import Source


def main() -> None:
    """Compress, reconstruct, compare; print and write the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, required=True, help="records with a `split` field; the val split is used")
    parser.add_argument("--number", type=int, default=0, help="which novel of the split")
    parser.add_argument("--ratio", type=float, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    source = Source(path=options.data.name, where={"split": "val"})
    text = next(islice(documents(source, options.data.parent), options.number, None))
    model = Nugget2D.from_pretrained(options.model)

    start = time.perf_counter()
    memory = model.compress(text, ratio=options.ratio)
    compressed = time.perf_counter()
    hypotheses = [model.text(ids) for ids in reconstruct_ids(model, [memory])[0]]
    reconstructed = time.perf_counter()
    parts = [text[segment.start : segment.end] for segment in memory.segments]
    exact = model.compress(text, ratio=options.ratio, exact=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExactFallbackWarning)
        same = model.reconstruct(exact).encode() == text.encode()
    if exact.exact is None:
        raise RuntimeError("compress(exact=True) made no exact record")
    results = {
        "model": options.model,
        "characters": len(text),
        "tokens": memory.num_tokens,
        "nuggets": memory.num_nuggets,
        "segments": len(parts),
        "ratio": round(memory.ratio, 3),
        "bleu": round(bleu(hypotheses, parts), 2),
        "same_without_exact_mode": "".join(hypotheses) == text,
        "exact_segments": round(sum(a == b for a, b in zip(hypotheses, parts, strict=True)) / len(parts), 4),
        "compress_seconds": round(compressed - start, 1),
        "reconstruct_seconds": round(reconstructed - compressed, 1),
        "exact_mode_same_bytes": same,
        "exact_mode_fallbacks": [str(item.message) for item in caught],
        "patched_tokens": sum(map(len, exact.exact.patches)),
        "patch_bytes": exact.exact.patch_nbytes,
        "lossless_copy_bytes": exact.exact.copy_nbytes,
    }
    for key, value in results.items():
        print(f"{key}: {value}")
    write_report(options.out, results)


if __name__ == "__main__":
    main()
