"""The branches in a recording of a block: their sums, identities and parameters."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import fx, nn

from stochastic_depth.retrofit.errors import CutError
from stochastic_depth.retrofit.rewriting.cuts import CutBranch, Sum, cut, drop_path_sum
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL, functional_drop_path
from stochastic_depth.retrofit.rewriting.operations import ancestors
from stochastic_depth.retrofit.rewriting.plain_forms import (
    move_behind_what_commutes,
    name_values_changed_in_place,
    put_in_a_row,
    remove_unused_views,
    spell_out_additions,
)
from stochastic_depth.retrofit.rewriting.residual_sums import residual_sums
from stochastic_depth.torch_private import child_dict, parameter_dict

Key = tuple[str, int]
"""A branch of a block: the path of its drop path, `FUNCTIONAL` for a function, "" for a plain addition; and which of
its uses, from 0."""
Identity = frozenset[str]
"""Identifies a branch anywhere in the code: paths of the children and parameters that it uses."""


class DropPaths(tuple[str, ...]):
    """Paths of a block's drop paths whose calls are branches, empty if the branches are additions; and more.

    Attributes:
        known: the identity of each branch.
        inlined: paths of the children whose own code is read as part of the block's code.
        scaled: branches that the code itself multiplies by their survival probability in evaluation, with it.
    """

    known: Mapping[Key, Identity]
    inlined: tuple[str, ...]
    scaled: Mapping[Key, float]

    def __new__(
        cls,
        paths: Sequence[str] = (),
        known: Mapping[Key, Identity] | None = None,
        inlined: Sequence[str] = (),
        scaled: Mapping[Key, float] | None = None,
    ) -> DropPaths:
        """The paths, with their branches' identities."""
        made = super().__new__(cls, paths)
        made.known = known or {}
        made.inlined = tuple(inlined)
        made.scaled = scaled or {}
        return made


def inlined_of(drop_paths: Sequence[str]) -> tuple[str, ...]:
    """Paths of the children whose own code is read as part of their block's code."""
    return drop_paths.inlined if isinstance(drop_paths, DropPaths) else ()


class BranchParts(nn.Module):
    """Holds the parameters of a branch in another library's block: whole modules and single parameters of the block.

    Args:
        block: the block.
        members: paths of the modules.
        direct: paths of the parameters. They are looked up at each access, because `to_empty`, FSDP and loading with
            `assign` replace them.
    """

    def __init__(self, block: nn.Module, members: Sequence[str] = (), direct: Sequence[str] = ()) -> None:
        super().__init__()
        self.paths = Paths(tuple(members), tuple(direct))
        self._block = [block]  # In a list, so that it is not a child.
        self.members = nn.ModuleList()
        self.direct = [path.rpartition(".")[::2] for path in direct]
        self.refresh()

    def refresh(self) -> None:
        """Look up the modules again, because adapters and conversions replace them."""
        now = [module for path in self.paths.members if (module := _submodule(self._block[0], path)) is not None]
        if len(now) != len(self.members) or any(a is not b for a, b in zip(now, self.members, strict=True)):
            self.members = nn.ModuleList(now)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The single parameters and, with `recurse`, those of all members."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for path, name in self.direct:
            holder = _submodule(self._block[0], path)
            parameter = None if holder is None else parameter_dict(holder).get(name)
            if parameter is not None:
                yield f"{prefix}direct.{name}", parameter


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = block
    for name in path.split(".") if path else ():
        module = None if module is None else child_dict(module).get(name)
    return module


def find_sums(graph: fx.Graph, block: nn.Module, drop_paths: Sequence[str]) -> dict[Key, Sum | CutError]:
    """The branches in a recording of a block: those of its drop paths or, without drop paths, all residual additions.

    A branch that cannot be separated has the reason instead of its sum.
    """
    name_values_changed_in_place(graph, block)
    remove_unused_views(graph)
    spell_out_additions(graph, block)
    if not drop_paths:
        put_in_a_row(graph, block)
        additions = sorted(residual_sums(graph, block), key=_broadcasts)
        return {
            ("", index): CutError(_BROADCASTS) if _broadcasts(residual) else _separable(residual, block)
            for index, residual in enumerate(additions)
        }
    found: dict[Key, Sum | CutError] = {}
    for call in calls_of(graph, drop_paths).values():
        move_behind_what_commutes(call, block)
    put_in_a_row(graph, block, calls_of(graph, drop_paths).values())
    for key, call in calls_of(graph, drop_paths).items():
        try:
            found[key] = _separable(drop_path_sum(call, block), block)
        except CutError as error:
            found[key] = error
    return found


_BROADCASTS = "the sum has another shape than its shortcut"


def _broadcasts(residual: Sum) -> bool:
    """Whether a sum is known to have another shape than its shortcut, which then cannot replace it."""
    shortcut = None if residual.shortcut is None else residual.shortcut.meta.get("shape")
    return shortcut is not None and shortcut != residual.add.meta.get("shape", shortcut)


