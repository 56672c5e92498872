"""Finds the residual branches of a model, without running it or with an example."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit.code.code_names import names_in_code
from stochastic_depth.retrofit.code.for_now import remembering
from stochastic_depth.retrofit.errors import CutError, GivenCodeError, TraceError, UnusedError
from stochastic_depth.retrofit.finding.additions import find_additions
from stochastic_depth.retrofit.finding.branches import CONTAINERS, Branch, Found, Where, not_looked_into
from stochastic_depth.retrofit.finding.example import Example
from stochastic_depth.retrofit.finding.inlined import calls_argument, given_code
from stochastic_depth.retrofit.finding.readings import BranchReading, read
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL
from stochastic_depth.retrofit.rewriting.sums import (
    BranchParts,
    DropPaths,
    Key,
)
from stochastic_depth.retrofit.rules import DropPathRule, does_otherwise, drop_path_rule, is_drop_path, is_named, leave


@remembering()
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
    above 0; if there are neither, the residual additions in its modules' code. Without a schedule they are its drop
    paths with a rate above 0; the gate of a given layer replaces those inside it. A module that is used several times
    has one gate for all its uses in a pass.

    Args:
        model: the model.
        where: filter, see `make_stochastic_`.
        layers: patterns of whole layers, see `make_stochastic_`.
        inputs: arguments of an example, see `make_stochastic_`.
        with_schedule: whether survival probabilities come from a schedule.

    Raises:
        ValueError: if there is none, none passes the filter, or one cannot be gated.
    """
    found = Found(example=None if inputs is None else Example(model, inputs))
    if layers is not None:
        _find_layers(model, layers, found, with_schedule=with_schedule)
    if layers is None or not with_schedule:
        _find_drop_paths(model, found)
    if with_schedule and layers is None:
        _find_residuals(model, found)
        if not found.branches:
            find_additions(model, found)
    if not found.branches:
        raise ValueError(_nothing_found(model, found, with_schedule=with_schedule))
    found.branches.sort(key=_place_in(model, found))
    found.branches = _chosen(found.branches, where)
    for branch in found.branches:
        if isinstance(branch.module, Residual) and type(branch.module).forward is not Residual.forward:
            raise ValueError(
                f"{branch.name} is a {type(branch.module).__name__} with its own forward, which the gate would "
                "replace. Keep Residual's forward, and move code before or after the sum into modules around it."
            )
    return found


def _place_in(model: nn.Module, found: Found) -> Callable[[Branch], tuple[int, int]]:
    """Gives the place of a branch among the model's modules: in the order of their calls, where an example shows it."""
    order: dict[nn.Module, tuple[int, int]] = {}
    called_by_name: dict[str, int] = {}
    for index, (name, module) in enumerate(model.named_modules()):
        place = found.example.place(module) if found.example else 0
        called_by_name[name] = called_by_name[name.rpartition(".")[0]] if place is None and name else place or 0
        order[module] = called_by_name[name], index
    names = {branch.block_name for branch in found.branches}
    # Models between whose blocks are sums: such a sum stands where its branch is.
    around = {branch.block_name for branch in found.branches if branch.ends_in is not None}
    around |= {name for name in names if any(other.startswith(f"{name}." if name else "") for other in names - {name})}

    def place_of(branch: Branch) -> tuple[int, int]:
        is_sum = branch.ends_in is None and branch.named is branch.module
        if is_sum and branch.block_name in around and isinstance(branch.parts, BranchParts):
            inside = [branch.named.get_submodule(path) for path in branch.parts.paths.members]
            return min([order[module] for module in inside], default=order[branch.named])
        return order[branch.ends_in or branch.named]

    return place_of


def _nothing_found(model: nn.Module, found: Found, *, with_schedule: bool) -> str:
    looked_for = ["drop paths (DropPath, StochasticDepth, *DropPath) with a rate above 0"]
    if with_schedule:
        looked_for += ["stochastic_depth.Residual modules", "additions of a shortcut and a branch in the modules' code"]
    advice = (
        "Write the sums of the model as Residual(branch, shortcut), or name whole layers with layers=[...]."
        if with_schedule
        else "Create it with a rate, such as drop_path_rate=0.1, or give a schedule, such as linear_decay(0.5)."
    )
    if with_schedule and found.example is None:
        advice = "Give inputs=[...] of an example, by which the code is read as it runs. Or w" + advice[1:]
    if not with_schedule and any("not looked into" in note for note in found.notes) and found.example is None:
        advice = "Give inputs=[...] of an example, by which the code is read as it runs."
    elif not with_schedule and any("never executed" in note or "without effect" in note for note in found.notes):
        advice = (
            "It has some that its forward never uses. Give a schedule, such as linear_decay(0.5), to gate its sums."
        )
    seen = "".join(f"\n  {note}" for note in found.notes[:8])
    where = "; ".join(looked_for)
    return f"No residual branch was found in {type(model).__name__}: looked for {where}. {advice}{seen}"


