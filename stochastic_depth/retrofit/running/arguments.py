"""Private copies of the arguments of a block's call, for recordings and proofs that leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from stochastic_depth.retrofit.code.called import as_called
from stochastic_depth.retrofit.code.signatures import unflatten
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.stand_in import sample_leaf

MakesArguments = Callable[[], "tuple[Sequence[Any], Mapping[str, Any], list[Any]]"]
"""Returns the arguments of a call, by position and by name, and those of them that are tensors or objects."""


def arguments_anew(
    signature: Any,
    leaves: Sequence[Any],
    rows: Mapping[int, Tensor],
    called: Collection[type],
) -> MakesArguments:
    """Returns a function that makes private copies of the arguments of a call.

    Args:
        signature: signature of the arguments.
        leaves: the opaque arguments.
        rows: indices of the samples to take, by the position of the leaf.
        called: classes of objects whose methods are single calls.
    """

    def call() -> tuple[Sequence[Any], Mapping[str, Any], list[Any]]:
        made: dict[int, Any] = {}  # What is given twice is one object.
        for index, leaf in enumerate(leaves):
            if id(leaf) not in made:
                some = rows.get(index)
                if some is not None:
                    some = some % len(leaf)  # They may be of an earlier call that had more.
                made[id(leaf)] = sample_leaf(leaf, some) if isinstance(leaf, Tensor) else copy_of_object(leaf)
        own = [made[id(leaf)] for leaf in leaves]
        for value, leaf in zip(own, leaves, strict=True):
            if type(leaf) in called:
                as_called(value)
        args, kwargs = unflatten(signature, own)
        return args, kwargs, own

    return call


def behind_nodes(call: MakesArguments) -> tuple[Any, Any, list[Any]]:
    """The arguments of a call, whose tensors are no leaves of autograd: code in place could not change those."""
    args, kwargs, leaves = call()
    given = [anew_of(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
    anew = {id(leaf): new for leaf, new in zip(leaves, given, strict=True)}
    given = [anew[id(leaf)] for leaf in leaves]
    return *replaced(args, kwargs, leaves, given), given


def anew_of(leaf: Tensor) -> Tensor:
    """The same tensor behind a node of autograd, with the attributes that somebody has set on it.

    Parameters, which no code changes in place where gradients are computed, stay as they are.
    """
    if isinstance(leaf, nn.Parameter):
        return leaf
    new = leaf.clone()
    vars(new).update(vars(leaf))
    return new


def replaced(args: Any, kwargs: Any, leaves: Sequence[Any], given: Sequence[Any]) -> tuple[Any, Any]:
    """The arguments with the opaque ones replaced by other tensors."""
    new = {id(leaf): value for leaf, value in zip(leaves, given, strict=True)}

    def with_new(value: Any) -> Any:
        if id(value) in new:
            return new[id(value)]
        if type(value) in (tuple, list):
            return type(value)(with_new(item) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return cast(Any, type(value))(*[with_new(item) for item in cast("tuple[Any, ...]", value)])
        if type(value) is dict:
            return {key: with_new(item) for key, item in cast("dict[Any, Any]", value).items()}
        return value

    return with_new(tuple(args)), with_new(dict(kwargs))


def copy_of_object(leaf: Any) -> Any:
    """A copy of an object that code may change; tensors, modules and functions are not copied.

    Raises:
        TraceError: if it cannot be copied.
    """
    if isinstance(leaf, Iterator):
        raise TraceError(f"it is given an iterator (a {type(leaf).__name__}), which a look at it would use up")
    if isinstance(leaf, (Tensor, nn.Module)) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return leaf
    tensors = [(tensor, tensor.detach().clone()) for tensor in _tensors_of(leaf, set())]
    try:
        return copy.deepcopy(leaf, {id(tensor): own for tensor, own in tensors})
    except Exception as error:
        raise TraceError(f"its {type(leaf).__name__} argument cannot be copied ({error})") from error


def _tensors_of(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (nn.Module, type)):
        seen.add(id(value))
        items: Any = ()
        if isinstance(value, (list, tuple)):
            items = cast("list[Any]", value)
        elif isinstance(value, dict):
            items = cast("dict[Any, Any]", value).values()
        elif hasattr(value, "__dict__") and not callable(value):
            items = vars(value).values()
        for item in items:
            yield from _tensors_of(item, seen)
