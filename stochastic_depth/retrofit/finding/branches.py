"""The branches that are found in a model, and notes of what is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.finding.example import Example
from stochastic_depth.retrofit.rewriting.sums import (
    DropPaths,
    Identity,
    Key,
)
from stochastic_depth.retrofit.rules import DropPathRule

Where = Callable[[str, nn.Module], bool] | str | Sequence[str]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Branch:
    """One residual branch of a model.

    Attributes:
        name: its name, see `make_stochastic_`.
        module: the module whose class is swapped: the block that holds the branch, or its drop path.
        block_name: name of that module.
        parts: the module that holds the branch's parameters.
        named: the module that the name refers to.
        key: which of the block's branches it is; None if the module has only one.
        rule: rule of the model's own drop path; None if there is none.
        treatment: whether a closed gate skips it or only masks its output.
        cause: why it is masked.
        kind: whether it is an operand of a sum or a whole layer.
        drop_paths: for a layer, the drop paths inside, which its gate replaces.
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
    """The branches of a model in the order of `model.named_modules()`, or of the calls of an example.

    Attributes:
        branches: the branches that pass the filter.
        known: for each block, all of its branches, and what identifies each.
        drop_paths: for each block, the paths of its drop paths; empty if the branches are additions.
        notes: what was found but is not a branch, for `print(depth)`.
        example: the example, if there is one.
    """

    branches: list[Branch] = field(default_factory=list[Branch])
    known: dict[nn.Module, dict[Key, Identity]] = field(default_factory=dict[nn.Module, "dict[Key, Identity]"])
    drop_paths: dict[nn.Module, DropPaths] = field(default_factory=dict[nn.Module, DropPaths])
    notes: list[str] = field(default_factory=list[str])
    example: Example | None = None


def not_looked_into(block: nn.Module, name: str, error: TraceError) -> str:
    """The note of a block whose code cannot be read."""
    twice = "; if it skips layers by them, these are dropped twice" if "random numbers" in str(error) else ""
    return f"{name or 'the model'} ({type(block).__name__}): not looked into, {error}{twice}"
