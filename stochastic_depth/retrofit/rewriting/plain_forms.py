"""Brings a recording into the form in which its branches can be found: plain additions, one for each branch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import fx, nn

from stochastic_depth.copies import has_hooks, plain_class
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.recording.torch_calls import SUBTRACTIONS, SUMS, operands_by_position
from stochastic_depth.retrofit.rewriting.operations import (
    SAME_MEMORY,
    added,
    ancestors,
    computes,
    name_of,
    writes_in_place,
)
from stochastic_depth.retrofit.rewriting.residual_sums import are_parallel


def remove_unused_views(graph: fx.Graph) -> None:
    """Remove views that nothing uses, such as the other half of a tensor that was split: they would keep its source."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and name_of(node) in SAME_MEMORY:
            graph.erase_node(node)


def spell_out_additions(graph: fx.Graph, block: nn.Module) -> None:
    """Replace other forms of an addition by a plain one: `alpha=`, `addcmul`, `addmm`, `lerp`, a minus, a module."""
    for node in list(graph.nodes):
        name = name_of(node)
        if name in SUMS:
            node.args, node.kwargs = operands_by_position(name, node.args, node.kwargs)
        alpha = node.kwargs.get("alpha")
        if name in ("add", "add_") and alpha is not None and alpha != 1 and len(node.args) == 2:
            _add(node, (node.args[1], alpha), node.args[0])
        elif name in ("addcmul", "addcmul_") and len(node.args) == 3 and not node.kwargs:
            factors = (cast(fx.Node, node.args[1]), cast(fx.Node, node.args[2]))
            if [factor.meta.get("shape") == node.meta.get("shape") for factor in factors] == [False, True]:
                node.meta["operand"] = 2  # The first factor is a gain, which has no samples.
            _add(node, factors, node.args[0])
        elif name in _PRODUCTS and len(node.args) == 3 and not node.kwargs:
            _add(node, node.args[1:], node.args[0], _PRODUCTS[name])
        elif name in SUBTRACTIONS and len(node.args) == 2 and set(node.kwargs) <= {"alpha"}:
            if all(isinstance(argument, fx.Node) and not is_size(argument) for argument in node.args):
                _add(node, (node.args[1], -1 if alpha is None else -alpha), node.args[0])
                cast(fx.Node, node.args[1]).meta["is_subtracted"] = True
        elif name == "lerp" and len(node.args) == 3 and not node.kwargs:
            start, end, weight = node.args
            with node.graph.inserting_before(node):
                rest = node.graph.call_function(operator.sub, (1, weight))
                kept = node.graph.call_function(operator.mul, (start, rest))
            kept.meta.update(_of_value(node))
            _add(node, (end, weight), kept)
        elif node.op == "call_module" and len(node.args) == 2 and not node.kwargs and _adds(node, block):
            node.op, node.target = "call_function", operator.add


_PRODUCTS = {"addmm": torch.mm, "addmm_": torch.mm, "baddbmm": torch.bmm, "baddbmm_": torch.bmm}


def _add(
    node: fx.Node, factors: tuple[Any, ...], shortcut: Any, multiply: Callable[[Any, Any], Any] = operator.mul
) -> None:
    with node.graph.inserting_before(node):
        product = node.graph.call_function(multiply, factors)
    product.meta.update(_of_value(node))
    node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (shortcut, product), {}


def _of_value(node: fx.Node) -> dict[str, Any]:
    """What is known of the value of a node."""
    return {key: node.meta[key] for key in ("shape", "dtype", "samples") if key in node.meta}


def _adds(node: fx.Node, block: nn.Module) -> bool:
    """Whether a child without parameters adds its two arguments: tried on numbers."""
    if not all(isinstance(argument, fx.Node) for argument in node.args):
        return False
    module = block.get_submodule(cast(str, node.target))
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or has_hooks(module):
        return False
    a, b = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[5.0, 7.0, -11.0]])
    try:
        with torch.no_grad():
            result = plain_class(module).forward(module, a, b)
            again = plain_class(module).forward(module, 2 * a, b)
    except Exception:  # It takes other arguments.
        return False
    return (
        isinstance(result, torch.Tensor)
        and result.shape == a.shape
        and torch.equal(result, a + b)
        and torch.equal(again, 2 * a + b)
    )


