"""Finds the residual branches of a model: without running it, or as an example goes through it."""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from torch import fx, nn

from stochastic_depth.copies import plain_class, way_around
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit import cuts
from stochastic_depth.retrofit.cuts import CutError, UnusedError
from stochastic_depth.retrofit.example import Example, Reading
from stochastic_depth.retrofit.forms import names_in_code
from stochastic_depth.retrofit.functional import FUNCTIONAL, put_functional
from stochastic_depth.retrofit.recorder import unchanged_globals
from stochastic_depth.retrofit.rules import DropPathRule, does_otherwise, drop_path_rule, is_drop_path
from stochastic_depth.retrofit.sums import (
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
from stochastic_depth.retrofit.trace import (
    OPAQUE,
    Recording,
    StoredError,
    TraceError,
    flatten,
    is_size,
    may_be_size,
    own_forward,
    record,
)

Where = Callable[[str, nn.Module], bool] | str | Sequence[str]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# A block that decides by sizes is recorded for at most this many combinations of its decisions.
_MAX_WAYS = 16


@dataclass(frozen=True, eq=False)
class Branch:
    """One residual branch of a model.

    Attributes:
        name: its name, see `make_stochastic_`.
        module: the module whose class is swapped: the block that holds the branch, or its drop path.
        block_name: name of that module.
        parts: the module that holds the branch's parameters.
        named: the module that the name speaks of.
        key: which of the block's branches it is; None where the module has one only.
        rule: what the model's own drop path does; None where there is none.
        treatment: whether a closed gate skips it or only masks its output.
        cause: why it is masked.
        kind: whether it is an operand of a sum or a whole layer.
        drop_paths: of a layer, the drop paths inside, for which its gate stands.
        ends_in: the inlined child of the block in which its sum stands, which then is its place in the order.
    """

    name: str
    module: nn.Module
    block_name: str
    parts: nn.Module
    named: nn.Module
    key: Key | None = None
    rule: DropPathRule | None = None
    treatment: Literal["skip", "mask"] = "skip"
    cause: str = ""
    kind: Literal["sum", "layer"] = "sum"
    drop_paths: tuple[nn.Module, ...] = ()
    ends_in: nn.Module | None = None


@dataclass
class Found:
    """The branches of a model in the order of `model.named_modules()`.

    Attributes:
        branches: those that pass the filter.
        known: for each block all of its branches, and what identifies each.
        drop_paths: for each block the paths of its drop paths; empty where additions are branches.
        notes: what was found and is no branch, for `print(depth)`.
        example: what the code is read by, where there is one.
    """

    branches: list[Branch] = field(default_factory=list[Branch])
    known: dict[nn.Module, dict[Key, Identity]] = field(default_factory=dict[nn.Module, "dict[Key, Identity]"])
    drop_paths: dict[nn.Module, DropPaths] = field(default_factory=dict[nn.Module, DropPaths])
    notes: list[str] = field(default_factory=list[str])
    example: Example | None = None


def find_branches(
    model: nn.Module,
    where: Where | None,
    layers: Sequence[str] | None,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    with_schedule: bool,
) -> Found:
    """The branches of a model.

    With a schedule they are the given layers. Without layers they are its `Residual`s and its drop paths with a rate
    above 0; if there is neither, the residual additions in its modules' code. Without a schedule they are its drop
    paths with a rate above 0, where the gate of a given layer stands for those inside of it. A module that is used
    several times has one gate for all its uses in a pass.

    Args:
        model: the model.
        where: filter, see `make_stochastic_`.
        layers: patterns of whole layers, see `make_stochastic_`.
        inputs: of an example, see `make_stochastic_`.
        with_schedule: whether survival probabilities come from a schedule.

    Raises:
        ValueError: if there is none, none that passes the filter, or one that cannot be treated.
    """
    found = Found(example=None if inputs is None else Example(model, inputs))
    if layers is not None:
        _find_layers(model, layers, found, with_schedule=with_schedule)
    if layers is None or not with_schedule:
        _find_drop_paths(model, found)
    if with_schedule and layers is None:
        _find_residuals(model, found)
        if not found.branches:
            _find_additions(model, found)
    if not found.branches:
        raise ValueError(_nothing_found(model, found, with_schedule=with_schedule))
    order = {module: index for index, module in enumerate(model.modules())}
    found.branches.sort(key=lambda branch: order[branch.ends_in or branch.named])
    found.branches = _chosen(found.branches, where)
    for branch in found.branches:
        if isinstance(branch.module, Residual) and type(branch.module).forward is not Residual.forward:
            raise ValueError(
                f"{branch.name} is a {type(branch.module).__name__} with a forward of its own, which the gate would "
                "replace. Keep Residual's forward, and put what comes before or after the sum into modules around it."
            )
    return found


def _nothing_found(model: nn.Module, found: Found, *, with_schedule: bool) -> str:
    looked_for = ["drop paths (DropPath, StochasticDepth, *DropPath) with a rate above 0"]
    if with_schedule:
        looked_for += ["stochastic_depth.Residual modules", "additions of a shortcut and a branch in the modules' code"]
    advice = (
        "Write the sums of the model as Residual(branch, shortcut), or name whole layers by layers=[...]."
        if with_schedule
        else "Create it with a rate, such as drop_path_rate=0.1, or give a schedule, such as linear_decay(0.5)."
    )
    if with_schedule and found.example is None:
        advice = "Give inputs=[...] of an example, by which the code is read as it runs. Or w" + advice[1:]
    if not with_schedule and any("not looked into" in note for note in found.notes) and found.example is None:
        advice = "Give inputs=[...] of an example, by which the code is read as it runs."
    elif not with_schedule and any("never executed" in note or "without effect" in note for note in found.notes):
        advice = (
            "It holds some that its forward never uses. Give a schedule, such as linear_decay(0.5), to gate its sums."
        )
    seen = "".join(f"\n  {note}" for note in found.notes[:8])
    where = "; ".join(looked_for)
    return f"No residual branch was found in {type(model).__name__}: looked for {where}. {advice}{seen}"


def _find_layers(model: nn.Module, layers: Sequence[str], found: Found, *, with_schedule: bool) -> None:
    for pattern in layers:
        names = [name for name, _ in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)]
        if not names:
            some = ", ".join(name for name, module in model.named_modules() if name and any(module.children()))[:200]
            raise ValueError(f"layers: the pattern {pattern!r} matches no module. There are {some}, ...")
    outer: list[str] = []
    layer_of: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        # In `encoder.layer.*` the star matches what is inside of the layers too: the outermost modules are meant.
        if any(name.startswith(f"{other}.") for other in outer):
            continue
        if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in layers):
            outer.append(name)
            if type(module) in _CONTAINERS:
                raise ValueError(f"layers: {name} is a {type(module).__name__}, no layer. Try {name + '.*'!r}.")
            drop_paths: dict[nn.Module, DropPathRule] = {}
            for inner_name, inner in module.named_modules(prefix=name):
                if rule := _acting_rule(inner_name, inner):
                    drop_paths[inner] = rule
                    if layer_of.setdefault(inner, name) != name:
                        raise ValueError(
                            f"layers: {layer_of[inner]} and {name} share a drop path, {inner_name}, which cannot "
                            "follow two gates. Give each layer one of its own."
                        )
            if not (drop_paths or with_schedule):
                found.notes.append(f"{name}: it has no drop path with a rate above 0")
                continue
            common = None if with_schedule else _common_rule(name, drop_paths.values())
            found.branches.append(
                Branch(name, module, name, module, module, rule=common, kind="layer", drop_paths=tuple(drop_paths))
            )
    if not found.branches:
        raise ValueError(
            f"layers: {outer[0]} has no drop path with a rate above 0. Give a schedule, such as uniform(0.9)."
        )