def _lists_of_layers(model: nn.Module) -> str:
    """Patterns that would match layers of the model."""
    lists = [
        f"{name}.* ({len(module)} {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    if lists:
        return f"Its lists of layers are {', '.join(lists[:4])}{', ...' if len(lists) > 4 else ''}."
    some = [name for name, module in model.named_modules() if name and any(module.children())]
    return f"There are {', '.join(some[:8])}, ..."


def _find_layers(model: nn.Module, layers: Sequence[str], found: Found, *, with_schedule: bool) -> None:
    for pattern in layers:
        names = [name for name, _ in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)]
        if not names:
            tried = ", ".join(map(repr, layers))
            raise ValueError(
                f"layers: the pattern {pattern!r} matches no module of {type(model).__name__} (tried: {tried}). "
                f"{_lists_of_layers(model)}"
            )
    outer: list[str] = []
    layer_of: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        # In `encoder.layer.*` the star also matches modules inside the layers; only the outermost count.
        if any(name.startswith(f"{other}.") for other in outer):
            continue
        if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in layers):
            outer.append(name)
            if type(module) in CONTAINERS:
                raise ValueError(f"layers: {name} is a {type(module).__name__}, not a layer. Try {name + '.*'!r}.")
            drop_paths: dict[nn.Module, DropPathRule] = {}
            for inner_name, inner in module.named_modules(prefix=name):
                if rule := _acting_rule(inner_name, inner):
                    drop_paths[inner] = rule
                    if layer_of.setdefault(inner, name) != name:
                        raise ValueError(
                            f"layers: {layer_of[inner]} and {name} share a drop path, {inner_name}, which cannot "
                            "follow two gates. Give each layer its own."
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
        raise ValueError(f"layers: the drop paths of {layer} have different rates or rules. Give a schedule.")
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
        block_name = _block_around(_block_of(name, modules), modules, found.example)
        _, rules = blocks.setdefault(modules[block_name], (block_name, {}))
        # A block that is reached by two names appears under the first only.
        if blocks[modules[block_name]][0] == block_name:
            rules[name[len(block_name) + 1 :] if block_name else name] = rule
    for block, (block_name, rules) in blocks.items():
        _find_in_block(block, block_name, rules, found)


def _may_drop(module: nn.Module) -> bool:
    """Whether the code of a module has a drop path that is a function in it, as far as names tell."""
    if type(module) in CONTAINERS or is_drop_path(module) or does_otherwise(module):
        return False
    names = names_in_code(plain_class(module))[0]
    return "rand" in names or any(part in name.lower() for name in names for part in _NAMES_OF_DROPPING)


_NAMES_OF_DROPPING = ("drop_path", "droppath", "stochastic_depth", "drop_connect", "bernoulli")


def _block_of(name: str, modules: dict[str, nn.Module]) -> str:
    """Name of the nearest parent module with its own forward that is not a mere container."""
    while name:
        name = name.rpartition(".")[0]
        if type(modules[name]) not in CONTAINERS:
            break
    return name


def _block_around(name: str, modules: dict[str, nn.Module], example: Example | None) -> str:
    """Name of the block that a module is a part of because it calls code that the block gives it; else its own."""
    if not name or not calls_argument(modules[name]):
        return name
    outer = _block_of(name, modules)
    try:
        given, _ = given_code(modules[outer], example)
    except TraceError:
        return name
    return _block_around(outer, modules, example) if f".{name}".removeprefix(f".{outer}").strip(".") in given else name


def _find_in_block(block: nn.Module, name: str, rules: dict[str, DropPathRule], found: Found) -> None:
    paths = (*rules, FUNCTIONAL) if _may_drop(block) else tuple(rules)
    functional: dict[Key, DropPathRule] = {}
    inlined: tuple[str, ...] = ()
    try:
        try:
            readings, called = read(block, paths, functional, found.example)
        except GivenCodeError:
            inlined, _ = given_code(block, found.example)
            readings, called = read(block, DropPaths(paths, inlined=inlined), functional, found.example)
    except TraceError as error:
        # How often the code uses each drop path shows when it runs. Without an example, assume once.
        uses = {
            path: 1 if found.example is None else found.example.num_uses(block, block.get_submodule(path))
            for path in rules
        }
        unread = BranchReading(frozenset(), CutError(str(error)))
        readings = {(path, index): unread for path in rules for index in range(uses[path])}
        called = {}
        if not rules:
            found.notes.append(not_looked_into(block, name, error))
    plain = [path for (path, _), reading in readings.items() if reading.drops_plain and path in rules]
    if left := {path for path in plain if not is_named(block.get_submodule(path))}:
        for path in left:
            drop_path = block.get_submodule(path)
            leave(drop_path, "it drops what no layer has computed")
            full_name = f"{name}.{path}".strip(".")
            found.notes.append(
                f"{full_name} ({type(drop_path).__name__}): it stays as it is, {does_otherwise(drop_path)}"
            )
        _find_in_block(block, name, {path: rule for path, rule in rules.items() if path not in left}, found)
        return
    if readings:
        found.known[block] = {key: reading.identity for key, reading in readings.items()}
        scaled = {key: 1 - rule.drop_rate for key, rule in functional.items() if rule.rescale == "eval"}
        found.drop_paths[block] = DropPaths(paths, found.known[block], inlined, scaled)
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
                found.notes.append(f"{branch_name}: without effect, {type(block).__name__} does not use its output")
            elif isinstance(parts, CutError):
                nothing = BranchParts(block)
                found.branches.append(
                    Branch(branch_name, block, name, nothing, drop_path, key, rule, "mask", str(parts))
                )
            else:
                found.branches.append(Branch(branch_name, block, name, parts, drop_path, key, rule))
    for container, inner in in_containers.items():
        _find_in_block(block.get_submodule(container), f"{name}.{container}".removeprefix("."), inner, found)


def _chosen(branches: list[Branch], where: Where | None) -> list[Branch]:
    """The branches that pass the filter; each pattern must match at least one."""
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
