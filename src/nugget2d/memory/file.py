"""The file format of a memory: one safetensors file (no pickle) with a JSON header and a checksum over all of it.

Version 2 stores a payload of any kind, its method and how it is read. Version 1, which is still read, stored only KV
payloads of one token set, made by nugget2d.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nugget2d.errors import MemoryFileError
from nugget2d.memory.exact import ExactRecord
from nugget2d.memory.fingerprint import Fingerprint
from nugget2d.memory.header import Header, read_header
from nugget2d.memory.kv import KVPayload
from nugget2d.memory.payload import EmbeddingsPayload, Kind, Payload, TextPayload
from nugget2d.memory.records import MethodRecord, ReaderSpec, Segment
from nugget2d.memory.validity import AnyPayload, require_expansion, require_finite, require_payload, require_segments
from nugget2d.text.visible import escaped

FORMAT = "nugget2d.memory"
VERSION = 2
READABLE = ("1", "2")
# the most that safetensors reads
HEADER_NBYTES = 100_000_000

# what safetensors and torch raise on a file that contradicts itself
_UNREADABLE = (SafetensorError, ValueError, KeyError, RuntimeError)

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


def unpack(tensors: dict[str, Tensor], header: Header) -> dict[str, Any]:
    """The fields of a memory from what `pack` gave; everything but the values of its states is checked.

    Raises:
        ValueError, KeyError: header and tensors do not fit together; possible with a valid checksum too.
    """
    segments = tuple(Segment(*row, accuracy) for row, accuracy in zip(header.segments, header.accuracies, strict=True))
    require_segments(segments)
    payload: AnyPayload = PAYLOADS[header.kind].from_parts(tensors, header.payload)
    require_payload(payload, segments, header.reader)
    exact = None
    if header.exact is not None:
        require_expansion(segments, sum(tensor.nbytes for tensor in tensors.values()))
        exact = ExactRecord.from_parts(tensors, header.exact.digests, segments)
    unknown = tensors.keys() - payload.tensors().keys() - ({} if exact is None else exact.tensors()).keys()
    if unknown:
        raise ValueError(f"tensors that belong to nothing: {[name[:40] for name in sorted(unknown)[:3]]}")
    return {
        "payload": payload,
        "segments": segments,
        "fingerprint": header.fingerprint,
        "reader": header.reader,
        "method": header.method,
        "token_nbytes": header.token_nbytes,
        "exact": exact,
    }


# ---- bytes ----


def to_bytes(tensors: Mapping[str, Tensor], header: str) -> bytes:
    """A file's bytes."""
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header, "checksum": checksum(tensors, header)}
    return save_tensors(dict(tensors), metadata)


def from_bytes(data: bytes, source: Path | str, expected: str | None = None) -> dict[str, Any]:
    """The fields of a memory from the bytes of its file; `source` is its name in errors.

    Raises:
        MemoryFileError: not a memory, not the one of the expected checksum, of a newer format, truncated, damaged, or
            not valid.
    """
    metadata = _metadata(data, source)
    _require(metadata, expected, source)
    try:
        tensors = load_tensors(data)
    except _UNREADABLE as error:
        raise MemoryFileError(_damaged(source)) from error
    return _checked(tensors, metadata, source, verify=True)


def read_file(path: Path | str) -> dict[str, Any]:
    """The same from a file, which is read only if its size is the one that its header claims.

    Raises:
        MemoryFileError: missing, not a memory, of a newer format, truncated, damaged, or not valid.
    """
    _mapped(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MemoryFileError(f"cannot read memory {path}: {error.strerror or error}") from error
    return from_bytes(data, path)


def map_file(path: Path | str, expected: str | None, *, verify: bool) -> dict[str, Any]:
    """The same from a file whose tensors are mapped; see `Memory.map`.

    Raises:
        MemoryFileError: missing, not a memory, not the one of the expected checksum, of a newer format, truncated,
            damaged, or not valid.
    """
    metadata, tensors = _mapped(path)
    _require(metadata, expected, path)
    return _checked(tensors, metadata, path, verify=verify)


def _mapped(path: Path | str) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # pipes and devices may never end
            raise MemoryFileError(f"cannot read memory {path}: it is a pipe or a device; give a file")
        with Path(path).open("rb") as file:
            length = file.read(8)
            metadata = _metadata(length + file.read(min(int.from_bytes(length, "little"), HEADER_NBYTES)), path)
            # safetensors opens no name that is not UTF-8
            place = path if escaped(str(path)) == str(path) else f"/dev/fd/{file.fileno()}"
            with safe_open(place, "pt") as tensors:
                return metadata, {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise MemoryFileError(f"cannot read memory {path}: {error.strerror or error}") from error
    except _UNREADABLE as error:
        raise MemoryFileError(_damaged(path)) from error


def checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """32 hexadecimal digits of all tensors and the header."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checked(
    tensors: dict[str, Tensor], metadata: dict[str, str], source: Path | str, *, verify: bool
) -> dict[str, Any]:
    header = metadata.get("header", "")
    if verify and metadata.get("checksum") != checksum(tensors, header):
        raise MemoryFileError(_damaged(source))
    try:
        fields = unpack(tensors, read_header(header, metadata["version"], tensors))
        if verify:
            require_finite(fields["payload"])
    except (ValueError, KeyError) as error:
        raise MemoryFileError(f"memory {source} is not valid: {_reason(error)}; make it again from the text") from error
    return fields


def _metadata(data: bytes, path: Path | str) -> dict[str, str]:
    """The string metadata of a memory: safetensors begin with 8 bytes of length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not data[8:9] == b"{":
        raise MemoryFileError(f"{path} is not a memory file; make one with `nugget2d compress`")
    try:
        metadata = from_json(data[8 : 8 + length]).get("__metadata__", {})
    except ValueError as error:
        raise MemoryFileError(_damaged(path)) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise MemoryFileError(f"{path} is not a memory file; make one with `nugget2d compress`")
    if not all(isinstance(value, str) for value in metadata.values()) or not metadata.get("version", "").isdigit():
        raise MemoryFileError(_damaged(path))
    if metadata["version"] not in READABLE:
        raise MemoryFileError(
            f"{path} has format version {metadata['version'][:20]}, this package reads up to {VERSION}; upgrade it"
        )
    return metadata


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _require(metadata: dict[str, str], expected: str | None, path: Path | str) -> None:
    """Refuse a whole file of another memory."""
    if expected is not None and metadata.get("checksum") != expected:
        raise MemoryFileError(f"memory {path} is not the one that was stored there (its checksum is another one)")


def _damaged(path: Path | str) -> str:
    return f"memory {path} is truncated or damaged (its checksum does not match); make it again from the text"