def _common_rule(layer: str, rules: Collection[DropPathRule]) -> DropPathRule:
    first, *others = dict.fromkeys(rules)
    if others:
        raise ValueError(f"layers: the drop paths of {layer} have several rates or rules. Give a schedule.")
    return first


def _acting_rule(name: str, module: nn.Module) -> DropPathRule | None:
    """The rule of a drop path with a rate above 0, None for any other module."""
    rule = drop_path_rule(module)
    if rule is None or rule.drop_rate == 0:
        return None
    if not 0 < rule.drop_rate < 1:
        raise ValueError(
            f"{name} has a drop rate of {rule.drop_rate:g}: its branch would never survive. A drop rate must be in "
            "[0, 1); was a survival probability given as a drop rate?"
        )
    return rule


def _find_residuals(model: nn.Module, found: Found) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Residual):
            found.branches.append(Branch(name, module, name, module.branch, module))


def _find_drop_paths(model: nn.Module, found: Found) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = {drop_path for layer in found.branches for drop_path in layer.drop_paths}
    layers = [layer.block_name for layer in found.branches]
    blocks: dict[nn.Module, tuple[str, dict[str, DropPathRule]]] = {}
    for name, module in modules.items():
        if _may_drop(module) and not any(name == layer or name.startswith(f"{layer}.") for layer in layers):
            blocks.setdefault(module, (name, {}))
        rule = _acting_rule(name, module)
        if rule is None and (reason := does_otherwise(module)):
            found.notes.append(f"{name} ({type(module).__name__}): it stays as it is, {reason}. See register_drop_path")
        if rule is None or module in inside:
            continue
        block_name = _block_of(name, modules)
        _, rules = blocks.setdefault(modules[block_name], (block_name, {}))
        # A block that is reached by two names appears under the first only.
        if blocks[modules[block_name]][0] == block_name:
            rules[name[len(block_name) + 1 :] if block_name else name] = rule
    for block, (block_name, rules) in blocks.items():
        _find_in_block(block, block_name, rules, found)


