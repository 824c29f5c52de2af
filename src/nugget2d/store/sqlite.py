"""What the index of a store and its index of words have in common as SQLite files."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote


def address(path: Path, mode: str) -> str:
    """A URI of a file with any bytes in its name; `mode` is its query."""
    return f"file:{quote(os.fsencode(path.absolute()))}?{mode}"


@contextmanager
def transaction(db: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """Commits when the block ends, and rolls back if it ends by an error."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some errors have rolled it back already
            db.execute("ROLLBACK")
        raise
