"""The branches of a stochastic model, each with what the gate has to say about it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stochastic_depth.residual import GatedBranch
from stochastic_depth.retrofit import controller
from stochastic_depth.retrofit.block import BlockBranches
from stochastic_depth.retrofit.find import Branch


@dataclass(frozen=True, eq=False)
class BranchWithGate:
    """A branch of a stochastic model.

    Attributes:
        found: where it is.
        gated: its survival probability, and the rule in which that counts.
        drop_paths: of a foreign block, the paths of its drop paths; empty where additions are branches.
    """

    found: Branch
    gated: GatedBranch
    drop_paths: tuple[str, ...] = ()

    @property
    def test_factor(self) -> float:
        """What the branch is multiplied by in evaluation: p with `rescale="eval"`, else 1."""
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
