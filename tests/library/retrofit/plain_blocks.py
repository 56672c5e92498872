"""Parts of models of other authors: a drop path, linear maps, data and a comparison."""

import torch
from torch import Tensor, nn

D = 6


class DropPath(nn.Module):
    """A drop path as other authors write it."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.drop_prob = rate

    def noise(self, x: Tensor) -> Tensor:
        """0 or 1 / p for each sample of `x` (N, ...)."""
        keep = 1 - self.drop_prob
        return x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        return x * self.noise(x) if self.training else x


def linear() -> nn.Linear:
    return nn.Linear(D, D)


def data(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
