"""The class of a checkpoint, by the kind of memories that it was trained on."""

from importlib import import_module
from typing import cast

from nugget2d.config import MemoryKind
from nugget2d.errors import ModelError
from nugget2d.modeling.network import Network

# "module:Class", imported on use: these modules import this one
CLASSES: dict[MemoryKind, str] = {
    "nuggets": "nugget2d.model:Nugget2D",
    "pooled": "nugget2d.pooled:PooledMemory",
}


def class_of(kind: MemoryKind) -> type[Network]:
    """The class for checkpoints trained on memories of `kind`.

    Raises:
        ModelError: no checkpoint of that kind can be saved, so none can be loaded.
    """
    if kind not in CLASSES:
        raise ModelError(f"memories of kind {kind!r} cannot be loaded; those that can: {', '.join(CLASSES)}")
    module, name = CLASSES[kind].split(":")
    return cast(type[Network], getattr(import_module(module), name))
