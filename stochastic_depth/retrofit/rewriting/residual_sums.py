"""Tells residual additions in a recording from other additions."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import cast

from torch import fx, nn

from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.cuts import Sum
from stochastic_depth.retrofit.rewriting.operations import SAME_MEMORY, added, ancestors, computes, name_of
from stochastic_depth.torch_private import parameter_dict


def residual_sums(graph: fx.Graph, block: nn.Module) -> list[Sum]:
    """All residual additions in a recording, in order.

    An addition is one if both operands are computed from a common value, and one of them, the shortcut, is that value
    itself or computed from it by at most half as many children with parameters as the other, without any product of
    two values (a projection). A branch has at least one child with parameters. What was added to a shortcut before, by
    a parallel branch, does not count for it: in `x + attention(y) + mlp(y)` both are branches.
    """
    sums: list[Sum] = []
    bases: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        operands = added(node)
        if operands is None or operands[0] is operands[1]:
            continue
        for shortcut, output in (operands, operands[::-1]):
            base = bases.get(shortcut, shortcut)
            if any(_is_shortcut(each, output, block) for each in dict.fromkeys((shortcut, base))):
                sums.append(Sum(node, shortcut, output))
                bases[node] = base
                break
    return [each for each in sums if not any(_is_side_input(each, outer, block) for outer in sums)]


def _is_side_input(inner: Sum, outer: Sum, block: nn.Module) -> bool:
    """Whether a sum in a branch adds something to the stream itself, such as the positions of DETR's queries.

    The stream is the shortcut of the outer sum. It comes to the inner one, unchanged or normalized, as what looks like
    its branch, and what looks like its shortcut comes from elsewhere.
    """
    stream = outer.shortcut
    if inner.shortcut is None or stream is None or stream is inner.shortcut or inner.add is outer.add:
        return False
    of_output = ancestors(inner.output)
    if stream not in of_output or stream in ancestors(inner.shortcut):
        return False
    if inner.add not in ancestors(outer.output) or inner.add in ancestors(stream):
        return False
    since = [node for node in of_output - ancestors(stream) if computes(node, block)]
    return all(node.op == "call_module" and _is_norm(block.get_submodule(cast(str, node.target))) for node in since)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _is_shortcut(shortcut: fx.Node, output: fx.Node, block: nn.Module) -> bool:
    if _was_taken_out(shortcut) or _is_modulation(shortcut, output, block):
        return False
    of_shortcut, of_output = ancestors(shortcut), ancestors(output)
    if not any(computes(node, block) for node in of_output - of_shortcut):
        return False
    if shortcut in of_output:
        return shortcut.op != "get_attr"
    if _starts_at_zeros(shortcut) or _starts_at_zeros(output):
        return False
    if not any(_is_common(node, of_shortcut, of_output) for node in of_shortcut & of_output):
        return False
    projection = of_shortcut - of_output
    if any(node.op == "call_function" and not _is_cheap(node) and _is_computed(node) for node in projection):
        return False
    branch = of_output - of_shortcut
    # Layers, or the children that contain them: a branch may be one child, and so may a projection.
    return 2 * _num_computing(projection, block) <= _num_computing(branch, block) or 2 * _num_layers(
        projection, block
    ) <= _num_layers(branch, block)


def _is_common(node: fx.Node, a: Collection[fx.Node], b: Collection[fx.Node]) -> bool:
    """Whether two values that are computed from a node have that in common, and not only a container of streams."""
    if node.op == "get_attr":
        return False
    if node.op != "placeholder":
        return True
    used = [{user for user in node.users if user in values} for values in (a, b)]
    if not all(user.target is operator.getitem and isinstance(user.args[1], (int, str)) for user in used[0] | used[1]):
        return True
    items = [{cast("int | str", user.args[1]) for user in each} for each in used]
    return not (items[0] and items[1]) or not items[0].isdisjoint(items[1])


def _was_taken_out(shortcut: fx.Node) -> bool:
    """Whether a value was subtracted before, or takes no gradient, as the mean that models of time series add back."""
    node = shortcut
    while not node.meta.get("is_subtracted") and name_of(node) != "detach":
        sources = [each for each in node.all_input_nodes if not is_size(each)]
        if node.op not in ("call_function", "call_method") or len(sources) != 1:
            return False
        if name_of(node) not in SAME_MEMORY | _REPEATING:
            return False
        node = sources[0]
    return True


_REPEATING = {"repeat", "repeat_interleave", "tile", "clone", "to"}


def are_parallel(shortcut: fx.Node, a: fx.Node, b: fx.Node, block: nn.Module) -> bool:
    """Whether both values are computed from a shortcut, each with its own layers."""
    kept, of_a, of_b = ancestors(shortcut), ancestors(a), ancestors(b)
    if shortcut.op == "get_attr" or shortcut not in of_a & of_b or _starts_at_zeros(a) or _starts_at_zeros(b):
        return False
    own = (of_a - of_b - kept, of_b - of_a - kept)
    return all(any(computes(node, block) for node in nodes) for nodes in own)


def _starts_at_zeros(node: fx.Node) -> bool:
    """Whether a value is what a loop has added up, such as the outputs of experts."""
    while operands := added(node):
        node = operands[0]
    return name_of(_seen_through(node)) in _ZEROS


# Where sums of experts begin.
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_REDUCTIONS = {"mean", "std", "var", "amax", "amin", "norm", "median", "max", "min", "sum"}


def _seen_through(node: fx.Node) -> fx.Node:
    """The node that another is a view of, or a function with numbers only."""
    while node.op in ("call_function", "call_method"):
        sources = [each for each in node.all_input_nodes if not is_size(each)]
        is_view = node.target is operator.getitem and not isinstance(node.args[1], int)
        if len(sources) != 1 or not (is_view or name_of(node) in SAME_MEMORY - {"getitem"} | _WITH_NUMBERS):
            break
        node = sources[0]
    return node


_WITH_NUMBERS = {"add", "sub", "mul", "truediv", "div", "sqrt", "rsqrt", "clamp", "detach", "__radd__", "radd", "exp"}


def _is_modulation(shift: fx.Node, product: fx.Node, block: nn.Module) -> bool:
    """Whether a sum `x * scale + shift` is one of FiLM, AdaLN or RevIN: `scale` comes from where `shift` does.

    Either both are parts of one tensor, or both are statistics of one, or `x` has nothing to do with `shift`.
    """
    product = _seen_through(product)
    factors = [each for each in product.all_input_nodes if not is_size(each)]
    if name_of(product) not in ("mul", "imul", "multiply", "mul_") or len(factors) != 2:
        return False
    shift = _seen_through(shift)
    of_shift = {node for node in ancestors(shift) if node.op != "get_attr"}
    for x, scale in (factors, factors[::-1]):
        source = _seen_through(scale)
        is_other = source is not shift and source.args[:1] == shift.args[:1]
        is_part = source.target is operator.getitem and shift.target is operator.getitem
        are_statistics = {name_of(source), name_of(shift)} <= _REDUCTIONS
        if is_other and (is_part or are_statistics):
            return True
        of_scale, of_x = ancestors(source), ancestors(x)
        is_apart = shift not in of_scale and of_shift & of_scale and not of_shift & of_x
        if is_apart and 0 < _num_computing(of_scale, block) <= _num_computing(of_x, block):
            return True
    return False


_CHEAP = {
    "pad", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool1d",
    "max_pool2d", "interpolate", "zeros", "zeros_like", "new_zeros", "dropout", "to", "clone", "getattr", "_after",
    "boolean_dispatch", "adaptive_avg_pool3d", "max_pool3d", "fn", "roll", "flip",
}  # fmt: skip


def _is_computed(node: fx.Node) -> bool:
    """Whether a value is computed from inputs, not from parameters alone."""
    return any(each.op in ("placeholder", "call_module") for each in ancestors(node))


def _is_cheap(node: fx.Node) -> bool:
    """Whether a value is still a shortcut after this function: scaling by a number, padding, pooling, a view."""
    name = getattr(node.target, "__name__", "")
    if name in ("mul", "truediv", "div", "multiply", "add", "imul"):
        values = [each for each in node.all_input_nodes if not is_size(each) and _is_computed(each)]
        return len(values) <= 1
    if name in ("cat", "concat"):
        # Zeros appended to the shortcut, as in the authors' networks.
        return len([each for each in node.all_input_nodes if not is_size(each)]) <= 2
    return name in _CHEAP or name in SAME_MEMORY


def _num_computing(nodes: Collection[fx.Node], block: nn.Module) -> int:
    return sum(computes(node, block) for node in nodes)


def _num_layers(nodes: Collection[fx.Node], block: nn.Module) -> int:
    """Number of modules with parameters of their own that are called; a function that computes counts as one."""
    called = {node for node in nodes if node.op == "call_module"}
    inside = [
        module
        for node in called
        for module in block.get_submodule(cast(str, node.target)).modules()
        if any(value is not None for value in parameter_dict(module).values())
    ]
    return len(inside) + _num_computing([node for node in nodes if node not in called], block)
