"""Reads the branches of a block from the recordings of its code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import fx, nn

from stochastic_depth.retrofit.errors import CutError
from stochastic_depth.retrofit.finding.example import Example
from stochastic_depth.retrofit.finding.ways import ways
from stochastic_depth.retrofit.rewriting.cuts import Sum, cut
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL, put_functional, scaled_value
from stochastic_depth.retrofit.rewriting.operations import (
    computes,
    descendants,
    is_plain,
)
from stochastic_depth.retrofit.rewriting.sums import (
    BranchParts,
    Identity,
    Key,
    additions_of,
    calls_of,
    find_sums,
    identity,
    inlined_of,
    match,
    paths_of,
)
from stochastic_depth.retrofit.rewriting.unclear_sums import unclear_sums
from stochastic_depth.retrofit.rules import DropPathRule


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
    drops_plain: bool = False
    """Whether the drop path is given a value that nothing worth skipping has computed."""


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
    undropped: list[fx.Graph] = []
    for recording in ways(block, inlined_of(drop_paths), example):
        functions = put_functional(recording.graph, block)
        if functional is not None:
            functional.update({(FUNCTIONAL, index): each.rule for index, each in enumerate(functions)})
            undropped += () if functions else (recording.graph,)
        called.update(dict.fromkeys(node.target for node in recording.graph.nodes if node.op == "call_module"))
        sums = find_sums(recording.graph, block, drop_paths)
        calls = calls_of(recording.graph, drop_paths)
        identities = {key: identity(residual, block) for key, residual in sums.items()}
        branches = {key: cut(each, block) for key, each in sums.items() if not isinstance(each, CutError)}
        if left is not None and not drop_paths:
            gated = {node for branch in branches.values() for node in branch.nodes}
            gated |= {each.add for each in sums.values() if isinstance(each, Sum)}
            left.update(dict.fromkeys(unclear_sums(recording.graph, block, gated)))
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
            drops_plain = key in calls and all(is_plain(each, block) for each in calls[key].all_input_nodes)
            if isinstance(residual, CutError):
                readings[known] = BranchReading(
                    readings[known].identity if known in readings else frozenset(), residual, drops_plain=drops_plain
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
                    drops_plain,
                )
            elif isinstance(parts := readings[known].parts, BranchParts):
                joined = [tuple(dict.fromkeys([*a, *b])) for a, b in zip(parts.paths, paths[key], strict=True)]
                readings[known] = readings[known]._replace(
                    identity=readings[known].identity | identities[key], parts=BranchParts(block, *joined)
                )
    if functional:
        for graph in undropped:
            _find_scaled(graph, block, readings, functional)
    return dict(sorted(readings.items(), key=lambda item: item[0][1])), called


def _find_scaled(
    graph: fx.Graph, block: nn.Module, readings: Mapping[Key, BranchReading], functional: dict[Key, DropPathRule]
) -> None:
    """Change the rules of functional drop paths whose branches the code multiplies by p in evaluation: the paper's."""
    known = {key: readings[key].identity for key, rule in functional.items() if key in readings and rule.drop_rate < 1}
    for key, (_, residual) in additions_of(graph, block, known).items():
        keep = 1 - functional[key].drop_rate
        if not isinstance(residual, CutError) and scaled_value(residual.output, keep) is not None:
            functional[key] = replace(functional[key], rescale="eval")


def _free_key(key: Key, readings: Mapping[Key, BranchReading]) -> Key:
    """The key of a new branch: its own place in the code, or after all others if that is taken."""
    taken = [index for path, index in readings if path == key[0]]
    return key if key[1] not in taken else (key[0], max(taken) + 1)
