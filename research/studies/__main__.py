"""Train the variants of a study under equal budgets, compare them on held-out windows; resumes what was interrupted.

python -m research.studies research/recipes/studies/selection.yaml --out runs/selection
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from nugget2d.errors import NuggetError
from research.studies.run import run_study


def main() -> int:
    """Run the study, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data pack, the variants and the report")
    parser.add_argument("--jobs", type=int, default=1, help="variants at a time, one thread each")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    try:
        run_study(options.study, options.out, options.jobs)
    except NuggetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(Markdown((options.out / "study.md").read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