def known_sums(graph: fx.Graph, block: nn.Module, drop_paths: Sequence[str]) -> dict[Key, Sum | CutError]:
    """The branches in a recording of a block by the keys under which they are known, see `find_sums`."""
    sums = find_sums(graph, block, drop_paths)
    known = drop_paths.known if isinstance(drop_paths, DropPaths) else {}
    if not known:
        return sums
    matched = match({key: identity(residual, block) for key, residual in sums.items()}, known)
    found = {matched[key]: residual for key, residual in sums.items() if key in matched}
    missing = {key: paths for key, paths in known.items() if key[0] and key not in found}
    if missing:
        # Drop paths that are called in training only: their sums are matched by what the branches use.
        found.update({key: residual for key, (_, residual) in additions_of(graph, block, missing).items()})
    return found


def additions_of(
    graph: fx.Graph, block: nn.Module, missing: Mapping[Key, Identity]
) -> dict[Key, tuple[Key, Sum | CutError]]:
    """The residual additions that are known branches whose drop paths are not called, and how each is matched."""
    additions = {("", index): _separable(each, block) for index, each in enumerate(residual_sums(graph, block))}
    identities = {key: identity(each, block) for key, each in additions.items()}
    found = match(identities, {("", index): paths for index, paths in enumerate(missing.values())})
    keys = list(missing)
    return {keys[index]: (key, additions[key]) for key, (_, index) in found.items()}


def _separable(residual: Sum, block: nn.Module) -> Sum | CutError:
    try:
        cut(residual, block)
    except CutError as error:
        return error
    return residual


def calls_of(graph: fx.Graph, drop_paths: Sequence[str]) -> dict[Key, fx.Node]:
    """The calls of a block's drop paths, in order."""
    numbers = {path: itertools.count() for path in drop_paths}
    calls: dict[Key, fx.Node] = {}
    for node in graph.nodes:
        path = FUNCTIONAL if node.target is functional_drop_path else node.target if node.op == "call_module" else None
        if path in numbers:
            calls[cast(str, path), next(numbers[path])] = node
    return calls


def identity(residual: Sum | CutError, block: nn.Module) -> Identity:
    """The identity of a branch; empty if it cannot be separated."""
    if isinstance(residual, CutError):
        return frozenset()
    branch = cut(residual, block)
    own = {node for node in branch.nodes if node.op in ("call_module", "get_attr") and node is not residual.drop_path}
    if not own:  # All layers may be parts of one parameter, which none of the branches has for itself.
        shared = [ancestors(node) for node in branch.inputs]
        own = {node for nodes in shared if not any(map(_is_computed, nodes)) for node in nodes if node.op == "get_attr"}
    return frozenset(cast(str, node.target) for node in own)


def _is_computed(node: fx.Node) -> bool:
    return node.op in ("placeholder", "call_module")


def match(recorded: Mapping[Key, Identity], known: Mapping[Key, Identity]) -> dict[Key, Key]:
    """Match each branch of a recording with a known branch.

    Branches of one drop path, and plain additions, are distinguished by what they use and, if that is equal, by their
    order. A branch that has nothing in common with a known one is unknown.
    """
    matched: dict[Key, Key] = {}
    for path in dict.fromkeys(key[0] for key in recorded):
        here = [key for key in recorded if key[0] == path]
        there = [key for key in known if key[0] == path]
        pairs = sorted(
            ((_distance(recorded[a], known[b], a, b), a, b) for a in here for b in there), key=lambda pair: pair[0]
        )
        taken: set[Key] = set()
        for distance, a, b in pairs:
            by_order = bool(path) and len(here) == len(there) and (not recorded[a] or not known[b])
            if a not in matched and b not in taken and (distance[0] < 1 or (by_order and a[1] == b[1])):
                matched[a] = b
                taken.add(b)
        alone = [key for key in here if key not in matched]
        if path and len(here) == len(there) == 1 and alone:
            matched[here[0]] = there[0]  # If a drop path has only one use, it matches, whatever the branch uses now.
    return matched


def _distance(a: Identity, b: Identity, of: Key, to: Key) -> tuple[float, int]:
    return 1 - len(a & b) / max(len(a | b), 1), abs(of[1] - to[1])


class Paths(NamedTuple):
    """Paths of a branch's parameters: children that only branches call, and single parameters."""

    members: tuple[str, ...]
    direct: tuple[str, ...]


def paths_of(branches: Mapping[Key, CutBranch]) -> dict[Key, Paths]:
    """Paths of the parameters of each branch of a recording. A child that several branches call is part of each."""
    if not branches:
        return {}
    inner = {node for branch in branches.values() for node in branch.nodes}
    nodes = next(iter(inner)).graph.nodes
    outside = {node.target for node in nodes if node.op == "call_module" and node not in inner}
    return {key: _paths(branch, outside) for key, branch in branches.items()}


def _paths(branch: CutBranch, outside: Collection[Any]) -> Paths:
    members = [cast(str, n.target) for n in branch.nodes if n.op == "call_module" and n.target not in outside]
    direct = [cast(str, node.target) for node in branch.nodes if node.op == "get_attr"]
    return Paths(tuple(dict.fromkeys(members)), tuple(dict.fromkeys(direct)))
