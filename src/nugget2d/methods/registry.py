"""The registry: compression methods by name."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nugget2d.errors import InputError

if TYPE_CHECKING:
    from nugget2d.methods.base import Method

# name -> "module:class"; a string, so that the command line can list names without importing torch
METHODS: dict[str, "str | type[Method]"] = {
    "nugget2d": "nugget2d.methods.nugget.method:NuggetMethod",
    "knorm": "nugget2d.methods.knorm:KNorm",
    "truncation": "nugget2d.methods.truncation:Truncation",
}
DEFAULT = "knorm"  # for LMs without a trained compressor


def method_class(name: str) -> "type[Method]":
    """The class of a method.

    Raises:
        InputError: there is none of that name.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    row = METHODS[name]
    if not isinstance(row, str):
        return row
    module, _, attribute = row.partition(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found


def make_method(name: str, options: Mapping[str, Any]) -> "Method":
    """A method with its configuration.

    Raises:
        InputError: there is none of that name, or it has no such option, or not of that value.
    """
    from pydantic import ValidationError

    kind = method_class(name)
    if unknown := [option for option in options if option not in kind.model_fields]:
        raise InputError(
            f"method {name!r} has no option {', '.join(unknown)}; it takes {', '.join(kind.model_fields) or 'none'}"
        )
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its options"
        raise InputError(f"method {name!r}, {place}: {first['msg']}; got {first['input']!r:.60}") from error
