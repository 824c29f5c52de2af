"""Standard streams of any kind: closed ones, those of any encoding, and those that cannot be written any more."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from nugget2d.cli.shared import say

# why a write fails though the command did nothing wrong: a full disk or quota, a closed stream, a terminal that is gone
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)
# Of a stream that is closed. Reading and writing fail as if it were closed still; messages are dropped.
_STANDINS = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def prepare() -> None:
    """Make all three streams usable, whatever the caller and the locale made of them.

    A closed one is opened on the null device: else Python has None in its place, and the next file that is opened would
    get its number, and what libraries print. What the encoding of a stream cannot show is escaped.
    """
    for number, (name, access, mode) in enumerate(_STANDINS):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, access)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            # opening does not check that the mode is allowed
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def guarded() -> Iterator[None]:
    """Exit with 1 where a stream cannot be written: silently if its reader has gone (`| head`), else with one line.

    Other files raise OutputError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, *UNWRITABLE):
            raise
        with suppress(OSError):
            if error.errno != errno.EPIPE:
                remedy = "; free some space" if error.errno == errno.ENOSPC else ""
                say("error", f"cannot write {error.filename or 'standard output'}: {error.strerror}{remedy}")
        for stream in (sys.stdout, sys.stderr):
            _discard(stream)
        raise SystemExit(1) from error


def _discard(stream: TextIO) -> None:
    """Redirect a stream to the null device: Python flushes it at exit, which would fail again."""
    with suppress(OSError):  # tests have streams without a number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
