"""Generalizes a recording to any number of samples, by comparison with a recording of another number."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, cast

from torch import fx


def generalize(graph: fx.Graph, other: fx.Graph) -> bool:
    """Generalize a recording to any number of samples, by comparison with a recording of another number.

    Numbers in the code that differ become sizes of nearby tensors. The metadata `samples` of each node says whether the
    first dimension of its value is the samples.

    Args:
        graph: the recording; it is changed.
        other: of the same call with another number of samples.

    Returns:
        Whether that is possible; if not, nothing is changed.
    """
    nodes, others = list(graph.nodes), list(other.nodes)
    if len(nodes) != len(others):
        return False
    twin = dict(zip(nodes, others, strict=True))
    changes: list[tuple[fx.Node, Any, Any]] = []
    for node, its in twin.items():
        same_call = node.op == its.op and (node.target == its.target or _is_wrapped(node, its))
        if not same_call or not _same_form(node.args, its.args, twin) or not _same_form(node.kwargs, its.kwargs, twin):
            return False
        if _splits_samples(node, its):
            return False
        if _differ(node.args, its.args) or _differ(node.kwargs, its.kwargs):
            changes.append((node, its, _rows(node, twin)))
    if any(rows is None for _, _, rows in changes):
        return False
    for node, its in twin.items():
        shape, its_shape = node.meta.get("shape"), its.meta.get("shape")
        if shape is not None and its_shape is not None:
            node.meta["samples"] = shape[:1] != its_shape[:1]
            if node.meta["samples"] and shape[0] == 1 and "order" in its.meta:
                # A single sample fits two formats, of which a convolution takes the other one.
                node.meta["order"] = its.meta["order"]
        for item, its_item in zip(node.meta.get("items", ()), its.meta.get("items", ()), strict=False):
            item["samples"] = item["shape"][:1] != its_item["shape"][:1]
    for node, its, (source, here, there) in changes:
        with graph.inserting_before(node):
            rows = graph.call_function(operator.getitem, (graph.call_function(getattr, (source, "shape")), 0))

            def sized(a: Any, b: Any, rows: fx.Node = rows, here: int = here, there: int = there) -> Any:
                return _map_two(a, b, lambda x, y: _affine(graph, rows, here, there, x, y))

            args, kwargs = sized(node.args, its.args), sized(node.kwargs, its.kwargs)
        node.args, node.kwargs = args, kwargs
    return True


def _splits_samples(node: fx.Node, its: fx.Node) -> bool:
    """Whether a call splits the samples into parts, of which another number of samples may give more or fewer."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in ("chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes") or not node.all_input_nodes:
        return False
    shape, its_shape = (each.all_input_nodes[0].meta.get("shape", ()) for each in (node, its))
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return shape[:1] != its_shape[:1] and dim in (0, -len(shape))


def _is_wrapped(node: fx.Node, its: fx.Node) -> bool:
    """Whether both are a function under settings of its own, which is another object in every recording."""
    return getattr(node.target, "__name__", 0) == getattr(its.target, "__name__", 1) and "settings" in node.meta


def _same_form(a: Any, b: Any, twin: Mapping[fx.Node, fx.Node]) -> bool:
    if isinstance(a, fx.Node):
        return twin.get(a) is b
    if type(a) is not type(b) and not (isinstance(a, (tuple, list)) and isinstance(b, (tuple, list))):
        return False
    if isinstance(a, (tuple, list)):
        first, second = cast("list[Any]", a), cast("list[Any]", b)
        return len(first) == len(second) and all(_same_form(x, y, twin) for x, y in zip(first, second, strict=True))
    if isinstance(a, dict):
        mine, its = cast("dict[Any, Any]", a), cast("dict[Any, Any]", b)
        return mine.keys() == its.keys() and all(_same_form(mine[key], its[key], twin) for key in mine)
    if isinstance(a, slice):
        return all(_same_form(getattr(a, n), getattr(b, n), twin) for n in ("start", "stop", "step"))
    return a is b or a == b or (type(a) is int and type(b) is int)


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node):
        return False
    if isinstance(a, (tuple, list)):
        return any(_differ(x, y) for x, y in zip(cast("list[Any]", a), b, strict=True))
    if isinstance(a, dict):
        return any(_differ(a[key], b[key]) for key in cast("dict[Any, Any]", a))
    if isinstance(a, slice):
        return any(_differ(getattr(a, name), getattr(b, name)) for name in ("start", "stop", "step"))
    return type(a) is int and a != b


def _rows(node: fx.Node, twin: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, int, int] | None:
    """A tensor whose first dimension follows the number of samples, best one that the node itself uses."""
    earlier = list(node.all_input_nodes)
    earlier += [other for other in node.graph.nodes if other.op == "placeholder"]
    for source in earlier:
        shape, its = source.meta.get("shape"), twin[source].meta.get("shape")
        if shape and its and shape[0] != its[0]:
            return source, shape[0], its[0]
    return None


def _map_two(a: Any, b: Any, function: Callable[[int, int], Any]) -> Any:
    if isinstance(a, (tuple, list)):
        kind = tuple if isinstance(a, tuple) else list
        return kind(_map_two(x, y, function) for x, y in zip(cast("list[Any]", a), b, strict=True))
    if isinstance(a, dict):
        return {key: _map_two(value, b[key], function) for key, value in cast("dict[Any, Any]", a).items()}
    if isinstance(a, slice):
        return slice(*(_map_two(getattr(a, n), getattr(b, n), function) for n in ("start", "stop", "step")))
    return function(a, b) if type(a) is int and a != b else a


def _affine(graph: fx.Graph, rows: fx.Node, here: int, there: int, x: int, y: int) -> fx.Node:
    """The number that is `x` for as many rows as `here` and `y` for as many as `there`."""
    slope = Fraction(x - y, here - there)
    node = rows if slope.numerator == 1 else graph.call_function(operator.mul, (rows, slope.numerator))
    if slope.denominator != 1:
        node = graph.call_function(operator.floordiv, (node, slope.denominator))
    offset = x - slope * here
    if offset != 0:
        node = graph.call_function(operator.add, (node, int(offset)))
    return node


def skeleton(graph: fx.Graph, *, with_numbers: bool = False) -> tuple[Any, ...]:
    """What a recording does, to be compared with another.

    Args:
        graph: the recording.
        with_numbers: whether the real numbers in it count; a factor that changes with every step changes nothing else.
    """
    index = {node: position for position, node in enumerate(graph.nodes)}

    def of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return index[value]
        if isinstance(value, (tuple, list)):
            return type(value).__name__, tuple(of(item) for item in cast("list[Any]", value))
        if isinstance(value, dict):
            return tuple((key, of(item)) for key, item in cast("dict[Any, Any]", value).items())
        if isinstance(value, slice):
            return "slice", of(value.start), of(value.stop), of(value.step)
        # Times 0 and times 1 may hide what any other number shows.
        is_any = type(value) is float and value not in (0.0, 1.0, -1.0) and not with_numbers
        return type(value).__name__ if is_any else repr(value)

    return tuple(
        (
            node.op,
            node.target if isinstance(node.target, str) or "settings" not in node.meta else str(node.meta["settings"]),
            of(node.args),
            of(node.kwargs),
            node.meta.get("samples"),
            len(node.meta.get("shape", ())),
            tuple(index[each] for each in node.meta.get("writes", ()) if each in index),
            node.meta.get("checkpoint"),
        )
        for node in graph.nodes
    )
