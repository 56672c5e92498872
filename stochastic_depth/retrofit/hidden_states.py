"""Which of a layer's arguments are its hidden states, which a dropped layer returns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn

from stochastic_depth.compiling import eager
from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.signatures import Opaque, flatten
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.sizes import decide_by, is_size
from stochastic_depth.retrofit.recording.trace import record
from stochastic_depth.retrofit.rewriting.sums import Sum, find_sums

# What layers call their hidden states, also where these are not their first argument.
_NAMES = ("hidden_states", "x")

# By class, for calls with several tensors: the parameter that its code continues; None if that is not known.
_continued: WeakKeyDictionary[type[nn.Module], str | None] = WeakKeyDictionary()


@eager
def hidden_states_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states of a call, see `name_of_hidden_states`; None if it has no tensor."""
    plain = plain_class(layer)
    given = {**dict(zip(_parameter_names(plain.forward), args, strict=False)), **kwargs}

    def continued() -> str | None:
        if plain not in _continued:
            leaves: list[Any] = []
            signature = flatten((args, kwargs), leaves)
            try:
                graph = record(layer, signature, len(leaves), functools.partial(decide_by, leaves)).graph
                _continued[plain] = continued_name(graph, layer, leaf_names(given))
            except TraceError:
                _continued[plain] = None
        return _continued[plain]

    if (name := name_of_hidden_states(given, continued)) is not None:
        return cast(Tensor, given[name])
    leaves: list[Any] = []
    flatten((args, kwargs), leaves)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)


def name_of_hidden_states(given: Mapping[str, Any], continued: Callable[[], str | None]) -> str | None:
    """The parameter that is a layer's hidden states; None if no parameter is a tensor.

    It is the one with a usual name, or else the one to which the layer adds its branches, or else the first.

    Args:
        given: the values of the layer's parameters in its own order; `OPAQUE` may be a tensor.
        continued: see `continued_name`; called only if the names do not decide.
    """
    tensors = [name for name, value in given.items() if isinstance(value, (Tensor, Opaque))]
    numbers = [name for name in tensors if not isinstance(given[name], Tensor) or given[name].is_floating_point()]
    found = next((name for name in _NAMES if name in tensors), None)
    if found is None and len(numbers) > 1:
        found = continued()
    return found if found in tensors else next(iter((*numbers, *tensors)), None)


def leaf_names(given: Mapping[str, Any]) -> list[str]:
    """The parameter that each opaque value of a call belongs to."""
    leaves: list[Any] = []
    names: list[str] = []
    for name, value in given.items():
        flatten(value, leaves)
        names += [name] * (len(leaves) - len(names))
    return names


def continued_name(graph: fx.Graph, layer: nn.Module, names: Sequence[str]) -> str | None:
    """The parameter that a layer's first output continues, behind its branches, its norms and other single inputs.

    Args:
        graph: a recording of the layer.
        layer: the layer.
        names: the parameter of each of the recording's inputs.
    """
    shortcuts = {each.add: each.shortcut for each in find_sums(graph, layer, ()).values() if isinstance(each, Sum)}
    *_, output = graph.nodes
    node: Any = output.args[0]
    while isinstance(node, (tuple, list)) and node:
        node = cast("Sequence[Any]", node)[0]
    while isinstance(node, fx.Node) and node.op != "placeholder":
        sources = [source for source in node.all_input_nodes if not is_size(source)]
        node = shortcuts.get(node) or (sources[0] if len(sources) == 1 else None)
    inputs = [each for each in graph.nodes if each.op == "placeholder"]
    if len(names) != len(inputs):  # some arguments have no parameter of their own: *args
        return None
    return dict(zip(inputs, names, strict=True)).get(cast(fx.Node, node))


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
