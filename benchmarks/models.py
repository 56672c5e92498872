"""Published models for the benchmarks, with random weights that make every branch count."""

from __future__ import annotations

from typing import Any

import torch
import torchvision_schemas  # noqa: F401
from torch import nn


def timm_model(name: str, **arguments: Any) -> nn.Module:
    """A model of timm, with drop paths where it can have them."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, drop_path_rate=0.2, **arguments)


def torchvision_model(name: str, **arguments: Any) -> nn.Module:
    """A model of torchvision."""
    from torchvision import models

    torch.manual_seed(0)
    return models.get_model(name, **arguments)


@torch.no_grad()
def awake(model: nn.Module) -> nn.Module:
    """In evaluation mode with random gains, biases and statistics, because many blocks output zero at first."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
            parameter.normal_(0.7 if name.endswith(("weight", "gamma")) else 0.0, 0.2, generator=generator)
        elif not parameter.any():
            parameter.normal_(0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()
