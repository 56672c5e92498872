"""Reads the branches of a block from its code, on every path through it: with symbols, or as an example runs."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn

from stochastic_depth.copies import plain_class, way_around
from stochastic_depth.retrofit.code.for_now import remembered
from stochastic_depth.retrofit.code.own_forward import own_forward
from stochastic_depth.retrofit.code.signatures import OPAQUE, flatten
from stochastic_depth.retrofit.code.surroundings import unchanged_surroundings
from stochastic_depth.retrofit.errors import CutError, GivenCodeError, StoredError, TraceError
from stochastic_depth.retrofit.finding.example import Example, Reading
from stochastic_depth.retrofit.recording.sizes import is_size, may_be_size
from stochastic_depth.retrofit.recording.trace import Recording, record
from stochastic_depth.retrofit.rewriting.cuts import cut
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL, put_functional
from stochastic_depth.retrofit.rewriting.operations import (
    LIKE_ANOTHER,
    added,
    ancestors,
    computes,
    descendants,
    is_cheap,
    is_plain,
    name_of,
)
from stochastic_depth.retrofit.rewriting.plain_forms import name_values_changed_in_place, spell_out_additions
from stochastic_depth.retrofit.rewriting.sums import (
    BranchParts,
    DropPaths,
    Identity,
    Key,
    find_sums,
    identity,
    inlined_of,
    match,
    paths_of,
)
from stochastic_depth.retrofit.rules import DropPathRule
from stochastic_depth.torch_private import parameter_dict, tree_leaves

_MAX_WAYS = 16


def inlined_in(
    block: nn.Module, example: Example | None, name: str = "", notes: list[str] | None = None
) -> tuple[str, ...]:
    """Paths of the children whose code is a part of the block's.

    The block's branches end in them: they add one value of the block to another. Or the block gives them a branch to
    call, as a function or a module (`sublayer(x, self.attention)`). Any other child that has a branch of its own is a
    block itself and does not count.

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
    while more := dict.fromkeys(
        path
        for graph in graphs
        for path in _given_two(graph, block, candidates)
        if _joins(block.get_submodule(path), example)
    ):
        candidates.update(more)
        graphs = [recording.graph for recording in _ways(block, tuple(candidates), example)]
    used = dict.fromkeys(given)
    for graph in graphs if candidates else ():
        for residual in find_sums(graph, block, ()).values():
            if isinstance(residual, CutError) or not (inside := residual.add.meta.get("inlined", ())):
                continue
            used.update(dict.fromkeys(inside))
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
            return paths, [recording.graph for recording in _ways(block, paths, example)]
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
        graphs = [recording.graph for recording in _all_recordings(module)]
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


def _joins(child: nn.Module, example: Example | None) -> bool:
    """Whether a child adds a value computed from one argument to another argument, itself or in its own child.

    A child with its own branch does not count.
    """
    try:
        own = inlined_in(child, example)
        if read(child, DropPaths(inlined=own), None, example)[0]:
            return False
        graphs = [recording.graph for recording in _ways(child, (), example)]
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


class BranchReading(NamedTuple):
    """A branch as read from a block's code: its identity, and its parts or why it cannot be separated."""

    identity: Identity
    parts: BranchParts | CutError
    ends_in: str = ""
    is_around: bool = True
    """Whether the shortcut is an argument of the block, not a value computed by its layers."""
    is_projected: bool = False
    """Whether layers compute the shortcut from a value that it shares with the branch."""
    is_last: bool = False
    """Whether no layer of the block comes after the sum."""


