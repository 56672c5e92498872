"""Plain values in a recording: sizes, types and devices of tensors, and values computed from them alone."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx

from stochastic_depth.retrofit.errors import TraceError

_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda"}
_SIZE_METHODS = {"size", "dim", "numel", "ndimension", "element_size", "is_floating_point", "__len__", "get_device"}
_SIZE_FUNCTIONS = {
    function for module in (operator, math, builtins) for function in vars(module).values() if callable(function)
} - {getattr}


def is_size(node: fx.Node) -> bool:
    """Whether a node is a plain value computed from sizes, types and devices of tensors only."""
    known = node.meta.get("is_size")
    if known is None:
        known = node.meta["is_size"] = _is_size(node)
    return known


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZE_METHODS or (
            bool(node.all_input_nodes) and all(is_size(argument) for argument in node.all_input_nodes)
        )
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES or is_size(cast(fx.Node, node.args[0]))
    if node.target is len:
        return True
    if node.target not in _SIZE_FUNCTIONS or not node.all_input_nodes:
        return False
    return all(is_size(argument) for argument in node.all_input_nodes)


def may_be_size(node: fx.Node) -> bool:
    """Whether a node is a plain value if the arguments that it is computed from are."""
    if node.op == "placeholder" or is_size(node):
        return True
    is_plain = node.op == "call_function" and node.target in _SIZE_FUNCTIONS
    return is_plain and all(may_be_size(argument) for argument in node.all_input_nodes)


def size_value(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The value of a size, computed from the arguments of a call.

    Raises:
        TraceError: if it depends on more than the arguments.
    """
    if node in values:
        return values[node]
    if node.op not in ("call_function", "call_method") or not (is_size(node) or node.target in (bool, len)):
        raise TraceError(f"the forward's control flow depends on the value of {node.name}")
    args = fx.map_arg(node.args, lambda argument: size_value(argument, values))
    kwargs = fx.map_arg(node.kwargs, lambda argument: size_value(argument, values))
    if node.target is bool and isinstance(args[0], Tensor):
        raise TraceError("the forward's control flow depends on the values of a tensor")
    if node.op == "call_method":
        return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
    return cast("Callable[..., Any]", node.target)(*args, **kwargs)


def decide_by(leaves: Sequence[Any], node: fx.Node) -> Any:
    """The value of a node that the control flow depends on, in a call with these opaque arguments.

    Raises:
        TraceError: if it depends on more than their sizes.
    """
    placeholders = [other for other in node.graph.nodes if other.op == "placeholder"]
    return size_value(node, dict(zip(placeholders, leaves, strict=True)))
