"""Finds the residual additions in the code of a model's modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.other_methods import other_methods
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.finding.branches import CONTAINERS, Branch, Found, not_looked_into
from stochastic_depth.retrofit.finding.inlined import inlined_in
from stochastic_depth.retrofit.finding.readings import BranchReading, read
from stochastic_depth.retrofit.rewriting.sums import (
    BranchParts,
    DropPaths,
    Key,
)


def find_additions(model: nn.Module, found: Found) -> None:
    """Add the residual additions of a model to what was found in it, and notes of sums that are none."""
    blocks: dict[str, tuple[nn.Module, tuple[str, ...], dict[Key, BranchReading]]] = {}
    read_elsewhere = set[str]()
    for name, block in model.named_modules():
        if type(block) in CONTAINERS or not _may_add(block) or name in read_elsewhere:
            continue
        try:
            inlined = inlined_in(block, found.example, name, found.notes)
            read_elsewhere |= {f"{name}.{path}".strip(".") for path in inlined}
            left: dict[str, None] = {}
            readings, _ = read(block, DropPaths(inlined=inlined), None, found.example, left)
            found.notes += [
                f"{name or 'the model'} ({type(block).__name__}): an addition has no gate, {r}" for r in left
            ]
        except TraceError as error:
            found.notes.append(not_looked_into(block, name, error))
            continue
        if readings:
            blocks[name] = block, inlined, readings
    around = [name for name, (_, _, readings) in blocks.items() if any(each.is_around for each in readings.values())]
    for name, (block, _, readings) in blocks.items():
        if not any(_adds_outputs(name, reading, blocks, around) for reading in readings.values()):
            continue
        for key in [key for key, reading in readings.items() if reading.is_projected]:
            del readings[key]
            found.notes.append(
                f"{name or 'the model'} ({type(block).__name__}): an addition has no gate, it joins outputs of layers "
                "and of a network with branches of its own"
            )
    _keep_outermost(blocks, found)
    blocks = {name: each for name, each in blocks.items() if each[2]}
    inside: set[str] = set()
    for name, (_, _, readings) in blocks.items():
        for reading in readings.values():
            assert isinstance(reading.parts, BranchParts)
            members = {f"{name}.{path}".strip(".") for path in reading.parts.paths.members}
            # A sum around a whole network, as of a denoiser, says nothing of the blocks of the network.
            if not any(_lies_in(other, members) for other in around):
                inside |= members
    for name, (block, inlined, readings) in blocks.items():
        paths = [each.parts.paths for each in readings.values() if isinstance(each.parts, BranchParts)]
        if others := other_methods(block, [path for each in paths for path in (*each.members, *each.direct)]):
            found.notes.append(
                f"{name or 'the model'} ({type(block).__name__}): {' and '.join(others)}, if you call "
                f"{'them' if len(others) > 1 else 'it'} yourself, run without gates, which only the forward has"
            )
        if _lies_in(name, inside) and not any(reading.is_around for reading in readings.values()):
            # LoRA's product beside the base layer, the scan of a state space model: sums without a shortcut.
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


def _keep_outermost(
    blocks: Mapping[str, tuple[nn.Module, tuple[str, ...], dict[Key, BranchReading]]], found: Found
) -> None:
    """Keep one of several readings of a sum: of code that an outer block calls past the inner block's forward.

    So do models whose layers are called by other names (`layer.forward_parallel(x)`).
    """
    first: dict[frozenset[str], str] = {}
    for name, (block, _, readings) in blocks.items():
        for key, reading in list(readings.items()):
            assert isinstance(reading.parts, BranchParts)
            paths = reading.parts.paths
            of = frozenset(f"{name}.{path}".strip(".") for path in (*paths.members, *paths.direct))
            outer = first.setdefault(of, name)
            if outer != name and _lies_in(name, [outer]) | (not outer):
                del readings[key]
                found.notes.append(
                    f"{name} ({type(block).__name__}): {outer or 'the model'} runs the code of a branch itself"
                )


def _adds_outputs(name: str, reading: BranchReading, blocks: Collection[str], around: Collection[str]) -> bool:
    """Whether a sum joins outputs of a model, such as those of a wide and a deep part, of two heads, or two losses.

    The side with fewer layers looks like the projection of a shortcut. But beside a projection there are a few layers,
    with at most one addition somewhere in them (EfficientFormerV2's queries), no network of residual blocks. And the
    last sum of a model that has its blocks elsewhere is none of them. Where one sum joins outputs, those with other
    projections do too: in a recommender, several parts make one score.
    """
    if not reading.is_projected:
        return False
    assert isinstance(reading.parts, BranchParts)
    members = {f"{name}.{path}".strip(".") for path in reading.parts.paths.members}
    inside = [other for other in around if _lies_in(other, members)]
    if len(inside) > 1 or any(other in members for other in inside):
        return True
    return not name and reading.is_last and len(blocks) > 1


def _lies_in(name: str, modules: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[: index + 1]) in modules for index in range(len(parts)))


def _may_add(block: nn.Module) -> bool:
    """Whether a module may hold residual additions: it has children, or works with parameters of its own."""
    if any(block.children()):
        return True
    return next(block.parameters(recurse=False), None) is not None and not plain_class(block).__module__.startswith(
        "torch.nn."
    )