def read(
    block: nn.Module,
    drop_paths: Sequence[str],
    functional: dict[Key, DropPathRule] | None = None,
    example: Example | None = None,
    left: dict[str, None] | None = None,
) -> tuple[dict[Key, BranchReading], dict[str, None]]:
    """The branches of a block on all paths through its code, and the children that it calls.

    Args:
        block: the block.
        drop_paths: paths of its drop paths; empty where additions are branches, which may end in inlined children.
        functional: gets the rules of its functional drop paths.
        example: what the code is read by, where there is one.
        left: gets why residual additions cannot be branches.

    Raises:
        TraceError: if the code cannot be read, or leaves something on the block in one of its modes.
    """
    called: dict[str, None] = {}
    readings: dict[Key, BranchReading] = {}
    for recording in _ways(block, inlined_of(drop_paths), example):
        functions = put_functional(recording.graph, block)
        if functional is not None:
            functional.update({(FUNCTIONAL, index): each.rule for index, each in enumerate(functions)})
        called.update(dict.fromkeys(node.target for node in recording.graph.nodes if node.op == "call_module"))
        sums = find_sums(recording.graph, block, drop_paths)
        identities = {key: identity(residual, block) for key, residual in sums.items()}
        branches = {key: cut(each, block) for key, each in sums.items() if not isinstance(each, CutError)}
        paths = paths_of(branches)
        matched = match(identities, {key: reading.identity for key, reading in readings.items()})
        for key, residual in sums.items():
            if isinstance(residual, CutError) and not drop_paths:
                if left is not None:
                    left[str(residual)] = None
                continue
            if not identities[key] and not drop_paths:
                continue  # `h + adjacency @ h` is of no part of the block, by which it could be known again.
            known = matched.get(key) or _free_key(key, readings)
            if isinstance(residual, CutError):
                readings[known] = BranchReading(
                    readings[known].identity if known in readings else frozenset(), residual
                )
            elif known not in readings:
                ends_in = ".".join(residual.add.meta.get("inlined", ())[-1:])
                is_around = residual.shortcut is None or is_plain(residual.shortcut, block)
                is_last = not any(computes(node, block) for node in descendants(residual.add))
                readings[known] = BranchReading(
                    identities[key],
                    BranchParts(block, *paths[key]),
                    ends_in,
                    is_around,
                    residual.is_projected,
                    is_last,
                )
            elif isinstance(parts := readings[known].parts, BranchParts):
                joined = [tuple(dict.fromkeys([*a, *b])) for a, b in zip(parts.paths, paths[key], strict=True)]
                readings[known] = readings[known]._replace(
                    identity=readings[known].identity | identities[key], parts=BranchParts(block, *joined)
                )
    return dict(sorted(readings.items(), key=lambda item: item[0][1])), called


def _free_key(key: Key, readings: Mapping[Key, BranchReading]) -> Key:
    """The key of a new branch: its own place in the code, or after all others if that is taken."""
    taken = [index for path, index in readings if path == key[0]]
    return key if key[1] not in taken else (key[0], max(taken) + 1)


def _ways(block: nn.Module, inlined: Collection[str], example: Example | None) -> Iterator[Recording | Reading]:
    """Recordings of a block's code, from reading it or from an example."""
    if isinstance(block, torch.jit.ScriptModule):
        raise TraceError("it is a torch.jit.ScriptModule, which layers=[...] can run as a whole")
    if example is not None:
        for reading in example.recordings(block, inlined):
            _mark_children_of_sizes(reading.graph, block)
            yield reading
        return
    for recording in _all_recordings(block, inlined):
        _mark_returned_sizes(recording.graph, block)
        _mark_children_of_sizes(recording.graph, block)
        yield recording


def _all_recordings(block: nn.Module, inlined: Collection[str] = ()) -> Iterator[Recording]:
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
    try:
        output = next(recordings(module, with_buffers=True)).graph.output_node()
    except TraceError:
        return False
    pending, seen = [output], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            return False
        if node not in seen and not is_size(node) and name_of(node) not in LIKE_ANOTHER:
            seen.add(node)
            is_form = name_of(node) in ("to", "type_as", "expand_as", "view_as")
            pending += (
                [each for each in node.args[:1] if isinstance(each, fx.Node)] if is_form else node.all_input_nodes
            )
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
