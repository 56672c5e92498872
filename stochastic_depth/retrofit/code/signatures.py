"""The signature of a call: its arguments with symbols for tensors and objects, which do not decide a path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

PLAIN_TYPES = (type(None), bool, int, float, str, torch.dtype, torch.device)
_MAX_FORMS = 64

_Known = TypeVar("_Known")


@dataclass(frozen=True)
class Opaque:
    """Stands for an argument that the recording treats as a symbol: a tensor, or an object of another class."""


OPAQUE = Opaque()


def flatten(value: Any, leaves: list[Any]) -> Any:
    """The part of an argument that decides the path of a forward: the argument with `OPAQUE` for tensors and objects.

    Args:
        value: the argument, or a structure of tuples, lists and dicts.
        leaves: opaque values are appended to it.

    Returns:
        The signature, hashable.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return OPAQUE
    if isinstance(value, PLAIN_TYPES):
        return type(value), value
    if type(value) in (tuple, list, torch.Size):
        return (type(value), tuple(flatten(item, leaves) for item in value))
    if type(value) is dict:
        return (dict, tuple((key, flatten(item, leaves)) for key, item in cast("dict[Any, Any]", value).items()))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return (type(value), tuple(flatten(item, leaves) for item in cast("tuple[Any, ...]", value)))
    leaves.append(value)
    return OPAQUE


def unflatten(signature: Any, leaves: Sequence[Any]) -> Any:
    """The argument of a signature, with these values instead of the opaque parts."""
    return _unflatten(signature, iter(leaves))


def _unflatten(signature: Any, leaves: Any) -> Any:
    if isinstance(signature, Opaque):
        return next(leaves)
    kind, value = signature
    if kind is dict:
        return {key: _unflatten(item, leaves) for key, item in value}
    if kind in (tuple, list, torch.Size):
        return kind([_unflatten(item, leaves) for item in value])
    if hasattr(kind, "_fields"):
        return kind(*[_unflatten(item, leaves) for item in value])
    return value


def remember(known: dict[Any, list[_Known]], form: Any, entries: list[_Known]) -> None:
    """Keep what is known of a form of call, on each way through the code, and forget the oldest of too many.

    A number that changes with every step makes every call one of a new form.
    """
    known[form] = entries[-_MAX_FORMS:]
    while len(known) > _MAX_FORMS:
        del known[next(iter(known))]
