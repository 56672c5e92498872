"""What keeps a branch's factor where no weights can take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.residual import Residual


class Scale(nn.Module):
    """Multiplies by a number. It takes the place of a drop path and has no state of its own.

    Args:
        factor: the number.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The product. x: (...)."""
        return x * self.factor

    def extra_repr(self) -> str:
        """The number, for `print`."""
        return f"{self.factor:g}"


class ScaledResidual(Residual):
    """The sum of a shortcut and a scaled branch, `shortcut(x) + branch_factor * branch(x)`."""

    branch_factor: float

    def forward(self, x: Tensor) -> Tensor:
        """The sum. x: (N, ...)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return torch.add(shortcut, self.branch(x), alpha=self.branch_factor)


class ScaledLayer(nn.Module):
    """Behaviour of a whole layer that is a scaled branch: input + branch_factor * (layer(input) - input)."""

    branch_factor: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns, its first value scaled about the hidden states, the first tensor it is given."""
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        output = super().forward(*args, **kwargs)
        own = output[0] if isinstance(output, (tuple, list)) else output
        scaled = torch.add(hidden, own - hidden, alpha=self.branch_factor)
        return type(output)([scaled, *output[1:]]) if isinstance(output, (tuple, list)) else scaled
