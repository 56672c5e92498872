"""What the operations in a recording do: add, keep zeros, change values in place, compute."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import fx, nn

from stochastic_depth.retrofit.recording.sizes import is_size

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_ADDITION_METHODS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


def added(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of an addition of two values; None for other nodes."""
    is_addition = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in _ADDITION_METHODS
    )
    if not is_addition or (node.kwargs and node.kwargs != {"alpha": 1}) or len(node.args) != 2 or is_size(node):
        return None
    first, second = node.args
    return (first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None


_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply}
_VIEWS = {
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "unsqueeze", "squeeze", "to",
    "type_as", "float", "half", "movedim", "swapaxes", "clone", "type", "view_as", "reshape_as", "chunk", "mT", "T",
}  # fmt: skip
_VIEW_FUNCTIONS = (
    {operator.getitem} | {getattr(torch, name) for name in _VIEWS if hasattr(torch, name)} | {nn.functional.dropout}
)
_KEEPS_ZERO_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)


def keeps_zero(node: fx.Node, value: fx.Node, block: nn.Module) -> bool:
    """Whether a node gives zeros wherever `value`, its argument, is zero."""
    if node.op == "call_module":
        module = block.get_submodule(cast(str, node.target))
        return isinstance(module, _KEEPS_ZERO_MODULES) or "Scale" in type(module).__name__
    if node.op == "call_method":
        return node.args[0] is value and (node.target in _VIEWS or node.target in ("mul", "mul_"))
    return node.op == "call_function" and (node.target in _VIEW_FUNCTIONS or node.target in _PRODUCTS)


# Functions that may return a view of their first argument.
SAME_MEMORY = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes",
    "permute", "movedim", "t", "expand", "expand_as", "narrow", "select", "chunk", "split", "unbind", "getitem",
    "contiguous", "detach", "unfold", "diagonal",
}  # fmt: skip
_CHANGES = {
    operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip


def writes_in_place(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(block.get_submodule(cast(str, node.target)), "inplace", False))
    if node.op == "call_method":
        target = cast(str, node.target)
        return target.endswith("_") and not target.endswith("__")
    if node.op != "call_function" or is_size(node):
        return False
    if node.target in _CHANGES:
        return True
    name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "")
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and module != "_operator")


def changes_one_of(values: Collection[fx.Node], node: fx.Node, block: nn.Module) -> bool:
    """Whether a node changes one of these values in place, itself or through views of it."""
    if "writes" in node.meta:  # It was recorded while running.
        return any(value in values for value in node.meta["writes"])
    if not writes_in_place(node, block) or not node.args:
        return False
    changed = cast(fx.Node, node.args[0])
    while changed not in values:
        name = name_of(changed)
        if changed.op not in ("call_method", "call_function") or name not in SAME_MEMORY:
            return False
        changed = cast(fx.Node, changed.args[0])
    return True


_HEAVY = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "bmm",
    "mm",
    "addmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
}


def computes(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node is worth skipping: a child with parameters, or a function that multiplies."""
    if node.op == "call_module":
        return next(block.get_submodule(cast(str, node.target)).parameters(), None) is not None
    name = name_of(node)
    return node.op in ("call_function", "call_method") and name in _HEAVY


def is_plain(value: fx.Node, block: nn.Module) -> bool:
    """Whether a value is computed without anything worth skipping."""
    return not any(computes(node, block) for node in ancestors(value))


_CHEAP = {
    "pad", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool1d",
    "max_pool2d", "interpolate", "zeros", "zeros_like", "new_zeros", "dropout", "to", "clone", "getattr", "_after",
    "boolean_dispatch", "adaptive_avg_pool3d", "max_pool3d", "fn", "roll", "flip",
    "type_as", "type", "float", "half", "bfloat16", "double",
}  # fmt: skip


def is_computed(node: fx.Node) -> bool:
    """Whether a value is computed from inputs, not from parameters alone."""
    return any(each.op in ("placeholder", "call_module") for each in ancestors(node))


def is_cheap(node: fx.Node) -> bool:
    """Whether a value is still a shortcut after this function: scaling by a number, padding, pooling, a view."""
    name = name_of(node)
    if name in ("mul", "mul_", "truediv", "div", "multiply", "add", "add_", "imul"):
        values = [each for each in node.all_input_nodes if not is_size(each) and is_computed(each)]
        return len(values) <= 1
    if name in ("cat", "concat"):
        # Zeros appended to the shortcut, as in the authors' networks.
        return len([each for each in node.all_input_nodes if not is_size(each)]) <= 2
    return name in _CHEAP or name in SAME_MEMORY


PRODUCTS = {"mul", "imul", "multiply", "mul_"}
"""Names of functions and methods that multiply."""
_LIKE_ANOTHER = {f"{name}_like" for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")} | {
    f"new_{name}" for name in ("zeros", "ones", "empty", "full", "tensor")
}
# Functions and methods that take another tensor for its shape, type or device.
_AS_ANOTHER = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


def sources(node: fx.Node) -> Sequence[fx.Node]:
    """The values that a node is computed from, without sizes, and without tensors that only lend it their form."""
    name = name_of(node)
    if node.op in ("call_function", "call_method") and name in _LIKE_ANOTHER | _AS_ANOTHER:
        given = node.args[1:] if name in _LIKE_ANOTHER else node.args[:1]
        return [each for each in given if isinstance(each, fx.Node) and not is_size(each)]
    return [each for each in node.all_input_nodes if not is_size(each)]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all nodes that it is computed from, see `sources`.

    Children that use their arguments for their sizes only, such as positions, are marked (`of_sizes`).
    """
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            if not current.meta.get("of_sizes"):
                pending.extend(sources(current))
    return found


def descendants(node: fx.Node) -> set[fx.Node]:
    """All nodes that are computed from a node."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(user for user in current.users if current in sources(user))
    return found - {node}


def name_of(node: fx.Node) -> str:
    """The name of the function, method or child that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def describe(node: fx.Node) -> str:
    """A node in a message."""
    return f"a call of {name_of(node) or node.target}"
