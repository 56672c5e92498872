"""Cuts the branch of a residual addition out of the recording of a block's forward.

A *drop path* is followed forward, through operations that keep zeros (a LayerScale, views, permutations), to the
addition that uses it; the other operand is the shortcut. The branch is everything that only this operand needs. Sizes
do not count as values: the branch reads them again from its own samples.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from stochastic_depth.retrofit.errors import CutError, UnusedError
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.operations import (
    added,
    ancestors,
    changes_one_of,
    computes,
    describe,
    keeps_zero,
    name_of,
)


@dataclass(frozen=True)
class Sum:
    """A residual addition in a recording.

    Attributes:
        add: the node of the addition.
        shortcut: the operand that is kept; None if the branch is added to nothing, which counts as zeros.
        output: the operand that is the branch's output.
        drop_path: the call of the drop path; None without one.
        is_projected: whether layers compute the shortcut from a value that it shares with the branch.
    """

    add: fx.Node
    shortcut: fx.Node | None
    output: fx.Node
    drop_path: fx.Node | None = None
    is_projected: bool = False

    def after(self, replaced: Mapping[fx.Node, fx.Node]) -> Sum:
        """The same addition after other nodes of the recording were replaced."""
        shortcut = self.shortcut and replaced.get(self.shortcut, self.shortcut)
        output = replaced.get(self.output, self.output)
        return Sum(self.add, shortcut, output, self.drop_path, self.is_projected)


@dataclass(frozen=True)
class CutBranch:
    """The part of a recording that belongs only to a branch.

    Attributes:
        nodes: its nodes, in order.
        inputs: values from outside that it needs.
        sides: other outputs of an attention module in the branch that the block returns, such as attention maps.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...] = ()


def drop_path_sum(drop_path: fx.Node, block: nn.Module) -> Sum:
    """The addition that uses a drop path's output; without one, the output is added to zeros.

    Raises:
        UnusedError: if nothing uses it.
        CutError: if it is added to itself.
    """
    try:
        return _addition(drop_path, block)
    except UnusedError:
        raise
    except CutError:
        return Sum(drop_path, None, cast(fx.Node, drop_path.args[0]))


def _addition(drop_path: fx.Node, block: nn.Module) -> Sum:
    output = drop_path
    while True:
        users = [user for user in output.users if not is_size(user)]
        if not users:
            raise UnusedError("nothing uses the output of the drop path")
        if len(users) != 1:
            names = ", ".join(user.name for user in users)
            raise CutError(f"the output of the drop path is used by {names}, not by one addition")
        (user,) = users
        if user.op == "output":
            raise CutError("the output of the drop path leaves the block without being added to anything")
        operands = added(user)
        if operands is not None:
            others = [operand for operand in operands if operand is not output]
            if len(others) != 1:
                raise CutError(f"{user.name} adds the branch to itself")
            return Sum(user, others[0], output, drop_path)
        if not keeps_zero(user, output, block):
            raise CutError(f"{describe(user)} comes between the drop path and the addition")
        output = user


def cut(residual: Sum, block: nn.Module) -> CutBranch:
    """The nodes that belong only to the branch of a residual addition.

    Raises:
        CutError: if the drop path would not be skipped with it, or it changes a value from outside in place.
    """
    try:
        return _cut(residual, block, ("Attention", "Attn"))
    except CutError:
        if residual.drop_path is not None:
            raise
        # Other values that its children give may be used elsewhere.
        return _cut(residual, block, ("",))


def _cut(residual: Sum, block: nn.Module, names: Sequence[str]) -> CutBranch:
    """The branch, where children of classes with these names may give more than its output."""
    kept: set[fx.Node] = set() if residual.shortcut is None else ancestors(residual.shortcut)
    nodes = ancestors(residual.output) - kept
    sides = tuple(
        node for node in residual.add.graph.nodes if node not in nodes and _is_side(node, nodes, block, names)
    )
    # From the end to the start: nodes that are used outside the branch do not belong to it, and neither do their
    # inputs.
    for node in reversed(list(residual.add.graph.nodes)):
        if node in nodes and (
            node.op == "placeholder"
            or any(
                user not in nodes and user is not residual.add and user not in sides and not is_size(user)
                for user in node.users
            )
        ):
            nodes.discard(node)
    _leave_containers(nodes)
    if residual.output not in nodes or (residual.drop_path is not None and residual.drop_path not in nodes):
        raise CutError("the branch's output is used outside the sum")
    for node in nodes:
        if any(is_size(user) and _is_used_outside(user, nodes) for user in node.users):
            raise CutError(f"the size of {node.name}, which only the branch computes, is used outside of it")
    ordered = tuple(node for node in residual.add.graph.nodes if node in nodes)
    inputs = dict.fromkeys(source for node in ordered for source in _sources(node) if source not in nodes)
    for node in ordered:
        if changes_one_of(inputs, node, block):
            raise CutError(f"{describe(node)} changes the input of the branch in place, which the shortcut sees")
    later = list(residual.add.graph.nodes)
    for node in later[later.index(ordered[0]) : later.index(residual.add)]:
        # The branch runs at the place of the sum.
        if node not in nodes and changes_one_of(inputs, node, block):
            raise CutError(f"{describe(node)} changes the input of the branch in place before the sum")
    if not any(computes(node, block) for node in ordered):
        raise CutError("everything that the branch computes is used outside it too")
    return CutBranch(ordered, tuple(inputs), tuple(side for side in sides if side.args[0] in nodes))


def _leave_containers(nodes: set[fx.Node]) -> None:
    """Items of a container that is made outside the branch are taken outside too, because inputs must be tensors."""
    for node in reversed(list(next(iter(nodes)).graph.nodes)) if nodes else ():
        if node in nodes and node.target in (operator.getitem, getattr) and _is_container(cast(fx.Node, node.args[0])):
            source = cast(fx.Node, node.args[0])
            if source not in nodes:
                nodes.discard(node)


_SPLITS = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "hsplit", "vsplit", "unsafe_chunk"}


def _is_container(node: fx.Node) -> bool:
    """Whether the value of a node is known to be a tuple or another container of tensors."""
    if "call" in node.meta:
        return "shape" not in node.meta
    name = name_of(node)
    return node.op in ("call_method", "call_function") and name in _SPLITS


def _is_side(node: fx.Node, nodes: Collection[fx.Node], block: nn.Module, names: Sequence[str]) -> bool:
    if node.target is not operator.getitem:
        return False
    source, index = cast("tuple[fx.Node, Any]", node.args)
    start = index.start if isinstance(index, slice) else index
    if source not in nodes or source.op != "call_module" or not isinstance(start, int) or start < 1:
        return False
    kind = type(block.get_submodule(cast(str, source.target))).__name__
    return any(name in kind for name in names)


def _is_used_outside(size: fx.Node, nodes: Collection[fx.Node]) -> bool:
    return any(_is_used_outside(user, nodes) if is_size(user) else user not in nodes for user in size.users)


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    """The values that a node needs; for a size, the tensors that it is read from."""
    for argument in node.all_input_nodes:
        if is_size(argument):
            yield from _sources(argument)
        else:
            yield argument