def _may_drop(module: nn.Module) -> bool:
    """Whether the code of a module has a drop path that is a function in it, as far as names tell."""
    if type(module) in _CONTAINERS or is_drop_path(module) or does_otherwise(module):
        return False
    names = names_in_code(plain_class(module))[0]
    return any(part in name.lower() for name in names for part in _NAMES_OF_DROPPING)


_NAMES_OF_DROPPING = ("drop_path", "droppath", "stochastic_depth", "drop_connect", "bernoulli")


def _block_of(name: str, modules: dict[str, nn.Module]) -> str:
    """Name of the nearest module above that has a forward of its own and is no mere container."""
    while name:
        name = name.rpartition(".")[0]
        if type(modules[name]) not in _CONTAINERS:
            break
    return name


def _find_in_block(block: nn.Module, name: str, rules: dict[str, DropPathRule], found: Found) -> None:
    paths = (*rules, FUNCTIONAL) if _may_drop(block) else tuple(rules)
    functional: dict[Key, DropPathRule] = {}
    try:
        readings, called = _readings(block, paths, functional, found.example)
    except TraceError as error:
        # What the code does is seen when it runs. Until then, each drop path is taken to be used once.
        readings = {(path, 0): _Reading(frozenset(), CutError(str(error))) for path in rules}
        called = {}
        if not rules:
            found.notes.append(f"{name or 'the model'} ({type(block).__name__}): not looked into, {error}")
    if readings:
        found.known[block] = {key: reading.identity for key, reading in readings.items()}
        found.drop_paths[block] = DropPaths(paths, found.known[block])
    for key in [key for key in readings if key[0] == FUNCTIONAL]:
        parts = readings[key].parts
        branch_name = f"{name}.drop_path()".removeprefix(".")
        if len(functional) > 1:
            branch_name += f"#{key[1] + 1}"
        if isinstance(parts, UnusedError) or not 0 < functional[key].drop_rate < 1:
            continue
        cut = isinstance(parts, BranchParts)
        found.branches.append(
            Branch(
                branch_name,
                block,
                name,
                parts if cut else BranchParts(block),
                block,
                key,
                functional[key],
                "skip" if cut else "mask",
                "" if cut else str(parts),
            )
        )
    in_containers: dict[str, dict[str, DropPathRule]] = {}
    for path, rule in rules.items():
        full_name = f"{name}.{path}" if name else path
        drop_path = block.get_submodule(path)
        container = next((target for target in called if path.startswith(f"{target}.")), None)
        if container is not None:
            # The block calls the container as a whole, whose forward calls the drop path.
            in_containers.setdefault(container, {})[path[len(container) + 1 :]] = rule
            continue
        keys = [key for key in readings if key[0] == path]
        if not keys:
            found.notes.append(f"{full_name}: found, but never executed by {type(block).__name__}")
        for key in keys:
            parts = readings[key].parts
            branch_name = full_name if len(keys) == 1 else f"{full_name}#{key[1] + 1}"
            if isinstance(parts, UnusedError):
                found.notes.append(f"{branch_name}: without effect, {type(block).__name__} does not use what it gives")
            elif isinstance(parts, CutError):
                nothing = BranchParts(block)
                found.branches.append(
                    Branch(branch_name, block, name, nothing, drop_path, key, rule, "mask", str(parts))
                )
            else:
                found.branches.append(Branch(branch_name, block, name, parts, drop_path, key, rule))
    for container, inner in in_containers.items():
        _find_in_block(block.get_submodule(container), f"{name}.{container}".removeprefix("."), inner, found)


