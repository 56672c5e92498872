"""Objects that a block receives and whose methods it calls, such as a cache of keys and values.

A recording contains the computation of a call's tensors, not what happens inside such an object. So each call of one of
its methods is a single call in the recording, repeated on the object that the block receives then. Code that reads the
object's content itself is refused.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast

from stochastic_depth.retrofit.code.signatures import PLAIN_TYPES
from stochastic_depth.retrofit.errors import TraceError


class Watcher(Protocol):
    """Receives the calls of an object's methods."""

    def call_of_object(self, value: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make the call and return its result."""
        ...

    @property
    def is_inside(self) -> bool:
        """Whether the running code is already part of a call."""
        ...


class Called:
    """Marks the class of objects whose methods are single calls."""


def as_called(value: Any) -> None:
    """Make an object report its method calls to its watcher; without a watcher, nothing changes."""
    if not isinstance(value, Called):
        try:
            object.__setattr__(value, "__class__", _called_class(type(value)))
        except TypeError as error:
            raise TraceError(f"the forward changes a {type(value).__name__} that it is given") from error


@contextmanager
def called(values: Collection[Any]) -> Generator[None]:
    """Context in which these objects report to their watchers."""
    for value in values:
        as_called(value)
    try:
        yield
    finally:
        for value in values:
            object.__setattr__(value, "__class__", type(value).__mro__[2])


@contextmanager
def watched(values: Collection[Any], watcher: Watcher) -> Generator[None]:
    """Context in which `watcher` receives the method calls on these objects."""
    for value in values:
        object.__getattribute__(value, "__dict__")[_WATCHER] = watcher
    try:
        yield
    finally:
        for value in values:
            del object.__getattribute__(value, "__dict__")[_WATCHER]


_WATCHER = "_stochastic_depth_watcher"


@functools.cache
def _called_class(kind: type) -> type:
    plain = cast(Callable[[Any, str], Any], kind.__getattribute__)

    def getattribute(self: Any, name: str) -> Any:
        value = plain(self, name)
        watcher: Watcher | None = object.__getattribute__(self, "__dict__").get(_WATCHER)
        if watcher is None or watcher.is_inside or name.startswith("__"):
            return value
        if isinstance(value, types.MethodType):
            return functools.partial(_told, watcher, self, name, value)
        if isinstance(value, PLAIN_TYPES) and not isinstance(getattr(kind, name, None), property):
            return value
        raise TraceError(
            f"the forward reads the content of its {kind.__name__} argument, which changes with every call: leave it "
            "out in training (use_cache=False if it is a cache)"
        )

    def fill(space: dict[str, Any]) -> None:
        space.update(__getattribute__=getattribute, __module__=kind.__module__, __qualname__=kind.__qualname__)

    return types.new_class(kind.__name__, (Called, kind), {}, fill)


def _told(watcher: Watcher, value: Any, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return watcher.call_of_object(value, name, method, args, kwargs)


def method_of(value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an object's method."""
    return getattr(value, name)(*args, **kwargs)
