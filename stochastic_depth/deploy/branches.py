"""The branches of a stochastic model, each with its gate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stochastic_depth.residual import GatedBranch
from stochastic_depth.retrofit import controller
from stochastic_depth.retrofit.finding.branches import Branch
from stochastic_depth.retrofit.running.block_branches import BlockBranches


@dataclass(frozen=True, eq=False)
class BranchWithGate:
    """A branch of a stochastic model.

    Attributes:
        found: its place in the model.
        gated: its survival probability and scaling.
        drop_paths: for a block of another library, the paths of its drop paths; empty if the branches are additions.
    """

    found: Branch
    gated: GatedBranch
    drop_paths: tuple[str, ...] = ()

    @property
    def test_factor(self) -> float:
        """The factor of the branch in evaluation: p with `rescale="eval"`, else 1."""
        return self.gated.survival_prob if self.gated.rescale == "eval" else 1.0


def branches_with_gates(model: nn.Module) -> list[BranchWithGate]:
    """The branches of a stochastic model, in the order of its controller's names.

    Raises:
        ValueError: if the model is not stochastic.
    """
    branches: list[BranchWithGate] = []
    for found in controller(model).branches:
        own: GatedBranch | BlockBranches = found.module._stochastic_depth_branch  # pyright: ignore
        if isinstance(own, BlockBranches):
            assert found.key is not None
            branches.append(BranchWithGate(found, own.gated[found.key], own.drop_paths))
        else:
            branches.append(BranchWithGate(found, own))
    return branches