def put_in_a_row(graph: fx.Graph, block: nn.Module, drop_paths: Collection[fx.Node] | None = None) -> None:
    """Replace `x + (a + b)` by `(x + a) + b` if a and b are parallel branches, so that each has its own sum.

    With drop paths, only where all branches are calls of these.

    The metadata of the new sums says which operand of which call in the block's own code their branch is (`operand`,
    `call`).
    """
    for outer in list(graph.nodes):
        operands = added(outer) or ()
        for shortcut, inner in (operands, operands[::-1]) if operands else ():
            branches = _parallel_branches(inner, outer, shortcut, block)
            if not branches or writes_in_place(outer, block):
                continue
            if drop_paths is not None and not set(branches) <= set(drop_paths):
                continue
            with graph.inserting_before(outer):
                sums = [*(graph.call_function(operator.add) for _ in range(len(branches) - 1)), outer]
            of_outer, in_order = dict(outer.meta), sorted(branches, key=lambda branch: _position(branch, block))
            for node, branch in zip(sums, in_order, strict=True):
                old = branches[branch]
                meta = {**of_outer, "operand": old.args.index(branch), "call": old.meta.get("call")}
                node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (shortcut, branch), {}
                node.meta = meta
                shortcut = node
            _erase_unused_sums(inner)
            break


def _parallel_branches(value: fx.Node, user: fx.Node, shortcut: fx.Node, block: nn.Module) -> dict[fx.Node, fx.Node]:
    """The parallel branches that a value adds up, each with its sum; empty for any other value."""
    parts = added(value)
    if parts is None or list(value.users) != [user] or writes_in_place(value, block):
        return {}
    if not are_parallel(shortcut, *parts, block):
        return {}
    inner = [_parallel_branches(part, value, shortcut, block) for part in parts]
    return {part: value for part, deeper in zip(parts, inner, strict=True) if not deeper} | inner[0] | inner[1]


def _position(branch: fx.Node, block: nn.Module) -> int:
    """Where the last layer of a branch is called; what is done with its output may come later."""
    path = ancestors(branch)
    return max(index for index, node in enumerate(branch.graph.nodes) if node in path and computes(node, block))


def _erase_unused_sums(value: fx.Node) -> None:
    operands = added(value)
    if operands and not value.users:
        value.graph.erase_node(value)
        for operand in operands:
            _erase_unused_sums(operand)


def move_behind_what_commutes(drop_path: fx.Node, block: nn.Module) -> None:
    """Move a drop path behind the linear maps that follow it, if nothing before it can be skipped.

    timm's ResNeSt drops the input of a block's projection shortcut, which the branch needs too. Dropping before and
    after a linear map of each sample is the same, and after it the map itself can be skipped.
    """
    if drop_path.op != "call_module":
        return
    source = drop_path.args[0]
    calls = [node for node in drop_path.graph.nodes if node.op == "call_module" and node.target == drop_path.target]
    if not isinstance(source, fx.Node) or len(calls) > 1:
        return
    if source.op != "placeholder" and all(user is drop_path or is_size(user) for user in source.users):
        return
    linear: list[fx.Node] = []
    while (user := _only_user(linear[-1] if linear else drop_path)) is not None:
        module = block.get_submodule(user.target) if user.op == "call_module" else None  # pyright: ignore
        if type(module) is nn.Sequential and not has_hooks(module):
            _call_children(user, module)
        elif type(module) in _LINEAR and getattr(module, "bias", None) is None:
            linear.append(user)
        else:
            break
    if any(computes(node, block) for node in linear):
        last = linear[-1]
        with drop_path.graph.inserting_after(last):
            moved = drop_path.graph.call_module(cast(str, drop_path.target), (last,))
        moved.meta.update({**last.meta, "call": drop_path.meta.get("call")})
        last.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        drop_path.replace_all_uses_with(source)
        drop_path.graph.erase_node(drop_path)


_LINEAR = (
    nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if not is_size(user)]
    return users[0] if len(users) == 1 else None


def _call_children(call: fx.Node, sequential: nn.Sequential) -> None:
    value = cast(fx.Node, call.args[0])
    with call.graph.inserting_before(call):
        for name, _ in sequential.named_children():
            value = call.graph.call_module(f"{call.target}.{name}", (value,))
            # Of the shape only the number of samples is asked for.
            value.meta.update(_of_value(call))
    call.replace_all_uses_with(value)
    call.graph.erase_node(call)


def name_values_changed_in_place(graph: fx.Graph, block: nn.Module) -> None:
    """Let all later users of a value that was changed in place use the result of the change, the same tensor.

    Changes of the block's arguments, which its caller sees, are marked (`changes_argument`).
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    given = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in given and name_of(node) in SAME_MEMORY:
            given.add(node)
        if _gives_what_it_changes(node, block) and isinstance(source, fx.Node):
            if source in given:
                given.add(node)
                node.meta["changes_argument"] = True
            after = position[node]
            source.replace_all_uses_with(node, delete_user_cb=lambda user: position[user] > after)  # noqa: B023  # pyright: ignore


def _gives_what_it_changes(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node changes its first argument and returns it.

    For a module of another library with an attribute `inplace`, it is unknown whether this refers to its input or to a
    step inside.
    """
    if node.op == "call_module" and not type(block.get_submodule(cast(str, node.target))).__module__.startswith(
        "torch.nn."
    ):
        return False
    return bool(node.args) and writes_in_place(node, block)
