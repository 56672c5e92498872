"""Additions that look like residual ones and are none: recurrences, adapters, skip sums, modulations, and more."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import cast

from torch import Tensor, fx, nn

from stochastic_depth.retrofit.code.user_data import has_no_data
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.cuts import Sum
from stochastic_depth.retrofit.rewriting.operations import (
    PRODUCTS,
    SAME_MEMORY,
    added,
    ancestors,
    computes,
    is_cheap,
    is_computed,
    is_plain,
    name_of,
    sources,
)


def are_calls_of_one(shortcut: fx.Node, output: fx.Node, block: nn.Module) -> bool:
    """Whether a sum adds up what one child gives for several points, as Runge-Kutta methods do.

    `h + f(h)` after `h = f(x)` is none of these: there, the second point is the first output itself.
    """
    if len({*_terms(shortcut, block), *_terms(output, block)}) != 1 or None in _terms(output, block):
        return False
    of_shortcut = ancestors(shortcut) - {shortcut}
    points = [added(node) or () for node in ancestors(output) - of_shortcut - {shortcut}]
    return any(operand in of_shortcut for operands in points for operand in operands)


def is_stage(inner: Sum, outer: Sum, block: nn.Module) -> bool:
    """Whether a sum is a point at which a Runge-Kutta method calls a child, on its way to the outer sum.

    The method calls the child on the point itself, and scales or adds up what it gives. An implicit layer, which
    repeats `z = tanh(u + f(z))`, does not.
    """
    terms = _terms(outer.output, block)
    return (
        inner.shortcut is outer.shortcut
        and inner.add in ancestors(outer.output)
        and None not in _terms(inner.output, block)
        and len({*_terms(inner.output, block), *terms}) == 1
        and (len(terms) > 1 or inner.output.op != "call_module")
        and _is_handed_to(inner.add, cast(str, terms[0]))
    )


def _is_handed_to(value: fx.Node, child: str) -> bool:
    """Whether a child is called on a value, or on a view of it."""
    return any(
        (user.op == "call_module" and user.target == child)
        or (user.op in ("call_function", "call_method") and is_cheap(user) and _is_handed_to(user, child))
        for user in value.users
    )


def _terms(node: fx.Node, block: nn.Module) -> list[str | None]:
    """Which child computes each term of a sum, up to factors such as a step size; None for what no child computes."""
    node = _seen_through(node)
    if operands := added(node):
        return [term for operand in operands for term in _terms(operand, block)]
    if name_of(node) in PRODUCTS:
        factors = [each for each in node.all_input_nodes if not is_plain(each, block)]
        return _terms(factors[0], block) if len(factors) == 1 else [None]
    return [cast(str, node.target) if node.op == "call_module" else None]


def are_complements(a: fx.Node, b: fx.Node) -> bool:
    """Whether one value is multiplied by a computed mask and the other by what it leaves, `1 - mask`, as in a coupling.

    Learned shares, which are computed from parameters alone, are gains.
    """
    return any(_is_rest_of(mask, other) or _is_rest_of(other, mask) for mask in _factors(a) for other in _factors(b))


def is_masked(value: fx.Node, block: nn.Module) -> bool:
    """Whether a value is multiplied by a constant of the block that is 0 or 1 everywhere: what a mask leaves of it."""
    for factor in _factors(value):
        if factor.op == "get_attr":
            path, _, name = cast(str, factor.target).rpartition(".")
            held = getattr(block.get_submodule(path), name, None)
            if (
                isinstance(held, Tensor)
                and not held.requires_grad
                and not has_no_data(held)
                and bool((held == 0).any() and (held == 1).any() and ((held == 0) | (held == 1)).all())
            ):
                return True
    return False


def _factors(value: fx.Node) -> list[fx.Node]:
    value = _seen_through(value)
    return value.all_input_nodes if name_of(value) in PRODUCTS else []


def _is_rest_of(mask: fx.Node, rest: fx.Node) -> bool:
    return is_negation(rest) and mask in rest.all_input_nodes and is_computed(mask)


def is_negation(node: fx.Node) -> bool:
    """Whether a node gives what a mask leaves: `~mask`, `1 - mask`."""
    return name_of(node) in _NEGATIONS or (name_of(node) in _SUBTRACTIONS and 1 in node.args)


_NEGATIONS = {"bitwise_not", "logical_not", "__invert__", "invert"}
_SUBTRACTIONS = {"sub", "subtract", "rsub", "__sub__", "__rsub__"}


def are_same_items(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values are the same item of what two children return, as those that WaveNet's layers give aside."""
    items = [node.args for node in (_seen_through(a), _seen_through(b)) if node.target is operator.getitem]
    children = [args[0] for args in items if isinstance(args[0], fx.Node) and args[0].op == "call_module"]
    return len(children) == 2 and bool(items[0][1] == items[1][1])


