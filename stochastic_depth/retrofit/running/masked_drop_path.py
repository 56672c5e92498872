"""Drop paths in a block that runs its own code: they mask with the controller's gates, one per use."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.residual import GatedBranch, masked
from stochastic_depth.retrofit.rules import RATES, DropPathRule, does_otherwise, drop_path_rule

# Number of calls of each drop path of the block whose own code is running.
_running: ContextVar[tuple[nn.Module, dict[int, int]] | None] = ContextVar("_running", default=None)


@contextmanager
def own_code(block: nn.Module, drop_paths: Mapping[nn.Module, GatedBranch]) -> Generator[None]:
    """Context in which a block's own code runs, and calls of its drop paths are counted.

    Raises:
        RuntimeError: in evaluation, if the code does not call a drop path whose gate would do something.
    """
    uses: dict[int, int] = {}
    token = _running.set((block, uses))
    try:
        yield
    finally:
        _running.reset(token)
    for drop_path, branch in () if block.training else drop_paths.items():
        if id(drop_path) not in uses and (branch.rescale == "eval" or branch.passes.forced):
            raise RuntimeError(
                f"{branch.passes.names[branch.index]} is masked, and its block calls the drop path in training only: "
                "its gate has no effect in evaluation. Call the drop path in evaluation too, where it does nothing, or "
                "use rescale='train' and no forced gates in evaluation."
            )


_passing: ContextVar[bool] = ContextVar("_passing", default=False)


@contextmanager
def passing_drop_paths() -> Generator[None]:
    """Context in which drop paths return their input."""
    token = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(token)


@dataclass
class DropPathUses:
    """The gates of a drop path, one per use in a call of its block.

    Attributes:
        gated: the gates in the order of the uses, each with its block.
        rule: its rule at the last check.
        own_rate: whether the branches use this rate; a schedule ignores it.
    """

    rule: DropPathRule | None
    own_rate: bool
    gated: list[tuple[nn.Module, GatedBranch]] = field(default_factory=list["tuple[nn.Module, GatedBranch]"])


class StochasticDropPath(nn.Module):
    """Behavior of a drop path in a block that runs its own code: it masks with the controller's gates."""

    _stochastic_depth_branch: DropPathUses

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The samples `x` (N, ...) times their gates."""
        if any(isinstance(value, float) for value in (*args, *kwargs.values())):
            raise RuntimeError(
                f"The {plain_class(self).__name__} is called with a number, which would be its rate, but its gates "
                "have the rate from its attribute. Set the rate as an attribute."
            )
        if _passing.get():
            return x
        own, running = self._stochastic_depth_branch, _running.get()
        number = 0
        gated = [branch for _, branch in own.gated]
        if running is not None:
            block, uses = running
            # A drop path that several blocks share has separate gates in each of them.
            gated = [branch for holder, branch in own.gated if holder is block] or gated
            number = uses.get(id(self), 0)
            uses[id(self)] = number + 1
        elif len(gated) > 1:
            if not self.training and not gated[0].passes.forced and gated[0].rescale != "eval":
                return x
            raise RuntimeError(
                f"The drop path of {gated[0].passes.names[gated[0].index]} serves several branches, but is called "
                "outside its block, where it is unknown which one."
            )
        if number >= len(gated):
            raise RuntimeError(
                f"The drop path of {gated[0].passes.names[gated[0].index]} is used {number + 1} times in a call of its "
                f"block, in whose code {len(gated)} uses were found: it has no gates for the others. "
                "Give make_stochastic_ inputs=[...] of an example, which shows how often it is used."
            )
        return masked(gated[number], x, training=self.training)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in ("training", "__class__", "_stochastic_depth_branch") and (
            "_stochastic_depth_branch" in self.__dict__
        ):
            follow_rule(self, try_again=name not in RATES)


def follow_rule(drop_path: nn.Module, *, try_again: bool = True) -> None:
    """Let the gates of a drop path follow its rate, because recipes change it in training.

    Args:
        drop_path: the drop path.
        try_again: whether something besides its rate may have changed.

    Raises:
        RuntimeError: if anything else about it has changed, or if the survival probabilities come from a schedule.
        ValueError: if the rate is not in [0, 1).
    """
    own = cast(DropPathUses, drop_path.__dict__["_stochastic_depth_branch"])
    reason = does_otherwise(drop_path, again=try_again)
    rule = drop_path_rule(drop_path)
    branches = [branch for _, branch in own.gated]
    draws = branches[0].passes
    name = draws.names[branches[0].index]
    if reason:
        raise RuntimeError(
            f"The drop path of {name} was changed, and its gates cannot follow: {reason}. Register its class with "
            "register_drop_path, and a rule that reads all attributes that its rate depends on."
        )
    if rule is not None and own.rule is not None and replace(rule, drop_rate=0.0) != replace(own.rule, drop_rate=0.0):
        raise RuntimeError(
            f"The drop path of {name} was changed from {own.rule} to {rule}, which its gates cannot follow: change it "
            "before make_stochastic_."
        )
    rate, before = (0.0 if each is None else each.drop_rate for each in (rule, own.rule))
    if rate == before:
        return
    if not own.own_rate:
        raise RuntimeError(
            f"The rate of the drop path {name} has no effect: the survival probabilities come from a schedule. Change "
            "them with controller(model).set_survival_probs."
        )
    if not 0 <= rate < 1:
        raise ValueError(f"The drop rate of {name} must be in [0, 1), but is {rate:g}.")
    own.rule = rule
    survival_probs = list(draws.survival_probs)
    for branch in branches:
        survival_probs[branch.index] = 1 - rate
    draws.survival_probs = tuple(survival_probs)
    draws.end_parts()
