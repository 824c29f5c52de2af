"""Reading text, writing files atomically, and the cache folder."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nugget2d.errors import InputError, OutputError


@contextmanager
def atomic_write(path: Path | str, *, force: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` only when the block ends without an error.

    Bytes go to a temporary name in the same folder (a rename is atomic only within a file system; a short name, as that
    of `path` may be as long as the file system allows), are flushed to disk, then renamed, and the folder is flushed: a
    block that ended is a file that a power cut leaves. On any error before the rename the temporary file is removed and
    `path` keeps what it had.

    Raises:
        OutputError: `path` exists and `force` is false, or the system refuses the write (disk full, no folder).
    """
    path = Path(path)
    check_writable(path, force=force)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".nugget2d-", suffix=".tmp")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk: a new name is lost with the power until then."""
    if os.name == "nt":  # no such thing there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse an output file before any work: it exists, is a folder, or has no parent folder."""
    mode = None
    try:
        parent = path.parent.is_dir()
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = path.stat().st_mode  # one call only: the file may be removed between two
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    # a rename onto a device such as /dev/null would replace the device
    if mode is not None and not stat.S_ISREG(mode):
        raise OutputError(f"cannot write {path}: it is a folder or a device; give a file name")
    if mode is not None and not force:
        raise OutputError(f"{path} exists; pass --force to replace it")
    if not parent:
        raise OutputError(f"cannot write {path}: folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {path.parent}; choose another folder")


def expand_home(path: Path | str) -> Path:
    """`path` with the home folder in the place of a leading ~.

    Raises:
        InputError: there is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"there is no home folder for {path}; set HOME, or give a whole path") from error


def cache_folder() -> Path:
    """Where files are kept that can be recreated: $NUGGET2D_CACHE, else nugget2d/ in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        OutputError: none is set and this user has no home folder.
    """
    if own := os.environ.get("NUGGET2D_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "nugget2d"
    try:
        return expand_home("~/.cache/nugget2d")
    except InputError as error:
        raise OutputError("there is no home folder for a cache; set NUGGET2D_CACHE to a folder") from error


def file_identity(path: Path) -> tuple[str, int, int, int]:
    """Path (links followed), size, time of the last change (ns) and inode: a file that is rewritten gets another."""
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino


def decode_text(data: bytes, source: str) -> str:
    """Bytes to text, newlines kept as they are.

    Raises:
        InputError: `data` is empty or not UTF-8 (the message gives the offset of the first bad byte).
    """
    if not data:
        raise InputError(f"{source} is empty; there is nothing to compress")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 (byte {error.start}); convert it first, for example with iconv"
        ) from error


def read_text(path: Path | str) -> str:
    """Read a UTF-8 file whole, byte for byte (no newline translation).

    Raises:
        InputError: the file is missing, unreadable, empty or not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return decode_text(data, str(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
