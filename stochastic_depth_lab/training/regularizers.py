"""Regularizers to compare stochastic depth with: dropout, dropped filters, and a penalty on filters. Off by default.

None of them is the paper's method. Dropout gains little with BatchNorm (Huang et al. 2016). A public explainer presents
dropped filters plus the penalty below as stochastic depth, which they are not.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab.experiments.config import Regularizers


def add_dropout_(model: nn.Module, settings: Regularizers) -> None:
    """Drop activations or filters in training, in place, after the ReLU between the two convolutions of each branch.

    Activations: Srivastava et al. 2014; whole channels of a sample: Tompson et al. 2015; the place: Zagoruyko and
    Komodakis 2016. Survivors are divided by their survival probability.
    """

    def drop(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not model.training:
            return output
        output = F.dropout(output, 1 - settings.activation_survival_prob)
        return F.dropout2d(output, 1 - settings.filter_survival_prob)

    if settings.activation_survival_prob == 1 and settings.filter_survival_prob == 1:
        return
    for module in model.modules():
        if isinstance(module, sd.Residual):
            cast("nn.Module", module.branch.relu).register_forward_hook(drop)


def filter_penalty(model: nn.Module, strength: float) -> Tensor:
    """The penalty lambda * sum(W^2) / (sum_i sigma_i(W_i)^2 + lambda), summed over the convolutions of a model.

    sigma_i, the magnitude of filter i, is its Euclidean norm. Both sums then equal S, which leaves
    lambda * S / (S + lambda): weight decay that fades for large weights, with gradient 2 W (lambda / (S + lambda))^2.

    Args:
        model: the network.
        strength: lambda, positive.
    """
    totals = [module.weight.square().sum() for module in model.modules() if isinstance(module, nn.Conv2d)]
    return torch.stack([strength * total / (total + strength) for total in totals]).sum()
