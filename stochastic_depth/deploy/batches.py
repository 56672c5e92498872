"""Batches of data in the forms that data loaders return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from stochastic_depth.retrofit.remembered import Call
from stochastic_depth.torch_private import tree_map

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""An example of a call: the argument of a forward, several in a tuple or list, or a mapping of arguments by name."""


def call_of(inputs: Inputs) -> Call:
    """The arguments of an example forward."""
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def map_tensors(function: Callable[[Tensor], Any], call: Call) -> Call:
    """The arguments with a function applied to their tensors."""

    def mapped(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return cast(Call, tree_map(mapped, call))


def own_tensors(call: Call) -> Call:
    """The arguments with copied tensors, because a forward may change them."""
    return map_tensors(lambda tensor: tensor.detach().clone(), call)


def arguments_of(batch: Any, model: nn.Module) -> Call:
    """The arguments of a forward on a batch, its tensors on the model's device.

    Args:
        batch: a tensor; a tuple or list whose first entry is the model's input (the others are labels); or a mapping of
            arguments by name.
        model: the model.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = cast("list[Any]", batch)[0]
    parameter = next(model.parameters(), None)

    def moved(value: Any) -> Any:
        return value.to(parameter.device) if isinstance(value, Tensor) and parameter is not None else value

    if isinstance(batch, Tensor):
        return (moved(batch),), {}
    if isinstance(batch, Mapping):
        named = {str(name): value for name, value in cast("Mapping[Any, Any]", batch).items() if name != "labels"}
        return (), tree_map(moved, named)
    raise TypeError(
        f"A batch must be a tensor, a tuple or list that begins with one, or a mapping, but is {batch!r:.80}."
    )
