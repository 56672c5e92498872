"""Warns of what the first forward in training shows: branches that it does not reach, or in another order."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.finding.branches import Branch


def warn_of_first_pass(
    root: nn.Module, branches: Sequence[Branch], reached: Sequence[int], *, follows_depth: bool
) -> None:
    """Warn if a forward did not reach all branches, or reached them in quite another order.

    Args:
        root: the model.
        branches: its branches.
        reached: the numbers of those that were reached, in order.
        follows_depth: whether their survival probabilities depend on their order.
    """
    # What lies in another branch is not reached if that one is closed; code may also reach a part of a block.
    fine = {part for branch in branches for part in branch.parts.modules() if branch.parts is not branch.module}
    fine |= {branches[index].module for index in reached}
    missed = [branch.name for branch in branches if branch.module not in fine]
    if missed:
        some = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
        warnings.warn(
            f"{len(missed)} of {len(branches)} branches of this {plain_class(root).__name__} were not reached in "
            f"its first forward in training: {some}. Stochastic depth has no effect on them, if its code never "
            "calls their drop paths, or other methods of their blocks than forward.",
            stacklevel=5,
        )
    elif follows_depth and (moved := _moved(reached)) >= max(2, len(branches) / 4):
        warnings.warn(
            f"The branches run in another order than that of depth.names, by up to {moved} places, so the schedule "
            "does not follow the depth. Give make_stochastic_ inputs=[...] of an example, which shows the order.",
            stacklevel=5,
        )


def _moved(reached: Sequence[int]) -> int:
    """The largest distance between the places of a branch by number and by call."""
    by_number = {index: place for place, index in enumerate(sorted(reached))}
    return max(abs(by_number[index] - place) for place, index in enumerate(reached))