def is_recurrence(projection: Collection[fx.Node], branch: Collection[fx.Node], block: nn.Module) -> bool:
    """Whether what looks like a projection is a layer that the branch calls too, as the cell in `W x + R h` does.

    A norm may stand before both.
    """
    called = [
        {cast(str, node.target) for node in nodes if node.op == "call_module" and computes(node, block)}
        for nodes in (projection, branch)
    ]
    return any(not _is_norm(block.get_submodule(target)) for target in called[0] & called[1])


def is_network(projection: Sequence[fx.Node], block: nn.Module) -> bool:
    """Whether what looks like a projection has layers with an activation between them, such as an MLP."""
    leaves = [
        module
        for node in projection
        if node.op == "call_module"
        for module in block.get_submodule(cast(str, node.target)).modules()
        if next(module.children(), None) is None
    ]
    layers = [index for index, leaf in enumerate(leaves) if any(value.dim() > 1 for value in leaf.parameters())]
    between = leaves[layers[0] : layers[-1]] if layers else []
    return any(type(leaf).__module__ == nn.ReLU.__module__ for leaf in between)


def becomes_a_gate(total: fx.Node, block: nn.Module) -> bool:
    """Whether a sum of layers is only used by a sigmoid, tanh or softmax, whose result is used further.

    Gates and candidates of recurrent cells are computed so, and scores of attention. At most one layer may lie between
    a sum and its sigmoid or softmax, as in the gates of Attention U-Net.
    """
    pending = [(user, 0) for user in total.users]
    while pending:
        node, num_layers = pending.pop()
        if is_size(node):
            continue
        if _squashes(node, block, _SIGMOIDS if num_layers else _SIGMOIDS | _TANH):
            if all(user.op == "output" for user in node.users):
                return False
            continue
        num_layers += computes(node, block)
        is_passed_on = node.op == "call_module" or is_cheap(node) or name_of(node) in _PASSES_ON
        if not is_passed_on or added(node) or num_layers > 1 or not node.users:
            return False
        pending += [(user, num_layers) for user in node.users]
    return bool(total.users)


def are_scores(total: fx.Node, block: nn.Module) -> bool:
    """Whether a sum comes to a softmax without a layer or a norm between, as scores of attention do.

    RealFormer also hands them to the next layer, which adds them to its own.
    """
    pending = [*total.users]
    while pending:
        node = pending.pop()
        if _squashes(node, block, {"softmax"}):
            if any(user.op != "output" for user in node.users):
                return True
        elif not is_size(node) and (is_cheap(node) or added(node) or name_of(node) in _MASKING):
            pending += node.users
    return False


_MASKING = {"masked_fill", "masked_fill_", "where"}


def is_one_number(node: fx.Node) -> bool:
    """Whether a value is the sum or mean of a whole tensor, up to a factor: `0 * x.sum()`, in code for DDP."""
    while name_of(node) in PRODUCTS | {"truediv", "div"} and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return name_of(node) in ("sum", "mean") and node.op != "call_module" and len(node.args) == 1 and not node.kwargs


def _squashes(node: fx.Node, block: nn.Module, names: Collection[str]) -> bool:
    if node.op == "call_module":
        module = block.get_submodule(cast(str, node.target))
        while isinstance(module, nn.Sequential) and len(module):
            module = module[-1]
        return type(module).__name__.lower() in names
    return node.op in ("call_function", "call_method") and name_of(node).removesuffix("_") in names


_SIGMOIDS = {"sigmoid", "softmax", "hardsigmoid"}
_TANH = {"tanh"}
_PASSES_ON = {"relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "linear", "conv1d", "conv2d", "layer_norm"}


def is_affine(projection: Collection[fx.Node], branch: Collection[fx.Node], block: nn.Module) -> bool:
    """Whether a branch beside a projection has no nonlinearity, so that both are parts of one larger layer.

    Low-rank adapters and parallel convolutions are.
    """
    return any(computes(node, block) for node in projection) and all(_is_affine(node, block) for node in branch)


def _is_affine(node: fx.Node, block: nn.Module) -> bool:
    if node.op == "call_module":
        called = block.get_submodule(cast(str, node.target))
        return all(isinstance(module, _AFFINE) for module in called.modules())
    if computes(node, block):
        return len([each for each in node.all_input_nodes if is_computed(each)]) == 1
    return node.op not in ("call_function", "call_method") or added(node) is not None or is_cheap(node)


_AFFINE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.Sequential, nn.Identity, nn.Dropout,
)  # fmt: skip