def _find_additions(model: nn.Module, found: Found) -> None:
    blocks: dict[str, tuple[nn.Module, tuple[str, ...], dict[Key, _Reading]]] = {}
    for name, block in model.named_modules():
        if type(block) in _CONTAINERS or not _may_add(block):
            continue
        try:
            inlined = _inlined(block, found.example, name, found.notes)
            readings, _ = _readings(block, DropPaths(inlined=inlined), None, found.example)
        except TraceError as error:
            found.notes.append(f"{name or 'the model'} ({type(block).__name__}): not looked into, {error}")
            continue
        if readings:
            blocks[name] = block, inlined, readings
    inside = {
        f"{name}.{path}".strip(".")
        for name, (_, _, readings) in blocks.items()
        for reading in readings.values()
        if isinstance(reading.parts, BranchParts)
        for path in reading.parts.paths.members
    }
    for name, (block, inlined, readings) in blocks.items():
        if _lies_in(name, inside) and not any(reading.is_around for reading in readings.values()):
            # LoRA's product beside the base layer, the scan of a state space model: sums that shorten nothing.
            found.notes.append(
                f"{name} ({type(block).__name__}): it lies in a branch, and adds to what its own layers compute"
            )
            continue
        for key, reading in readings.items():
            assert isinstance(reading.parts, BranchParts)
            found.known.setdefault(block, {})[key] = reading.identity
            found.drop_paths[block] = DropPaths((), found.known[block], inlined)
            branch_name = f"{name}#{key[1] + 1}".removeprefix("#")
            ends_in = block.get_submodule(reading.ends_in) if reading.ends_in else None
            found.branches.append(Branch(branch_name, block, name, reading.parts, block, key, ends_in=ends_in))


def _lies_in(name: str, modules: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[: index + 1]) in modules for index in range(len(parts)))


def _inlined(
    block: nn.Module, example: Example | None, name: str = "", notes: list[str] | None = None
) -> tuple[str, ...]:
    """Paths of the children in which the block's branches end: they add what it computes to a shortcut that it gives.

    A child that holds a whole branch, from the shortcut to the sum, is a block itself and none of them.

    Args:
        block: the block.
        example: what the code is read by, where there is one.
        name: its name, for notes.
        notes: gets why a child could not be one of them.

    Raises:
        TraceError: if the block's code cannot be read.
    """
    candidates: dict[str, None] = {}
    graphs = [recording.graph for recording in _ways(block, (), example)]
    while more := dict.fromkeys(
        path
        for graph in graphs
        for path in _given_two(graph, block, candidates)
        if _joins(block.get_submodule(path), example)
    ):
        candidates.update(more)
        graphs = [recording.graph for recording in _ways(block, tuple(candidates), example)]
    used: dict[str, None] = {}
    for graph in graphs if candidates else ():
        for residual in find_sums(graph, block, ()).values():
            if isinstance(residual, CutError) or not (inside := residual.add.meta.get("inlined", ())):
                continue
            if any(node.meta.get("inlined", ())[: len(inside)] != inside for node in cuts.cut(residual, block).nodes):
                used.update(dict.fromkeys(inside))
    for path in used:
        if what := way_around(block.get_submodule(path)):
            if notes is not None:
                notes.append(
                    f"{f'{name}.{path}'.strip('.')}: a branch ends in it, which has {what}, to be called whole"
                )
            return ()
    return tuple(used)


