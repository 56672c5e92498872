"""Which of a layer's arguments are its hidden states, which a dropped layer returns."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn

from stochastic_depth.compiling import eager
from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.signatures import Opaque, flatten
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.finding.inlined import inlined_in
from stochastic_depth.retrofit.recording.sizes import decide_by
from stochastic_depth.retrofit.recording.trace import record
from stochastic_depth.retrofit.rewriting.operations import sources
from stochastic_depth.retrofit.rewriting.sums import Sum, find_sums

# What layers call their hidden states, also where these are not their first argument.
_NAMES = ("hidden_states", "x")

# By class and form of call, for calls with several tensors: the number of the tensor that its code continues.
_continued: WeakKeyDictionary[type[nn.Module], dict[Any, int | None]] = WeakKeyDictionary()


@eager
def hidden_states_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states of a call, see `number_of_hidden_states`; None if it has no tensor."""
    leaves: list[Any] = []
    signature = flatten((args, kwargs), leaves)
    plain = plain_class(layer)
    names = _names_of_leaves(plain.forward, args, kwargs)

    def continued() -> int | None:
        known = _continued.setdefault(plain, {})
        form = len(args), tuple(kwargs), tuple(names)
        if form not in known:
            known[form] = _number_read(layer, signature, leaves)
        return known[form]

    number = number_of_hidden_states(leaves, names, plain, continued)
    return None if number is None else leaves[number]


def number_of_hidden_states(
    leaves: Sequence[Any], names: Sequence[str], plain: type[nn.Module], continued: Callable[[], int | None]
) -> int | None:
    """Which of a layer's tensors are its hidden states; None if it is given none.

    It is the one to which the layer adds its branches. If its code does not show that, it is the one with a usual name,
    or else the first in the order of the layer's parameters.

    Args:
        leaves: the opaque values of the call, or `OPAQUE` where they are not known.
        names: the parameter that each of them belongs to.
        plain: the layer's class.
        continued: see `continued_input`; called only if there are several.
    """
    # A usual name comes first, wherever the parameter is.
    order = {name: index for index, name in enumerate(dict.fromkeys((*_NAMES, *_parameter_names(plain.forward))))}
    tensors = [number for number, leaf in enumerate(leaves) if isinstance(leaf, (Tensor, Opaque))]
    tensors.sort(key=lambda number: (not _is_float(leaves[number]), order.get(names[number], len(order)), number))
    if not tensors:
        return None
    first, is_named = leaves[tensors[0]], names[tensors[0]] in _NAMES
    others = [number for number in tensors[1:] if _is_float(leaves[number])]
    alike = [number for number in others if _shape(leaves[number]) == _shape(first)]
    found = continued() if alike or (others and not is_named) else None
    if found is None and alike and not is_named:
        warnings.warn(
            f"layers=: {plain.__name__} is called with several tensors of one shape, and its code does not show which "
            f"of them it continues. If it is dropped, it returns the first, {names[tensors[0]]}. If that is wrong, "
            "name the right one hidden_states in its forward.",
            stacklevel=2,
        )
    return tensors[0] if found is None else found


def continued_input(graph: fx.Graph, layer: nn.Module) -> int | None:
    """Which input of a recording the layer's first output continues, behind its branches and other single inputs."""
    shortcuts = {each.add: each.shortcut for each in find_sums(graph, layer, ()).values() if isinstance(each, Sum)}
    *_, output = graph.nodes
    node: Any = output.args[0]
    while isinstance(node, (tuple, list)) and node:
        node = cast("Sequence[Any]", node)[0]
    while isinstance(node, fx.Node) and node.op != "placeholder":
        given = [source for source in sources(node) if source.op != "get_attr"]
        node = shortcuts.get(node) or (given[0] if len(given) == 1 else None)
    if not isinstance(node, fx.Node):
        return None
    return [each for each in graph.nodes if each.op == "placeholder"].index(node)


def leaf_names(given: Iterable[tuple[str, Any]]) -> list[str]:
    """The parameter that each opaque value of a call belongs to."""
    leaves: list[Any] = []
    names: list[str] = []
    for name, value in given:
        flatten(value, leaves)
        names += [name] * (len(leaves) - len(names))
    return names


def _names_of_leaves(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    names = _parameter_names(forward)
    positional = [(names[min(index, len(names) - 1)] if names else "", value) for index, value in enumerate(args)]
    return leaf_names((*positional, *kwargs.items()))


def adding_children(layer: nn.Module) -> tuple[str, ...]:
    """The children in which branches of a layer end, as far as its code can be read."""
    try:
        return inlined_in(layer, None)
    except TraceError:
        return ()


def _number_read(layer: nn.Module, signature: Any, leaves: Sequence[Any]) -> int | None:
    decide, inlined = functools.partial(decide_by, leaves), adding_children(layer)
    try:
        recording = record(layer, signature, len(leaves), decide, may_store=True, inlined=inlined)
    except TraceError:
        return None
    return continued_input(recording.graph, layer)


def _is_float(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or leaf.is_floating_point()


def _shape(leaf: Any) -> Any:
    return leaf.shape if isinstance(leaf, Tensor) and not leaf.is_nested else None


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
