"""A block's own code, from its class or set on the block, bound to what stands in for it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from stochastic_depth.copies import own_class


def own_forward(block: nn.Module, stand_in: nn.Module) -> Callable[..., Any]:
    """A block's own code, from its class or set on the instance, bound to a stand-in."""
    gates = block.__dict__.get("_stochastic_depth_branch")
    # A forward set on a stochastic block calls its gated forward, see `block.refuse_bypass`.
    forward = cast(Any, gates).own_forward if hasattr(gates, "own_forward") else block.__dict__.get("forward")
    if forward is None:
        return types.MethodType(own_class(block).forward, stand_in)
    return bound_anew(forward, block, stand_in)


def bound_anew(forward: Any, module: nn.Module, new: nn.Module) -> Any:
    """A method that was set on a module, such as a forward, bound to its stand-in."""
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return types.MethodType(forward.__func__, new)
    if isinstance(forward, functools.partial):
        part = cast("functools.partial[Any]", forward)
        args = [new if argument is module else argument for argument in part.args]
        return functools.partial(part.func, *args, **part.keywords)
    return forward
