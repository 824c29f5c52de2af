"""Former names of keywords and attributes, and former places of arguments: they work for one release, and warn."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from nugget2d.errors import InputError, warn

P = ParamSpec("P")
R = TypeVar("R")


def renamed_keywords(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that lets a function also take keywords by their former names: `old="new"`.

    The function then raises InputError where a value is given under both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in renamed.keys() & kwargs.keys():
                value, new = kwargs.pop(old), renamed[old]
                warn(f"{old}= is now {new}=", DeprecationWarning)
                if kwargs.get(new) is not None:
                    raise InputError(f"{new} is given twice, also as {old}, its former name; leave that out")
                kwargs[new] = value
            return function(*args, **kwargs)

        return call

    return decorate


def moved_argument(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that lets a method of one argument also take two, of which the first is now its keyword `name`.

    The method then raises InputError where that is given twice.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) != 3:
                return method(*args, **kwargs)
            itself, moved, argument = args
            called = method.__name__
            if name in kwargs:
                raise InputError(f"{name} is given twice; leave out the first argument of {called}")
            warn(f"{called}({name}, ...) is now {called}(..., {name}={name})", DeprecationWarning)
            return method(itself, argument, **{**kwargs, name: moved})  # type: ignore[arg-type]

        return call

    return decorate


class RenamedAttribute:
    """A class attribute `old = RenamedAttribute("new")`: reads the attribute `new` of an instance."""

    def __init__(self, new: str) -> None:
        """The current name."""
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        """Called by Python with the class and the former name."""
        self._old = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> Any:
        """The value of the attribute under its current name."""
        if instance is None:
            return self
        warn(f"{self._old} is now {self._new}", DeprecationWarning)
        return getattr(instance, self._new)
