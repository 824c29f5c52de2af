"""Reproduces docs/RESULTS.md: runs the commands in it, then fills the tables.

    python benchmarks/again.py benchmarks/results/reconstruction benchmarks/results/novel.json

A figure goes by the path that its command writes to; without any, all are listed. Commands run one after the other, in
the order of the page; those that measure time want an idle machine. Reports on another model are in the way: remove
them first.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import tables

PAGE = tables.ROOT / "docs" / "RESULTS.md"


def main(wanted: list[str]) -> int:
    """Run what is `wanted`, or list all; returns an exit code."""
    known = commands(PAGE.read_text(encoding="utf-8"))
    if not wanted:
        print(*known, sep="\n")
        return 0
    if unknown := [one for one in wanted if one not in known]:
        print(f"no command in {PAGE.name} writes {', '.join(unknown)}; it writes {', '.join(known)}", file=sys.stderr)
        return 1
    # the commands find `nugget2d` and `python` beside the interpreter that runs this
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    failed = []
    for one in (one for one in known if one in wanted):
        print(known[one], flush=True)
        run = subprocess.run(["bash", "-ec", known[one]], cwd=tables.ROOT, env=os.environ | {"PATH": path}, check=False)
        if run.returncode:
            failed.append(one)
    tables.main()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def commands(page: str) -> dict[str, str]:
    """The indented blocks of a page that write results (of benchmarks or research), by the path that they write to."""
    found = {}
    for block in re.findall(r"(?:^    .*\n)+", page, flags=re.MULTILINE):
        outputs = re.findall(r"(?:-o|--out) ((?:benchmarks|research)/results/\S+)", block)
        found |= dict.fromkeys(outputs, re.sub(r"^    ", "", block, flags=re.MULTILINE))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