def _given_two(graph: fx.Graph, block: nn.Module, but: Collection[str]) -> Iterator[str]:
    """Paths of the children that are given two values of which one may be a shortcut around the other."""
    for node in graph.nodes:
        if node.op != "call_module" or node.target in but:
            continue
        kind = plain_class(block.get_submodule(node.target))
        given = [each for each in node.all_input_nodes if each.op != "get_attr" and not is_size(each)]
        if len(given) < 2 or kind.__module__.startswith("torch.nn."):
            continue
        before = [{each for each in cuts.ancestors(value) if each.op != "get_attr"} for value in given]
        if any(before[i] & before[j] for i in range(len(given)) for j in range(i)):
            yield node.target


def _joins(child: nn.Module, example: Example | None) -> bool:
    """Whether a child adds what it computes from one of its arguments to another one, itself or in a child of its own.

    One that has a branch of its own does not count.
    """
    try:
        own = _inlined(child, example)
        if _readings(child, DropPaths(inlined=own), None, example)[0]:
            return False
        graphs = [recording.graph for recording in _ways(child, (), example)]
    except TraceError:
        return False
    for graph in graphs:
        cuts.name_values_changed_in_place(graph, child)
        cuts.spell_out_additions(graph, child)
        for node in graph.nodes:
            operands = cuts.added(node)
            if operands is not None:
                if any(_come_apart(a, b) and cuts.is_plain(a, child) for a, b in (operands, operands[::-1])):
                    return True
            elif node.op == "call_module" and any(
                _come_apart(a, b) for a in node.all_input_nodes for b in node.all_input_nodes
            ):
                module = child.get_submodule(node.target)
                if not plain_class(module).__module__.startswith("torch.nn.") and _joins(module, example):
                    return True
    return False


