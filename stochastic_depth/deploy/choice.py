"""Chooses the branches that a smaller network keeps: the order of removal, and a budget for how many."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stochastic_depth.copies import evaluating_
from stochastic_depth.cost import all_gates_open, observed, undisturbed
from stochastic_depth.deploy.batches import arguments_of
from stochastic_depth.deploy.branches import BranchWithGate
from stochastic_depth.gate_draws import GateDraws, Observer
from stochastic_depth.retrofit.layers import with_first
from stochastic_depth.retrofit.remembered import Call
from stochastic_depth.torch_private import tree_leaves

Order = Literal["last", "survival", "lesion"]


def removal_order(
    model: nn.Module, branches: Sequence[BranchWithGate], order: Order, calibration: Iterable[Any] | None
) -> list[int]:
    """Indices of the branches in the order of removal.

    Raises:
        ValueError: if the order needs data and none are given.
    """
    last_first = list(reversed(range(len(branches))))
    if order == "last":
        return last_first
    if order == "survival":
        return sorted(last_first, key=lambda index: branches[index].gated.survival_prob)
    if calibration is None:
        raise ValueError("order='lesion' needs calibration: batches of data on which the change is measured.")
    change = lesions(model, branches, calibration)
    return sorted(last_first, key=lambda index: change[index])


@torch.no_grad()
def lesions(model: nn.Module, branches: Sequence[BranchWithGate], calibration: Iterable[Any]) -> list[float]:
    """How much the outputs change if a single branch is removed from the evaluated network (Veit et al. 2016).

    Returns:
        For each branch, the sum of the squared differences of all outputs, per sample.

    Raises:
        ValueError: if there is no batch.
    """
    draws = branches[0].gated.passes
    change, num_samples = [0.0] * len(branches), 0
    with undisturbed(model):
        evaluating_(model)
        for batch in calibration:
            args, kwargs = arguments_of(batch, model)
            whole = _values(model(*args, **kwargs))
            num_samples += len(whole[0])
            for index, branch in enumerate(branches):
                if branch.found.treatment == "mask":
                    change[index] = float("inf")
                    continue
                with observed(draws, dropping(branches, [index])):
                    lesioned = _values(model(*args, **kwargs))
                change[index] += sum(
                    float((one - other).double().square().sum()) for one, other in zip(lesioned, whole, strict=True)
                )
    if not num_samples:
        raise ValueError("calibration holds no batch: there is nothing to measure the change on.")
    return [each / num_samples for each in change]


def _values(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def dropping(branches: Sequence[BranchWithGate], dropped: Collection[int]) -> Observer:
    """Observer that makes some branches return zero, and whole layers return their input."""

    def run(index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        output = branch(x)
        if index not in dropped:
            return output
        if branches[index].found.kind != "layer":
            return torch.zeros_like(output)
        # A copy: later code may change it in place.
        hidden = x[0].clone()
        return with_first(output, hidden)

    return run


class Budget:
    """The remaining cost of a network without some of its branches.

    Args:
        total: cost of the whole network.
        remaining: returns the cost without the branches of these indices.
        what: name of the counted quantity, for messages.
    """

    def __init__(self, total: int, remaining: Callable[[Collection[int]], int], what: str) -> None:
        self._total = total
        self._remaining = remaining
        self._what = what

    def keep(self, share: float, removal: Sequence[int], branches: Sequence[BranchWithGate]) -> list[int]:
        """The branches that remain after removing others in this order until at most `share` of the cost is left.

        At least one branch remains, and those that cannot be removed.

        Raises:
            ValueError: if `share` is not in (0, 1], or if even the smallest network costs more.
        """
        if not 0 < share <= 1:
            raise ValueError(f"{self._what} must be a share of the whole network's in (0, 1], but is {share}.")
        droppable = [index for index in removal if branches[index].found.treatment != "mask"]
        if len(droppable) == len(branches):
            droppable.pop()  # at least one branch must remain
        dropped: set[int] = set()
        for index in [None, *droppable]:
            if index is not None:
                dropped.add(index)
            if self._remaining(dropped) <= share * self._total:
                return [index for index in range(len(branches)) if index not in dropped]
        smallest = self._remaining(dropped) / self._total
        raise ValueError(
            f"{self._what}={share:g} is below the smallest possible network, which has {smallest:.4g} of the whole: "
            f"{len(branches) - len(dropped)} of {len(branches)} branches, and everything outside them."
        )


def forward_flops(model: nn.Module, draws: GateDraws, call: Call) -> Budget:
    """The budget in FLOPs of a forward on an example, in evaluation."""
    own: dict[int, int] = {}
    outer: dict[int, tuple[int, ...]] = {}
    inside: list[int] = []
    counter = FlopCounterMode(display=False)

    def run(index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        outer[index] = tuple(inside)
        inside.append(index)
        before = counter.get_total_flops()
        output = branch(x)
        flops = counter.get_total_flops() - before
        inside.pop()
        own[index] = own.get(index, 0) + flops
        if inside:
            own[inside[-1]] = own.get(inside[-1], 0) - flops
        return output

    # With gradients: under no_grad, a view of a parameter still requires them, and the counter looks for their
    # function.
    with undisturbed(model), torch.enable_grad(), all_gates_open(draws), observed(draws, run), counter:
        evaluating_(model)
        model(*call[0], **call[1])
    total = counter.get_total_flops()

    def remaining(dropped: Collection[int]) -> int:
        return total - sum(
            flops for index, flops in own.items() if index in dropped or any(each in dropped for each in outer[index])
        )

    return Budget(total, remaining, "cost")


def num_parameters(model: nn.Module, branches: Sequence[BranchWithGate]) -> Budget:
    """The budget in parameters."""
    holders: dict[nn.Parameter, set[int]] = {parameter: set() for parameter in model.parameters()}
    inside: dict[nn.Module, set[int]] = {}
    for index, branch in enumerate(branches):
        members = set(branch.found.parts.parameters())
        for parameter in members:
            holders[parameter].add(index)
        for module in branch.found.parts.modules():
            inside.setdefault(module, set()).add(index)
    # Parameters that a module outside all branches uses too are removed with none of them.
    direct = {id(parameter) for branch in branches for parameter in branch.found.parts.parameters()}
    for module in model.modules():
        if module not in inside:
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in direct:
                    holders[parameter].add(-1)
    total = sum(parameter.numel() for parameter in holders)

    def remaining(dropped: Collection[int]) -> int:
        return sum(parameter.numel() for parameter, by in holders.items() if not by <= set(dropped))

    return Budget(total, remaining, "parameters")
