"""Inspection of memories: which tokens became nuggets, with their scores, as HTML, JSON or terminal colours."""

from nugget2d.inspection.marks import Inspection, Mark, Nugget, Run, inspect_memory, inspect_text, to_json
from nugget2d.inspection.page import to_html
from nugget2d.inspection.terminal import print_inspection

__all__ = [
    "Inspection",
    "Mark",
    "Nugget",
    "Run",
    "inspect_memory",
    "inspect_text",
    "print_inspection",
    "to_html",
    "to_json",
]
