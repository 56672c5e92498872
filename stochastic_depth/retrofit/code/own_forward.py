"""A block's own code, from its class or set on the block, bound to what stands in for it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from stochastic_depth.copies import own_class
from stochastic_depth.retrofit.code.places import content_of


def own_forward(block: nn.Module, stand_in: nn.Module) -> Callable[..., Any]:
    """A block's own code, from its class or set on the instance, bound to a stand-in."""
    gates = block.__dict__.get("_stochastic_depth_branch")
    # A forward set on a stochastic block calls its gated forward, see `block.refuse_bypass`.
    forward = cast(Any, gates).own_forward if hasattr(gates, "own_forward") else block.__dict__.get("forward")
    if forward is None:
        return types.MethodType(own_class(block).forward, stand_in)
    return bound_anew(forward, {id(block): stand_in})


def bound_anew(value: Any, stand_ins: Mapping[int, nn.Module], depth: int = 4) -> Any:
    """What a module holds, such as a method, a closure or a list of layers, holding stand-ins instead of modules.

    Args:
        value: what it holds.
        stand_ins: by the identities of modules.
        depth: how far to look.
    """
    if isinstance(value, nn.Module):
        return stand_ins.get(id(value), value)
    if not depth:
        return value

    def anew(part: Any) -> Any:
        return bound_anew(part, stand_ins, depth - 1)

    if isinstance(value, types.MethodType):
        owner = stand_ins.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        part = cast("functools.partial[Any]", value)
        return functools.partial(
            anew(part.func), *map(anew, part.args), **{k: anew(v) for k, v in part.keywords.items()}
        )
    if isinstance(value, types.FunctionType) and value.__closure__:
        return _closed_anew(value, anew)
    # New ones: what a tuple or a closure holds may belong to the module itself.
    if type(value) in (list, tuple):
        items = list(cast("list[Any]", value))
        parts = [anew(item) for item in items]
        if all(part is item for part, item in zip(parts, items, strict=True)):
            return value
        return parts if type(value) is list else tuple(parts)
    if type(value) is dict:
        entries = cast("dict[Any, Any]", value)
        changed = [(anew(key), anew(item)) for key, item in entries.items()]
        before = zip(changed, entries.items(), strict=True)
        return value if all(a is b and c is d for (a, c), (b, d) in before) else dict(changed)
    return value


def _closed_anew(function: types.FunctionType, anew: Callable[[Any], Any]) -> types.FunctionType:
    before = [content_of(cell, "") for cell in function.__closure__ or ()]
    held = [anew(part) for part in before]
    if all(part is own for part, own in zip(held, before, strict=True)):
        return function
    cells = [
        cell if part is own else types.CellType(part)
        for cell, part, own in zip(function.__closure__ or (), held, before, strict=True)
    ]
    new = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    return new
