"""Remembers what is found out about a block while it is read or proven, and no longer: it may change afterward."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_T = TypeVar("_T")
_found: ContextVar[dict[Any, tuple[Any, Any]] | None] = ContextVar("_found", default=None)


@contextmanager
def remembering() -> Generator[None]:
    """Context in which `remembered` remembers."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def remembered(key: Any, make: Callable[[], _T], *of: Any) -> _T:
    """What `make` returns; what it returned for the same key before, within `remembering`.

    Args:
        key: the key.
        make: finds it out.
        *of: objects that are kept alive meanwhile, because the key has their identities.
    """
    found = _found.get()
    if found is None:
        return make()
    if key not in found:
        found[key] = of, make()
    return found[key][1]
