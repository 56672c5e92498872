"""What stochastic depth is compared with: dropout, dropping filters, and a penalty on filters. All are off by default.

None of them is the paper's method. Dropout gains little next to BatchNorm (Huang et al. 2016). A public explainer
describes stochastic depth as dropping filters plus the penalty below, which it is not: here both can be seen for what
they do.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab.experiments.config import Regularisers


def add_dropout_(model: nn.Module, settings: Regularisers) -> None:
    """Drop activations or filters in training, between the two convolutions of each branch, in place.

    Srivastava et al. 2014 for activations, and for filters whole channels of a sample (Tompson et al. 2015). What
    survives is divided by its survival probability. The place, after the ReLU, is that of Zagoruyko and Komodakis 2016.

    Args:
        model: with the library's `Residual`s, whose branches have a `relu` between two convolutions.
        settings: says how often activations and filters survive.
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
    """A penalty on the weights of every convolution: lambda * sum(W^2) / (sum_i sigma_i(W_i)^2 + lambda).

    sigma_i, the magnitude of filter i, is taken as its Euclidean norm. Then both sums are the same S, and what is left
    is lambda * S / (S + lambda): weight decay that fades where weights are large, with gradient
    2 W (lambda / (S + lambda))^2.

    Args:
        model: whose `Conv2d` weights count, each layer for itself.
        strength: lambda, positive.
    """
    penalties: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            total = module.weight.square().sum()
            penalties.append(strength * total / (total + strength))
    return torch.stack(penalties).sum()
