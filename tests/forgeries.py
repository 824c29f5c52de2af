"""Memory files with a right checksum and something wrong in them: what anybody can make who wants readers to fall."""

import copy
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from nugget2d.memory.file import FORMAT, checksum

Header = dict[str, Any]
Tensors = dict[str, Tensor]

# in place of any value of a header
VALUES = (None, True, -1, 0, 7, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, -0.0, "", "1", "\0", [], [[]], {}, {"a": 1})


def parts(data: bytes) -> tuple[Tensors, Header, str]:
    """Tensors, header and version of a memory file."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return load(data), json.loads(metadata["header"]), metadata["version"]


def forged(tensors: Tensors, header: object, version: str = "2") -> bytes:
    """A file whose checksum is right; a `header` that is no string becomes JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    metadata = {"format": FORMAT, "version": version, "header": text, "checksum": checksum(tensors, text)}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def forgeries(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that differ from the memory `data` in one value of the header or one tensor, each with its name."""
    tensors, header, version = parts(data)
    for name, changed in headers(header):
        yield name, forged(tensors, changed, version)
    for name, mutated in tensor_sets(tensors):
        yield name, forged(mutated, header, version)


def headers(header: Header) -> Iterator[tuple[str, object]]:
    """Every value replaced, removed, doubled or moved; and text that is no such JSON."""
    for path in _paths(header):
        name = ".".join(map(str, path))
        for value in VALUES:
            yield (
                f"{name} = {value!r}",
                _at(header, path, lambda owner, key, value=value: owner.__setitem__(key, value)),
            )
        yield f"no {name}", _at(header, path, lambda owner, key: owner.__delitem__(key))
        yield f"{name} and more", _at(header, path, _more)
    text = json.dumps(header)
    yield "nothing", ""
    yield "no object", "[]"
    yield "NaN", text.replace("null", "NaN").replace("true", "Infinity")
    yield "1e999", text.replace("null", "1e999")
    yield "a key twice", text[:-1] + ',"segments":[[0,1,1,1]]}'
    yield "deep", text[:-1] + ',"deep":' + "[" * 100_000 + "}"
    yield "deep config", text.replace('"config": {', '"config": {"a": ' + "[" * 150 + "]" * 150 + ", ")
    yield "a lone surrogate", text.replace("{", '{"\\ud800":1,', 1)
    yield "a long number", text[:-1] + ',"a":' + "9" * 10_000 + "}"


def tensor_sets(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """Every tensor with other numbers, dtype, shape or place, removed, or beside one that belongs to nothing."""
    for name, tensor in tensors.items():
        yield f"no {name}", {other: value for other, value in tensors.items() if other != name}
        for how, value in _others(tensor):
            yield f"{name}: {how}", tensors | {name: value}
    names = sorted(tensors)
    for one, other in pairwise(names):
        yield f"{one} and {other} exchanged", tensors | {one: tensors[other], other: tensors[one]}
    for name in ("keys.99", "keys.0.scale", "heads.counts", "heads.rows.0", "exact.patch", "text", "x"):
        if name not in tensors:
            yield f"also {name}", tensors | {name: torch.zeros(3)}
    yield "no tensors", {}


def _others(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in (torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64):
        if dtype != tensor.dtype:
            yield f"as {dtype}", tensor.to(dtype)
    yield "flat", tensor.flatten()
    yield "one dimension more", tensor[None]
    yield "a number", torch.zeros((), dtype=tensor.dtype)
    yield "empty", tensor[:0]
    yield "reversed", tensor.flip(0)
    yield "zeros", torch.zeros_like(tensor)
    yield "twice", torch.cat([tensor, tensor])
    yield "cut", tensor[..., :-1] if tensor.dim() > 1 else tensor[:-1]
    if tensor.dim() > 1:
        yield "transposed", tensor.transpose(0, 1).contiguous()
    largest = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    for how, value in (("largest", largest), ("smallest", -largest)):
        yield how, torch.full_like(tensor, value if value > 0 or tensor.dtype != torch.uint8 else 0)
    if tensor.is_floating_point():
        for value in (math.nan, math.inf):
            changed = tensor.clone()
            changed.view(-1)[-1:] = value
            yield str(value), changed


def _paths(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _paths(inner, (*path, index))


def _at(header: Header, path: tuple[Any, ...], change: Any) -> Header:
    changed: Any = copy.deepcopy(header)
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    change(owner, path[-1])
    return changed


def _more(owner: Any, key: Any) -> None:
    """A list longer by its last part, a record by a key; a number by one."""
    value = owner[key]
    if isinstance(value, list):
        owner[key] = [*value, *value[-1:]]
    elif isinstance(value, dict):
        value["unknown"] = 1
    elif isinstance(value, int):
        owner[key] = value + 1
    else:
        owner[key] = [value]
