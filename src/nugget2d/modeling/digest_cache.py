"""The digest of an LM's weights, read from a cache while neither its files nor its weights have changed.

digests.json in the cache folder: for each folder of weights, the identity of its files and the digest of what was
loaded from them. Hashing every weight of a large LM takes seconds.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from nugget2d.errors import NuggetError
from nugget2d.files import atomic_write, cache_folder, file_identity
from nugget2d.modeling.digest import sampled_digest, weights_digest

CACHE_FILE = "digests.json"
# config.json may tie weights or name them otherwise
_FILES = ("*.safetensors", "*.bin", "config.json")
# the digest rounds to bfloat16, so these loads agree
_AGREE = (torch.float32, torch.bfloat16)

FileIdentity = tuple[str, int, int, int]


def weight_files(folder: Path) -> tuple[FileIdentity, ...]:
    """Identities of the files that transformers may load weights from, and of their configuration."""
    return tuple(file_identity(path) for pattern in _FILES for path in sorted(folder.glob(pattern)))


@dataclass(frozen=True)
class LoadedWeights:
    """The files that weights were loaded from, and the tensors' versions right after loading.

    Attributes:
        folder: of the files.
        files: their identities BEFORE they were read.
        versions: of each tensor, as `tensor_versions` gives them.
    """

    folder: str
    files: tuple[FileIdentity, ...]
    versions: tuple[tuple[int, object], ...]


def tensor_versions(state: Mapping[str, Tensor]) -> tuple[tuple[int, object], ...]:
    """Identity and version counter of each tensor; every change in place counts, but for those by way of `.data`."""
    # inference tensors do not count: theirs equals no other
    return tuple((id(t), object() if t.is_inference() else t._version) for _, t in sorted(state.items()))


def cached_weights_digest(state: Mapping[str, Tensor], loaded: LoadedWeights | None) -> str:
    """`weights_digest` of `state`: the very tensors of an LM, not detached.

    The cache is neither read nor written unless the weights are as they were loaded: the same tensors, unchanged in
    place, with the same sampled digest.
    """
    if loaded is None or not loaded.files or tensor_versions(state) != loaded.versions:
        return weights_digest(state)
    condition = {
        "files": [list(identity) for identity in loaded.files],
        "transformers": transformers.__version__,  # other versions may name weights otherwise
        "dtypes": sorted({str(tensor.dtype) for tensor in state.values()} - set(map(str, _AGREE))),
        "sample": sampled_digest(state),
    }
    known = _read().get(loaded.folder)
    if isinstance(known, dict) and known.get("of") == condition and isinstance(known.get("digest"), str):
        return known["digest"]
    digest = weights_digest(state)
    _write(loaded.folder, {"of": condition, "digest": digest})
    return digest


def _read() -> dict[str, object]:
    """All entries; a cache that cannot be read has none."""
    with suppress(NuggetError, OSError, ValueError):
        entries = json.loads((cache_folder() / CACHE_FILE).read_bytes())
        if isinstance(entries, dict):
            return entries
    return {}


def _write(folder: str, entry: dict[str, object]) -> None:
    """Set one entry, if possible; with two processes at once, one entry may be lost."""
    with suppress(NuggetError, OSError):
        path = cache_folder() / CACHE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(_read() | {folder: entry}, indent=1).encode())
