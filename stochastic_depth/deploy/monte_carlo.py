"""What a network does not know: predictions of random sub-networks, their mean and their disagreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stochastic_depth.copies import evaluating_
from stochastic_depth.cost import undisturbed
from stochastic_depth.deploy.branches import trained_branches
from stochastic_depth.gates import draw_counts
from stochastic_depth.retrofit import controller

Outputs = Literal["logits", "probabilities", "values"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predictions of random sub-networks, put together.

    Attributes:
        mean: (N, C, ...), mean over the sub-networks: of class probabilities, or of the outputs as they are.
        variance: (N, C, ...), their variance over the sub-networks, with num_samples - 1 in the denominator.
        entropy: (N, ...), entropy of the mean in nats: all that is uncertain. None for "values".
        mutual_information: (N, ...), of the class and the sub-network, in nats: the part of the entropy that comes from
            the sub-networks' disagreement (Houlsby et al. 2011). None for "values".
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None


@torch.no_grad()
def monte_carlo(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    num_samples: int = 32,
    *,
    outputs: Outputs = "logits",
    seed: int = 0,
) -> Prediction:
    """Predict with random sub-networks of a model trained with stochastic depth.

    Each of `num_samples` sub-networks is drawn as in training, with the survival probabilities and the scaling of
    training, and serves the whole batch; everything else is in evaluation mode: BatchNorm uses its running statistics,
    dropout is off. All inputs meet the same sub-networks, so that the result does not depend on how they are batched.
    With Bernoulli draws this samples an approximate posterior as Monte Carlo dropout does (Gal and Ghahramani 2016).

    Args:
        model: a stochastic model, not folded; neither its modes nor its gates' counter change.
        inputs: the argument of a forward, or several in a tuple.
        num_samples: number of sub-networks, at least 2.
        outputs: what the model gives. "logits": a softmax over dimension 1 makes probabilities of it.
            "probabilities": of classes, over dimension 1. "values": anything else.
        seed: of the sub-networks, whatever the model was trained with.

    Returns:
        Mean, variance, entropy and mutual information.

    Raises:
        ValueError: if the model is not stochastic, or an argument is not one of those allowed.
        TypeError: if the model's output is no tensor and has no attribute `logits`.

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
    passes = trained_branches(model)[0].gated.passes
    arguments: Sequence[Any] = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    mean = deviations = entropy = None
    with undisturbed(model):
        evaluating_(model)
        for number in range(num_samples):
            gates = draw_counts(
                passes.survival_probs, 1, seed=seed, counter=number, draw=passes.draw, costs=passes.costs
            )
            with depth.gates([bool(gate) for gate in gates]):
                predicted = _tensor(model(*arguments))
            predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
            if outputs == "logits":
                predicted = predicted.softmax(1)
            if mean is None or deviations is None:
                mean, deviations = torch.zeros_like(predicted), torch.zeros_like(predicted)
            # Welford's recurrence: no difference of two large sums.
            step = predicted - mean
            mean += step / (number + 1)
            deviations += step * (predicted - mean)
            if outputs != "values":
                own = _entropy(predicted)
                entropy = own if entropy is None else entropy + own
    assert mean is not None
    assert deviations is not None
    variance = deviations / (num_samples - 1)
    if entropy is None:
        return Prediction(mean, variance, None, None)
    total = _entropy(mean)
    # Never below 0 but by rounding (Jensen).
    return Prediction(mean, variance, total, (total - entropy / num_samples).clamp(min=0))


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def _tensor(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(f"The model's output must be a tensor, or have the attribute logits, but is {type(output)}.")
    return found
