"""Recordings of a block on every path through its code: read with symbols, or as an example runs."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import fx, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.for_now import remembered
from stochastic_depth.retrofit.code.own_forward import own_forward
from stochastic_depth.retrofit.code.signatures import OPAQUE, flatten
from stochastic_depth.retrofit.code.surroundings import unchanged_surroundings
from stochastic_depth.retrofit.errors import StoredError, TraceError
from stochastic_depth.retrofit.finding.example import Example, Reading
from stochastic_depth.retrofit.recording.sizes import is_size, may_be_size
from stochastic_depth.retrofit.recording.trace import Recording, record
from stochastic_depth.retrofit.rewriting.operations import added, ancestors, is_cheap, sources
from stochastic_depth.torch_private import tree_leaves

# A block whose control flow depends on sizes is recorded for at most this many combinations of its decisions.
_MAX_WAYS = 16


def ways(block: nn.Module, inlined: Collection[str], example: Example | None) -> Iterator[Recording | Reading]:
    """Recordings of a block's code, from reading it or from an example."""
    if isinstance(block, torch.jit.ScriptModule):
        raise TraceError("it is a torch.jit.ScriptModule, which layers=[...] can run as a whole")
    if example is not None:
        for reading in example.recordings(block, inlined):
            _mark_children_of_sizes(reading.graph, block)
            yield reading
        return
    for recording in all_recordings(block, inlined):
        _mark_returned_sizes(recording.graph, block)
        _mark_children_of_sizes(recording.graph, block)
        yield recording


def all_recordings(block: nn.Module, inlined: Collection[str] = ()) -> Iterator[Recording]:
    """Recordings of a block in its mode and in the other one, without and with its optional arguments.

    Raises:
        StoredError: if the forward leaves something on the block in any of them.
        TraceError: if it cannot be recorded in its mode, as far as its arguments have to be given.
    """
    try:
        yield from recordings(block, inlined=inlined)
    except StoredError:
        raise
    except TraceError as error:
        if "random numbers" in str(error):
            raise
        yield from _recordings_by_guess(block, error, inlined)
    for other_mode, optional in ((True, False), (False, True), (True, True)):
        arguments = optional_arguments(block) if optional else (_default_arguments(block), {})
        if arguments is None:
            continue
        try:
            yield from recordings(block, arguments, other_mode=other_mode, inlined=inlined)
        except StoredError:
            raise
        except TraceError:
            pass  # It may never be called this way.


def _recordings_by_guess(block: nn.Module, error: TraceError, inlined: Collection[str]) -> Iterator[Recording]:
    """Recordings of code that needs numbers for sizes, or more arguments than it names.

    Raises:
        TraceError: the given one, if it cannot be recorded in any of these ways.
    """
    parameters = inspect.signature(own_forward(block, block)).parameters.values()
    more = range(4) if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters) else range(1)
    for num_more in more:
        for guess_sizes in (False, True):
            if (num_more, guess_sizes) == (0, False):
                continue
            arguments = (*_default_arguments(block), *[OPAQUE] * num_more)
            try:
                yield from list(recordings(block, (arguments, {}), guess_sizes=guess_sizes, inlined=inlined))
            except StoredError:
                raise
            except TraceError:
                continue
            return
    raise error