def _come_apart(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values come from different arguments."""
    of_a, of_b = ({each for each in cuts.ancestors(node) if each.op == "placeholder"} for node in (a, b))
    return bool(of_a - of_b) and bool(of_b - of_a)


def _may_add(block: nn.Module) -> bool:
    """Whether a module may hold residual additions: it has children, or works with parameters of its own."""
    if any(block.children()):
        return True
    return next(block.parameters(recurse=False), None) is not None and not plain_class(block).__module__.startswith(
        "torch.nn."
    )


class _Reading(NamedTuple):
    """What the code of a block tells of a branch: what identifies it, and its parts or why it cannot be separated."""

    identity: Identity
    parts: BranchParts | CutError
    ends_in: str = ""
    is_around: bool = True
    """Whether the shortcut is what the block is given, and not something that its layers compute."""


def _readings(
    block: nn.Module,
    drop_paths: Sequence[str],
    functional: dict[Key, DropPathRule] | None = None,
    example: Example | None = None,
) -> tuple[dict[Key, _Reading], dict[str, None]]:
    """The branches of a block on any way through its code, and the children that it calls.

    Args:
        block: the block.
        drop_paths: paths of its drop paths; empty where additions are branches, which may end in inlined children.
        functional: gets the rules of its functional drop paths.
        example: what the code is read by, where there is one.

    Raises:
        TraceError: if the code cannot be read, or leaves something on the block in one of its modes.
    """
    called: dict[str, None] = {}
    readings: dict[Key, _Reading] = {}
    for recording in _ways(block, inlined_of(drop_paths), example):
        functions = put_functional(recording.graph, block)
        if functional is not None:
            functional.update({(FUNCTIONAL, index): each.rule for index, each in enumerate(functions)})
        called.update(dict.fromkeys(node.target for node in recording.graph.nodes if node.op == "call_module"))
        sums = find_sums(recording.graph, block, drop_paths)
        identities = {key: identity(residual, block) for key, residual in sums.items()}
        branches = {key: cuts.cut(each, block) for key, each in sums.items() if not isinstance(each, CutError)}
        paths = paths_of(branches)
        matched = match(identities, {key: reading.identity for key, reading in readings.items()})
        for key, residual in sums.items():
            if isinstance(residual, CutError) and not drop_paths:
                continue
            known = matched.get(key) or _free_key(key, readings)
            if isinstance(residual, CutError):
                readings[known] = _Reading(readings[known].identity if known in readings else frozenset(), residual)
            elif known not in readings:
                ends_in = ".".join(residual.add.meta.get("inlined", ())[-1:])
                is_around = residual.shortcut is None or cuts.is_plain(residual.shortcut, block)
                readings[known] = _Reading(identities[key], BranchParts(block, *paths[key]), ends_in, is_around)
            elif isinstance(parts := readings[known].parts, BranchParts):
                joined = [tuple(dict.fromkeys([*a, *b])) for a, b in zip(parts.paths, paths[key], strict=True)]
                readings[known] = readings[known]._replace(
                    identity=readings[known].identity | identities[key], parts=BranchParts(block, *joined)
                )
    return dict(sorted(readings.items(), key=lambda item: item[0][1])), called


def _free_key(key: Key, readings: Mapping[Key, _Reading]) -> Key:
    """The key of a new branch: its own place in the code, or behind all others where that is taken."""
    taken = [index for path, index in readings if path == key[0]]
    return key if key[1] not in taken else (key[0], max(taken) + 1)


def _ways(
    block: nn.Module, inlined: Collection[str], example: Example | None
) -> Iterator[Recording] | Iterator[Reading]:
    """What the code of a block does as it is read, or as an example goes through it."""
    return _all_recordings(block, inlined) if example is None else example.recordings(block, inlined)


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
        if optional and not _has_optional(block):
            continue
        arguments = (_default_arguments(block, optional=optional), {})
        try:
            yield from recordings(block, arguments, other_mode=other_mode, inlined=inlined)
        except StoredError:
            raise
        except TraceError:
            pass  # It may never be called so.


def _recordings_by_guess(block: nn.Module, error: TraceError, inlined: Collection[str]) -> Iterator[Recording]:
    """Recordings of code that wants numbers for sizes, or more arguments than it names.

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


def _has_optional(block: nn.Module) -> bool:
    return _default_arguments(block, optional=True) != _default_arguments(block)


def recordings(
    block: nn.Module,
    arguments: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    *,
    with_buffers: bool = False,
    other_mode: bool = False,
    guess_sizes: bool = False,
    inlined: Collection[str] = (),
) -> Iterator[Recording]:
    """Recordings of a module's forward, on each way that its decisions by sizes allow.

    Args:
        block: the module.
        arguments: those of the call, by position and by name, where any object stands for a tensor. None: its defaults.
        with_buffers: see `record`.
        other_mode: see `record`.
        guess_sizes: see `record`.
        inlined: see `record`.

    Raises:
        StoredError: if the forward leaves something on the block on any of the ways.
        TraceError: if none of the ways can be recorded.
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
            with unchanged_globals(block, inlined):
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
        # The next way: take the last decision that was True the other way.
        while taken and not taken[-1]:
            taken.pop()
        if not taken:
            break
        decisions = [*taken[:-1], False]
    if not num_recorded and first_error is not None:
        raise first_error


def _explore(decisions: Sequence[bool], taken: list[bool], node: fx.Node) -> bool | int:
    subject = cast(fx.Node, node.args[0])
    if not may_be_size(subject):
        raise TraceError(f"the forward decides by the value of {subject.name}")
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
    """The arguments that have to be given, as symbols, and the defaults of the others; symbols too if `optional`."""
    parameters = inspect.signature(own_forward(block, block)).parameters.values()
    return tuple(
        OPAQUE
        if parameter.default is parameter.empty or (optional and parameter.default is None)
        else parameter.default
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY)
    )


def _chosen(branches: list[Branch], where: Where | None) -> list[Branch]:
    """The branches that pass the filter, each of whose patterns must match one."""
    if where is None:
        return branches
    if callable(where):
        chosen, useless = [branch for branch in branches if where(branch.name, branch.named)], where
    elif isinstance(where, Sequence):
        patterns = [where] if isinstance(where, str) else where
        names = [branch.name for branch in branches]
        matched = {pattern: set(fnmatch.filter(names, pattern)) for pattern in patterns}
        useless = next((pattern for pattern, matches in matched.items() if not matches), None if matched else where)
        chosen = [branch for branch in branches if useless is None and branch.name in set().union(*matched.values())]
    else:
        raise TypeError(f"where must be a predicate (name, module) -> bool or patterns of names, but is {where!r}.")
    if not chosen:
        some = ", ".join(branch.name for branch in branches[:3])
        raise ValueError(f"where={useless!r} matches none of the {len(branches)} branches: {some}, ...")
    return chosen