def is_side_output(projection: Collection[fx.Node], of_output: Collection[fx.Node], before: Sequence[Sum]) -> bool:
    """Whether what looks like a shortcut begins inside an earlier residual branch, as the skip sum of WaveNet does."""
    begin = {each for node in projection for each in sources(node) if each.op != "get_attr"} - {*projection}
    inside = [
        ancestors(each.output) - ancestors(each.shortcut) for each in before if each.shortcut and each.add in of_output
    ]
    return all(any(each in nodes for nodes in inside) for each in begin)


def is_side_input(inner: Sum, outer: Sum, block: nn.Module) -> bool:
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


def is_merge(inner: Sum, outer: Sum, block: nn.Module) -> bool:
    """Whether a sum in a branch adds up what single layers compute of the stream, as `A x` and gated messages of `B x`.

    Both operands begin at the shortcut of the outer sum, or behind its norm; graph convolutions are such sums.
    """
    stream = outer.shortcut
    if inner.shortcut is None or stream is None or not inner.is_projected or outer.is_projected:
        return False
    of_stream = ancestors(stream)
    if inner.add in of_stream or inner.add not in ancestors(outer.output):
        return False
    layers = [
        node
        for node in ancestors(inner.add) - of_stream
        if computes(node, block)
        and not (node.op == "call_module" and _is_norm(block.get_submodule(cast(str, node.target))))
    ]
    begin = [stream in ancestors(operand) for operand in (inner.shortcut, inner.output)]
    return all(begin) and not any(a is not b and a in ancestors(b) for a in layers for b in layers)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def was_taken_out(shortcut: fx.Node) -> bool:
    """Whether a value was subtracted before, or takes no gradient, as the mean that models of time series add back."""
    node = shortcut
    while not node.meta.get("is_subtracted") and name_of(node) != "detach":
        given = sources(node)
        if node.op not in ("call_function", "call_method") or len(given) != 1:
            return False
        if name_of(node) not in SAME_MEMORY | _REPEATING:
            return False
        node = given[0]
    return True


_REPEATING = {"repeat", "repeat_interleave", "tile", "clone", "to"}


def starts_at_zeros(node: fx.Node) -> bool:
    """Whether a value is what a loop has added up, such as the outputs of experts, or its gated first state."""
    while operands := added(node):
        node = operands[0]
    start = _seen_through(node)
    if name_of(start) in PRODUCTS:
        return any(starts_at_zeros(factor) for factor in start.all_input_nodes)
    return name_of(start) in _ZEROS


# Where sums of experts begin. A tensor that code makes from numbers is a `_made_tensor` in a recording by symbols.
_ZEROS = {"zeros", "zeros_like", "new_zeros", "_made_tensor"}
_REDUCTIONS = {"mean", "std", "var", "amax", "amin", "norm", "median", "max", "min", "sum"}


def _seen_through(node: fx.Node) -> fx.Node:
    """The node that another is a view of, or a function with numbers only."""
    while node.op in ("call_function", "call_method"):
        given = sources(node)
        is_view = node.target is operator.getitem and not isinstance(node.args[1], int)
        if len(given) != 1 or not (is_view or name_of(node) in SAME_MEMORY - {"getitem"} | _WITH_NUMBERS):
            break
        node = given[0]
    return node


_WITH_NUMBERS = {"add", "sub", "mul", "truediv", "div", "sqrt", "rsqrt", "clamp", "detach", "__radd__", "radd", "exp"}


def is_modulation(shift: fx.Node, product: fx.Node, block: nn.Module) -> bool:
    """Whether a sum `x * scale + shift` is one of FiLM, AdaLN or RevIN: `scale` comes from where `shift` does.

    Either both are parts of one tensor, or both are statistics of one, or `x` has nothing to do with `shift`.
    """
    product = _seen_through(product)
    factors = sources(product)
    if name_of(product) not in PRODUCTS or len(factors) != 2:
        return False
    shift = _seen_through(shift)
    of_shift = {node for node in ancestors(shift) if node.op != "get_attr"}
    for x, scale in (factors, factors[::-1]):
        source = _seen_through(scale)
        is_other = source is not shift and source.args[:1] == shift.args[:1]
        of_scale, of_x = ancestors(source), ancestors(x)
        is_part = source.target is operator.getitem and shift.target is operator.getitem
        if is_part and shift in of_x and cast(fx.Node, shift.args[0]).op == "placeholder":
            continue  # x, mask = inputs; x + f(x) * mask
        are_statistics = {name_of(source), name_of(shift)} <= _REDUCTIONS
        if is_other and (is_part or are_statistics):
            return True
        is_apart = shift not in of_scale and of_shift & of_scale and not of_shift & of_x
        if is_apart and all(any(computes(node, block) for node in nodes) for nodes in (of_scale, of_x)):
            return True
    return False
