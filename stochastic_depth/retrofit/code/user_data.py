"""Users' structures and plain objects, such as a config or a counter: private copies, and snapshots to compare."""

from __future__ import annotations

import copy
import enum
import io
import random
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.retrofit.code.called import Called
from stochastic_depth.retrofit.code.forms import items_of
from stochastic_depth.torch_private import is_fake, is_transformed

CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format, enum.Enum, type, range, types.FunctionType, types.BuiltinFunctionType, torch.Generator,
)  # fmt: skip


def copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a module with copied structures and plain objects, which code may change."""
    memo: dict[int, Any] = {}
    return {name: private_copy(value, memo) for name, value in attributes.items()}


def private_copy(value: Any, memo: dict[int, Any], depth: int = 4) -> Any:
    """A copy of a value and what it holds, as far as code may change it; `memo` has what was copied before."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    made = value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        # Code may change it in place, or hold it for its gradient.
        if not value.requires_grad and not has_no_data(value):
            made = memo[id(value)] = value.clone()
    elif isinstance(value, torch.Generator):
        made = memo[id(value)] = value.clone_state()
    elif isinstance(value, random.Random) or kind.__module__.partition(".")[0] == "numpy":
        made = memo[id(value)] = copy.deepcopy(value)
    elif depth and kind in (list, set, dict, deque, OrderedDict, defaultdict):
        made = memo[id(value)] = copy.copy(value)
        if isinstance(made, dict):
            items = cast("dict[Any, Any]", made)
            items.update({key: private_copy(item, memo, depth - 1) for key, item in items.items()})
        elif isinstance(made, list):
            made[:] = [private_copy(item, memo, depth - 1) for item in cast("list[Any]", made)]
    elif depth and is_data(value) and not _is_shared(value):
        try:
            made = copy.copy(value)
        except Exception:  # A socket or a process cannot be copied and is used as it is.
            return value
        if made is value:  # the only one of its class
            return value
        memo[id(value)] = made
        for name, item in vars(value).items():
            object.__setattr__(made, name, private_copy(item, memo, depth - 1))
    elif is_iterator(value) and not isinstance(value, (io.IOBase, Tensor)):
        with suppress(TypeError):  # A generator cannot be copied.
            made = memo[id(value)] = copy.deepcopy(value)
    return made


# Their objects are no data of a model. A logger leads to all others, with thousands of objects.
_NO_DATA = {"torch", "numpy", "random", "logging", "stochastic_depth"}


def is_data(value: Any) -> bool:
    """Whether a user's object holds data, such as a config or a counter."""
    kind = cast("type[Any]", type(value))
    return (
        hasattr(value, "__dict__")
        and type(value) not in weakref.ProxyTypes
        and not isinstance(value, (Tensor, nn.Module, type, types.ModuleType, enum.Enum, Called))
        and not callable(value)
        and not hasattr(kind, "__copy__")
        and kind.__module__.partition(".")[0] not in _NO_DATA
    )


def is_iterator(value: Any) -> bool:
    """Whether a value is an iterator; a proxy of any object looks like one."""
    return isinstance(value, Iterator) and type(value) not in weakref.ProxyTypes


class _Plain:
    """An object that holds nothing but its attributes."""


def _is_shared(value: Any, depth: int = 4) -> bool:
    """Whether a user's object itself is used where code is tried, instead of a copy; `surroundings` puts it back.

    Code may ask which object it is, as of a sentinel or a kind of its own. And the end of a copy would close what it
    shares with its original.
    """
    kind = cast("type[Any]", type(value))
    if kind.__basicsize__ != _Plain.__basicsize__:
        return False  # It holds more than its attributes, as a dictionary or a buffer of text does.
    return hasattr(kind, "__del__") or all(
        isinstance(item, CONSTANTS) or (depth > 0 and is_data(item) and _is_shared(item, depth - 1))
        for item in vars(value).values()
    )


def snapshot(value: Any, depth: int = 4) -> Any:
    """The current content of a structure or a plain object, to compare with its later content."""
    kind = type(value)
    if depth and kind in (list, tuple, deque):
        return kind, [snapshot(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return kind, {key: snapshot(item, depth - 1) for key, item in items_of(cast("dict[Any, Any]", value))}
    if depth and kind is set:
        return kind, set(cast("set[Any]", value))
    if kind.__module__ == "numpy" and hasattr(value, "tobytes"):
        return kind, value.tobytes()
    if depth and is_data(value):
        return kind, id(value), {name: snapshot(item, depth - 1) for name, item in vars(value).items()}
    return value


def has_no_data(tensor: Tensor) -> bool:
    """Whether a tensor has a shape only."""
    return tensor.is_meta or is_fake(tensor) or is_transformed(tensor)
