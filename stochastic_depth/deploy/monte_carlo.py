"""Uncertainty from predictions of random subnetworks: their mean and their disagreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stochastic_depth.copies import evaluating_
from stochastic_depth.cost import observed, undisturbed
from stochastic_depth.deploy.batches import Inputs, call_of
from stochastic_depth.deploy.branches import BranchWithGate, branches_with_gates
from stochastic_depth.gates import draw_counts
from stochastic_depth.retrofit import controller
from stochastic_depth.retrofit.rewriting.sums import BranchParts

Outputs = Literal["logits", "probabilities", "values"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Combined predictions of random subnetworks.

    Attributes:
        mean: (N, C, ...), mean over the subnetworks: of class probabilities, or of the outputs as they are.
        variance: (N, C, ...), variance over the subnetworks, with num_samples - 1 in the denominator.
        entropy: (N, ...), entropy of the mean in nats: the total uncertainty. None for "values".
        mutual_information: (N, ...), of the class and the subnetwork, in nats: the part of the entropy that comes from
            the subnetworks' disagreement (Houlsby et al. 2011). None for "values".
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None


@torch.no_grad()
def monte_carlo(
    model: nn.Module,
    inputs: Inputs,
    num_samples: int = 32,
    *,
    outputs: Outputs = "logits",
    seed: int = 0,
) -> Prediction:
    """Predict with random subnetworks of a model trained with stochastic depth.

    Each of the `num_samples` subnetworks is drawn as in training, with the survival probabilities and the scaling of
    training, and predicts the whole batch. Everything else is in evaluation mode: BatchNorm uses its running
    statistics, and dropout is off. All inputs see the same subnetworks, so the result does not depend on how they are
    batched. With Bernoulli draws this samples an approximate posterior, as Monte Carlo dropout does (Gal and Ghahramani
    2016).

    Args:
        model: a stochastic model, not folded; neither its modes nor its gates' counter change.
        inputs: the argument of a forward, several in a tuple, or a mapping of arguments by name.
        num_samples: number of subnetworks, at least 2.
        outputs: what the model returns. "logits": a softmax over dimension 1 turns them into probabilities.
        "probabilities": of classes, over dimension 1. "values": anything else.
        seed: seed of the subnetworks, independent of the seed of the training.

    Returns:
        Mean, variance, entropy and mutual information.

    Raises:
        ValueError: if the model is not stochastic, or an argument is not one of the allowed values.
        TypeError: if the model's output is not a tensor and has no attribute `logits`.
        RuntimeError: if gates have no effect in evaluation, because their drop paths are called in training only.

    Example:
        >>> import stochastic_depth as sd
        >>> net = sd.models.cifar_resnet(20)
        >>> depth = sd.make_stochastic_(net, sd.linear_decay(0.5))
        >>> prediction = monte_carlo(net, torch.randn(4, 3, 32, 32), num_samples=8)
        >>> prediction.mean.shape, bool((prediction.mutual_information <= prediction.entropy).all())
        (torch.Size([4, 10]), True)
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
        raise ValueError(f"num_samples must be a whole number of at least 2, but is {num_samples!r}.")
    if outputs not in get_args(Outputs):
        raise ValueError(f"outputs must be one of {', '.join(map(repr, get_args(Outputs)))}, but is {outputs!r}.")
    depth = controller(model)
    branches = branches_with_gates(model)
    draws = branches[0].gated.passes
    args, kwargs = call_of(inputs)
    mean = deviations = entropy = None
    with undisturbed(model):
        evaluating_(model)
        watch = _Watch(branches)
        for number in range(num_samples):
            gates = draw_counts(draws.survival_probs, 1, seed=seed, counter=number, draw=draws.draw, costs=draws.costs)
            watch.opened(gates)
            with depth.gates([bool(gate) for gate in gates]), watch.watching():
                predicted = _tensor(model(*args, **kwargs))
            predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
            if outputs == "logits":
                predicted = predicted.softmax(1)
            if mean is None or deviations is None:
                mean, deviations = torch.zeros_like(predicted), torch.zeros_like(predicted)
            # Welford's recurrence avoids the difference of two large sums.
            step = predicted - mean
            mean += step / (number + 1)
            deviations += step * (predicted - mean)
            if outputs != "values":
                own = _entropy(predicted)
                entropy = own if entropy is None else entropy + own
    assert mean is not None
    assert deviations is not None
    variance = deviations / (num_samples - 1)
    if bypassed := watch.bypassed(all_agree=not variance.any()):
        raise _no_gates(model, bypassed)
    if entropy is None:
        return Prediction(mean, variance, None, None)
    total = _entropy(mean)
    # Below 0 only by rounding (Jensen's inequality).
    return Prediction(mean, variance, total, (total - entropy / num_samples).clamp(min=0))


class _Watch:
    """Observes which branches run and which of them have used their gates.

    Args:
        branches: the branches of the model.
    """

    def __init__(self, branches: Sequence[BranchWithGate]) -> None:
        self._branches = branches
        self._open: set[int] = set()
        self._asked: set[int] = set()
        self._ran: set[int] = set()
        self._members: list[set[nn.Module]] = []
        for branch in branches:
            parts = branch.found.parts
            members = set(parts.members) if isinstance(parts, BranchParts) else {parts}
            # A whole layer reads its gate inside its call.
            self._members.append(set() if branch.found.kind == "layer" else members)

    @contextmanager
    def watching(self) -> Generator[None]:
        """Context that observes forwards of the model."""
        # A module that several branches use does not show which of them called it.
        num_branches = Counter(member for members in self._members for member in members)
        hooks = [
            member.register_forward_pre_hook(partial(self._called, index))
            for index, members in enumerate(self._members)
            for member in members
            if num_branches[member] == 1
        ]
        try:
            with observed(self._branches[0].gated.passes, self._run_branch):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _called(self, index: int, _module: nn.Module, _args: Any) -> None:
        self._ran.add(index)

    def _run_branch(self, index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        self._asked.add(index)
        return branch(x)

    def opened(self, gates: Sequence[int]) -> None:
        """Record which gates were open in a forward."""
        self._open.update(index for index, gate in enumerate(gates) if gate)

    def bypassed(self, *, all_agree: bool) -> list[str]:
        """Names of the branches that may close but ran without using their gates.

        Args:
            all_agree: whether all subnetworks gave the same outputs. Then open branches that did not use their gates
                count too, because it is unknown whether they ran.
        """
        return [
            branch.found.name
            for index, branch in enumerate(self._branches)
            if branch.gated.survival_prob < 1
            and index not in self._asked
            and (index in self._ran or (all_agree and index in self._open and not self._members[index]))
        ]


def _no_gates(model: nn.Module, names: Sequence[str]) -> RuntimeError:
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return RuntimeError(
        f"monte_carlo cannot draw subnetworks of {type(model).__name__}: in evaluation {len(names)} of its branches "
        f"({some}) run without their drop paths, so their gates have no effect. Call the drop path in evaluation too, "
        "where it changes nothing, or write the sum as Residual(branch, shortcut)."
    )


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def _tensor(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(f"The model's output must be a tensor, or have the attribute logits, but is {type(output)}.")
    return found
