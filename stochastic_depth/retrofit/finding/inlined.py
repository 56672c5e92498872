"""Finds the children whose code is a part of their block's: branches end in them, or are given to them to call."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

from torch import fx, nn

from stochastic_depth.copies import plain_class, way_around
from stochastic_depth.retrofit.errors import CutError, GivenCodeError, TraceError
from stochastic_depth.retrofit.finding.example import Example
from stochastic_depth.retrofit.finding.readings import read
from stochastic_depth.retrofit.finding.ways import all_recordings, ways
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.operations import (
    added,
    ancestors,
    is_plain,
)
from stochastic_depth.retrofit.rewriting.plain_forms import name_values_changed_in_place, spell_out_additions
from stochastic_depth.retrofit.rewriting.sums import (
    DropPaths,
    find_sums,
)
from stochastic_depth.torch_private import parameter_dict


def inlined_in(
    block: nn.Module, example: Example | None, name: str = "", notes: list[str] | None = None
) -> tuple[str, ...]:
    """Paths of the children whose code is a part of the block's.

    The block's branches end in them: they add one value of the block to another. Or they return a branch and its
    shortcut, which are added later (Mamba's `hidden_states, residual`). Or the block gives them a branch to call, as a
    function or a module (`sublayer(x, self.attention)`). Any other child that has a branch of its own is a block itself
    and does not count.

    Args:
        block: the block.
        example: what the code is read by, where there is one.
        name: its name, for notes.
        notes: gets why a child could not be one of them.

    Raises:
        TraceError: if the block's code cannot be read.
    """
    given, graphs = given_code(block, example)
    candidates = dict.fromkeys(given)
    gives_both: set[str] = set()
    while True:
        gives_both.update(path for graph in graphs for path in _give_both(graph, block))
        more = dict.fromkeys(
            path
            for graph in graphs
            for path in _given_two(graph, block, candidates)
            if _joins(block.get_submodule(path), example)
        )
        more.update(dict.fromkeys(gives_both - candidates.keys()))
        if not more:
            break
        candidates.update(more)
        graphs = [recording.graph for recording in ways(block, tuple(candidates), example)]
    used = dict.fromkeys(given)
    for graph in graphs if candidates else ():
        for residual in find_sums(graph, block, ()).values():
            if isinstance(residual, CutError):
                continue
            used.update(dict.fromkeys(residual.add.meta.get("inlined", ())))
            if not residual.is_projected:
                within = residual.output.meta.get("inlined", ())
                used.update(dict.fromkeys(path for path in within if path in gives_both))
    for path in used:
        if what := way_around(block.get_submodule(path)):
            if path in given:
                raise TraceError(f"the block passes code to {path}, which has {what}, to be called whole")
            if notes is not None:
                notes.append(
                    f"{f'{name}.{path}'.strip('.')}: a branch ends in it, which has {what}, to be called whole"
                )
            return ()
    return tuple(used)


def given_code(block: nn.Module, example: Example | None) -> tuple[tuple[str, ...], list[fx.Graph]]:
    """The children that call what a block gives them, a function or a module with parameters.

    Returns:
        their paths, and recordings of the block of which their code is a part.

    Raises:
        TraceError: if the block's code cannot be read.
    """
    paths: tuple[str, ...] = ()
    while True:
        try:
            return paths, [recording.graph for recording in ways(block, paths, example)]
        except GivenCodeError as error:
            # A module that only computes, such as rotary positions, can be an argument of a block.
            has_weights = not isinstance(error.value, nn.Module) or any(
                parameter_dict(part) for part in error.value.modules()
            )
            if not (error.path and has_weights and calls_argument(block.get_submodule(error.path))):
                raise
            paths = (*paths, error.path)


def calls_argument(module: nn.Module) -> bool:
    """Whether a module's code calls one of its arguments, or gives it to a child that does."""
    if plain_class(module).__module__.startswith("torch.nn."):
        return False
    try:
        graphs = [recording.graph for recording in all_recordings(module)]
    except TraceError:
        return False
    for node in (node for graph in graphs for node in graph.nodes):
        arguments = [each for each in node.all_input_nodes if each.op == "placeholder"]
        if node.op == "call_method" and node.target in ("__call__", "forward") and node.args[0] in arguments:
            return True
        if node.op == "call_module" and arguments and calls_argument(module.get_submodule(node.target)):
            return True
    return False


def _given_two(graph: fx.Graph, block: nn.Module, but: Collection[str]) -> Iterator[str]:
    """Paths of the children that receive two values, of which one may be a shortcut around the other, or one twice."""
    for node in graph.nodes:
        if node.op != "call_module" or node.target in but:
            continue
        kind = plain_class(block.get_submodule(node.target))
        given = [each for each in node.all_input_nodes if each.op != "get_attr" and not is_size(each)]
        if kind.__module__.startswith("torch.nn."):
            continue
        arguments = [each for each in (*node.args, *node.kwargs.values()) if each in given]
        if len(arguments) > len({*arguments}):
            yield node.target
        before = [{each for each in ancestors(value) if each.op != "get_attr"} for value in given]
        if any(before[i] & before[j] for i in range(len(given)) for j in range(i)):
            yield node.target


def _give_both(graph: fx.Graph, block: nn.Module) -> Iterator[str]:
    """Paths of the children that return two values that are added to each other, and whose code can be read."""
    for node in graph.nodes:
        first, second = added(node) or (node, node)
        if first is not second and first.target is second.target is operator.getitem:
            child, same = first.all_input_nodes[0], second.all_input_nodes[0]
            if child is same and child.op == "call_module" and _is_readable(block, path := str(child.target)):
                yield path


def _is_readable(block: nn.Module, path: str) -> bool:
    child = block.get_submodule(path)
    if plain_class(child).__module__.startswith("torch.nn."):
        return False
    try:
        return any(True for _ in all_recordings(child))
    except TraceError:
        return False


def _joins(child: nn.Module, example: Example | None) -> bool:
    """Whether a child adds a value computed from one argument to another argument, itself or in its own child.

    A child with its own branch does not count.
    """
    try:
        own = inlined_in(child, example)
        if read(child, DropPaths(inlined=own), None, example)[0]:
            return False
        graphs = [recording.graph for recording in ways(child, (), example)]
    except TraceError:
        return False
    for graph in graphs:
        name_values_changed_in_place(graph, child)
        spell_out_additions(graph, child)
        for node in graph.nodes:
            operands = added(node)
            if operands is not None:
                if any(_come_apart(a, b) and is_plain(a, child) for a, b in (operands, operands[::-1])):
                    return True
            elif node.op == "call_module" and any(
                _come_apart(a, b) for a in node.all_input_nodes for b in node.all_input_nodes
            ):
                module = child.get_submodule(node.target)
                if not plain_class(module).__module__.startswith("torch.nn.") and _joins(module, example):
                    return True
    return False


def _come_apart(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values depend on different arguments."""
    of_a, of_b = ({each for each in ancestors(node) if each.op == "placeholder"} for node in (a, b))
    return bool(of_a - of_b) and bool(of_b - of_a)
