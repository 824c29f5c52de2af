"""Errors and warnings for users: one line that says what was wrong, where, and the remedy.

The command line prints the message of a `NuggetError` and exits with 1; anything else is a bug and keeps its
traceback.
"""

import sys
import warnings

_INSIDE = ("nugget2d.", "torch.")  # torch: its decorators, such as no_grad


class NuggetError(Exception):
    """Base of all errors that this package raises on purpose."""


class InputError(NuggetError):
    """A text, number or option that cannot be worked with."""


class OutputError(NuggetError):
    """A file could not be written (it exists, the disk is full, the folder is missing)."""


class MemoryFileError(NuggetError):
    """A file is not a memory, is truncated, or fails its checksum."""


class ModelError(NuggetError):
    """A model is unknown, incomplete, or of a kind that cannot be supported."""


class MismatchError(NuggetError):
    """A memory was made by another model than the one asked to read it."""


class StoreError(NuggetError):
    """A store cannot be opened, read or written, or is of a newer version."""


class DamageError(StoreError):
    """A record of a store is damaged, or has lost its file."""


class StoreGoneError(StoreError):
    """The folder of an open store was removed, moved or replaced."""


class UnknownMemoryError(StoreError):
    """A store has no memory of that id (or none that this owner may see)."""


class RecipeError(NuggetError):
    """A training recipe has a wrong key or value."""


class LimitError(NuggetError):
    """A request takes more than its server allows, whatever others do."""


class OverloadError(NuggetError):
    """The server has too much to do for one more request; try again later."""


class TimeLimitError(NuggetError):
    """A request took longer than its server allows."""


class ShutdownError(NuggetError):
    """A server is shutting down, or was shut down before a request was done."""


class ContextWarning(UserWarning):
    """A memory stands for more text than the model can continue from; only its last segments are read."""


class ExactFallbackWarning(UserWarning):
    """Replay of an exact memory did not verify on this machine; the stored lossless copy was used."""


class AccuracyWarning(UserWarning):
    """Some segments of a memory miss `target_accuracy`; each keeps the states with the best measured accuracy."""


class DamageWarning(UserWarning):
    """A list of a store leaves out a record that is damaged."""


class SearchWarning(UserWarning):
    """A search of a store leaves out memories whose words it does not know."""


QualityWarning = AccuracyWarning  # the former name, for one release


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line of code outside of this package: that of the user."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