def optional_arguments(block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of a call that gives a block all that may be left out, as symbols; None if nothing may."""
    parameters = inspect.signature(own_forward(block, block)).parameters.values()
    named = {p.name: OPAQUE for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is None}
    args = _default_arguments(block, optional=True)
    return (args, named) if named or args != _default_arguments(block) else None


def recordings(
    block: nn.Module,
    arguments: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    *,
    with_buffers: bool = False,
    other_mode: bool = False,
    guess_sizes: bool = False,
    inlined: Collection[str] = (),
) -> Iterator[Recording]:
    """Recordings of a module's forward, one for each path that its decisions on sizes allow.

    Args:
        block: the module.
        arguments: arguments of the call, by position and by name; any object stands for a tensor. None: its defaults.
        with_buffers: see `record`.
        other_mode: see `record`.
        guess_sizes: see `record`.
        inlined: see `record`.

    Raises:
        StoredError: if the forward stores something on the block on any of the paths.
        TraceError: if none of the paths can be recorded.
    """
    leaves: list[Any] = []
    args, kwargs = arguments or (_default_arguments(block), {})
    signature = flatten((tuple(args), dict(kwargs)), leaves)
    decisions: list[bool] = []
    num_recorded, first_error = 0, None
    for _ in range(_MAX_WAYS):
        taken: list[bool] = []
        try:
            decide = functools.partial(_explore, decisions, taken)
            with unchanged_surroundings(block, inlined):
                recording = record(
                    block,
                    signature,
                    len(leaves),
                    decide,
                    with_buffers=with_buffers,
                    other_mode=other_mode,
                    guess_sizes=guess_sizes,
                    inlined=inlined,
                )
            yield recording
            num_recorded += 1
        except StoredError:
            raise
        except TraceError as error:
            first_error = first_error or error
        # The next path: reverse the last decision that was True.
        while taken and not taken[-1]:
            taken.pop()
        if not taken:
            break
        decisions = [*taken[:-1], False]
    if not num_recorded and first_error is not None:
        raise first_error


def _mark_returned_sizes(graph: fx.Graph, block: nn.Module) -> None:
    """Mark what children return beside tensors as sizes, such as the height and width of patches in PVT and XCiT.

    It is looked for where two values that a child returns meet in a sum.
    """
    in_sums = {value for node in graph.nodes if added(node) for value in ancestors(node)}
    sizes: list[fx.Node] = []
    for call in graph.find_nodes(op="call_module"):
        items = [user for user in call.users if user.target is operator.getitem and isinstance(user.args[1], int)]
        child = block.get_submodule(call.target)
        if len(in_sums.intersection(items)) < 2 or plain_class(child).__module__.startswith("torch.nn."):
            continue
        try:
            (returned,) = next(recordings(child)).graph.output_node().args
        except TraceError:
            continue
        sizes += [item for item in items if _is_size_at(returned, cast(int, item.args[1]))]
    for node in graph.nodes if sizes else ():
        node.meta.pop("is_size", None)  # It was asked about values that are computed from them.
    for node in sizes:
        node.meta["is_size"] = True


def _mark_children_of_sizes(graph: fx.Graph, block: nn.Module) -> None:
    """Mark the children that use their arguments for their sizes only, such as positions: no branch goes through them.

    It is looked for where a sum adds what a child returns.
    """
    operands = {operand for node in graph.nodes for operand in added(node) or ()}
    for node in operands:
        while node.op != "call_module" and is_cheap(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node.op == "call_module":
            child = block.get_submodule(cast(str, node.target))
            # On every path through the code it is asked again.
            node.meta["of_sizes"] = remembered(
                ("of_sizes", id(child)), functools.partial(_uses_sizes_only, child), child
            )


def _uses_sizes_only(module: nn.Module) -> bool:
    """Whether a module's output depends on the sizes of its arguments, not on their values."""
    if plain_class(module).__module__.startswith("torch.nn."):
        return False
    graph = None
    for guess_sizes in (False, True):  # grids and ranges need numbers
        with suppress(TraceError):
            graph = graph or next(recordings(module, with_buffers=True, guess_sizes=guess_sizes)).graph
    if graph is None:
        return False
    pending, seen = [graph.output_node()], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            return False
        if node not in seen and not is_size(node):
            seen.add(node)
            pending += sources(node)
    return True


def _is_size_at(returned: Any, index: int) -> bool:
    if not isinstance(returned, (tuple, list)) or not -len(returned) <= index < len(returned):
        return False
    parts = tree_leaves(cast("tuple[Any, ...]", returned)[index])
    return bool(parts) and all(is_size(part) if isinstance(part, fx.Node) else type(part) is int for part in parts)


def _explore(decisions: Sequence[bool], taken: list[bool], node: fx.Node) -> bool | int:
    subject = cast(fx.Node, node.args[0])
    if not may_be_size(subject):
        raise TraceError(f"the forward's control flow depends on the value of {subject.name}")
    if node.target is int:
        return 4
    if node.target is len:
        # Arguments that a block loops over are sizes of an image more often than not. A call is recorded anew with
        # what it is given, and refused if its branches are others.
        return 2
    decision = decisions[len(taken)] if len(taken) < len(decisions) else True
    taken.append(decision)
    return decision


def _default_arguments(block: nn.Module, *, optional: bool = False) -> tuple[Any, ...]:
    """The required arguments as symbols, and the defaults of the others; these are symbols too if `optional`."""
    parameters = inspect.signature(own_forward(block, block)).parameters.values()
    return tuple(
        OPAQUE
        if parameter.default is parameter.empty or (optional and parameter.default is None)
        else parameter.default
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY)
    )
