"""The file format of a memory: one safetensors file (no pickle) with a JSON header and a checksum over all of it.

Version 2 stores a payload of any kind, its method and how it is read. Version 1, which is still read, stored only KV
payloads of one token set, made by nugget2d.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nugget2d.errors import MemoryFileError
from nugget2d.memory.exact import ExactRecord
from nugget2d.memory.fingerprint import Fingerprint
from nugget2d.memory.kv import KVPayload
from nugget2d.memory.payload import EmbeddingsPayload, Kind, Payload, TextPayload
from nugget2d.memory.records import MethodRecord, ReaderSpec, Segment

FORMAT = "nugget2d.memory"
VERSION = 2
READABLE = ("1", "2")

PAYLOADS: dict[Kind, Any] = {"kv": KVPayload, "text": TextPayload, "embeddings": EmbeddingsPayload}


def pack(
    payload: Payload,
    segments: tuple[Segment, ...],
    fingerprint: Fingerprint,
    reader: ReaderSpec,
    method: MethodRecord,
    token_nbytes: int,
    exact: ExactRecord | None,
) -> tuple[dict[str, Tensor], str]:
    """All tensors of a memory by name, and its header as JSON."""
    tensors = payload.tensors() | ({} if exact is None else exact.tensors())
    header = {
        "kind": payload.kind,
        "payload": payload.header(),
        "segments": [[s.start, s.end, s.num_tokens, s.num_nuggets] for s in segments],
        "accuracies": [s.accuracy for s in segments],
        "fingerprint": asdict(fingerprint),
        "reader": asdict(reader),
        "method": {"name": method.name, "config": dict(method.config)},
        "token_nbytes": token_nbytes,
        "exact": None if exact is None else exact.header(),
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return contiguous, json.dumps(header, separators=(",", ":"))


def unpack(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
    """The fields of a memory from what `pack` gave, or from a file of version 1.

    Raises:
        ValueError, KeyError, TypeError: the header is invalid, which a checksum rules out.
    """
    header = header if "kind" in header else _from_version_1(tensors, header)
    segments = [Segment(*row) for row in header["segments"]]
    return {
        "payload": PAYLOADS[header["kind"]].from_parts(tensors, header["payload"]),
        "segments": tuple(
            replace(segment, accuracy=accuracy)
            for segment, accuracy in zip(segments, header["accuracies"], strict=True)
        ),
        "fingerprint": Fingerprint(**header["fingerprint"]),
        "reader": ReaderSpec(**header["reader"]),
        "method": MethodRecord(**header["method"]),
        "token_nbytes": header["token_nbytes"],
        "exact": None if header["exact"] is None else ExactRecord.from_parts(tensors, header["exact"]),
    }


def _from_version_1(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
    layers = range(header["num_layers"])
    numbers = sum(
        heads * width
        for name in ("keys", "values")
        for heads, _, width in (tensors[f"{name}.{layer}"].shape for layer in layers)
    )
    return {
        "kind": "kv",
        "payload": {"num_layers": header["num_layers"]},
        "segments": header["segments"],
        "accuracies": header.get("accuracies") or [None] * len(header["segments"]),  # the first files had none
        "fingerprint": header["fingerprint"],
        "reader": {"role": "decoder", "soft_prompt": True},
        "method": {"name": "nugget2d", "config": {}},
        "token_nbytes": numbers * header["cache_itemsize"],
        "exact": header["exact"],
    }


# ---- bytes ----


def to_bytes(tensors: Mapping[str, Tensor], header: str) -> bytes:
    """A file's bytes."""
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header, "checksum": checksum(tensors, header)}
    return save_tensors(dict(tensors), metadata)


def from_bytes(data: bytes, source: Path | str) -> dict[str, Any]:
    """The fields of a memory from the bytes of its file; `source` is its name in errors.

    Raises:
        MemoryFileError: not a memory, of a newer format, truncated or damaged.
    """
    metadata = _metadata(data, source)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise MemoryFileError(_damaged(source)) from error
    return _checked(tensors, metadata, source, verify=True)


def map_file(path: Path | str, *, verify: bool) -> dict[str, Any]:
    """The same from a file whose tensors are mapped; see `Memory.map`.

    Raises:
        MemoryFileError: missing, not a memory, of a newer format, truncated or damaged.
    """
    try:
        with Path(path).open("rb") as file:
            length = file.read(8)
            header = min(
                int.from_bytes(length, "little"), Path(path).stat().st_size
            )  # of a damaged file it may be any number
            metadata = _metadata(length + file.read(header), path)
        with safe_open(path, "pt") as tensors:
            named = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise MemoryFileError(f"cannot read memory {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise MemoryFileError(_damaged(path)) from error
    return _checked(named, metadata, path, verify=verify)


def checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """32 hexadecimal digits of all tensors and the header."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checked(
    tensors: dict[str, Tensor], metadata: dict[str, str], source: Path | str, *, verify: bool
) -> dict[str, Any]:
    if verify and metadata.get("checksum") != checksum(tensors, metadata.get("header", "")):
        raise MemoryFileError(_damaged(source))
    try:
        return unpack(tensors, json.loads(metadata["header"]))
    except (ValueError, KeyError, TypeError) as error:  # possible only in a header that was not verified
        raise MemoryFileError(_damaged(source)) from error


def _metadata(data: bytes, path: Path | str) -> dict[str, str]:
    """The string metadata of a memory: safetensors begin with 8 bytes of length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not data[8:9] == b"{":
        raise MemoryFileError(f"{path} is not a memory file; make one with `nugget2d compress`")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise MemoryFileError(_damaged(path)) from error
    if metadata.get("format") != FORMAT:
        raise MemoryFileError(f"{path} is not a memory file; make one with `nugget2d compress`")
    if not metadata.get("version", "").isdigit():
        raise MemoryFileError(_damaged(path))
    if metadata["version"] not in READABLE:
        raise MemoryFileError(
            f"{path} has format version {metadata['version']}, this package reads up to {VERSION}; upgrade it"
        )
    return metadata


def _damaged(path: Path | str) -> str:
    return f"memory {path} is truncated or damaged (its checksum does not match); make it again from the text"
