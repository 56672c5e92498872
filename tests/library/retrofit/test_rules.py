"""Modules that are named like drop paths but do something else stay as they are, and `print` says so."""

from __future__ import annotations

import random

import pytest
import torch
from plain_blocks import D, DropPath
from torch import Tensor, nn

import stochastic_depth as sd


class GainedDropPath(DropPath):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gamma * x)


class UndividedDropPath(DropPath):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.noise(x) * (1 - self.drop_prob) if self.training else x


class TokenDropPath(DropPath):
    def noise(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], 1).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class BatchDropPath(DropPath):
    def noise(self, x: Tensor) -> Tensor:
        return x.new_empty([1] * x.dim()).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class DroppingDropPath(DropPath):
    """Drops in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.noise(x)


class StochasticDepth(nn.Module):
    """A wrapper of a whole layer."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.p = nn.Linear(D, D), 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < self.p:
            return x
        return x + self.module(x)


class Block(nn.Module):
    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__()
        self.f, self.drop_path = nn.Linear(D, D), drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


OTHERWISE = {
    GainedDropPath: "it has modules or parameters of its own",
    UndividedDropPath: "what it keeps is not multiplied by 2",
    TokenDropPath: "it drops single values of a sample",
    BatchDropPath: "it drops whole mini-batches",
    DroppingDropPath: "it changes what it is given in evaluation",
}


@pytest.mark.parametrize("kind", OTHERWISE, ids=lambda kind: kind.__name__)
def test_what_is_no_drop_path_stays_as_it_is(kind: type[DropPath]) -> None:
    torch.manual_seed(0)
    other = Block(kind())
    net, x = nn.Sequential(Block(DropPath()), other), torch.randn(8, 3, D)
    before, python = torch.get_rng_state(), random.getstate()
    depth = sd.make_stochastic_(net)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert list(depth.names) == ["0.drop_path"]
    assert f"1.drop_path ({kind.__name__}): it stays as it is, {OTHERWISE[kind]}" in str(depth)
    with depth.gates([torch.ones(8, dtype=torch.bool)]):
        torch.manual_seed(1)
        ours = net(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, other(x + 2 * net[0].f(x)))


def test_a_wrapper_called_stochastic_depth_is_not_a_drop_path() -> None:
    net, x = nn.Sequential(Block(DropPath()), StochasticDepth()).eval(), torch.randn(8, 3, D)
    expected = net(x)
    depth = sd.make_stochastic_(net)
    assert list(depth.names) == ["0.drop_path"]
    assert "1 (StochasticDepth): it stays as it is, it has modules" in str(depth)
    torch.testing.assert_close(net(x), expected)


def test_a_registered_drop_path_is_not_tried_on_numbers() -> None:
    net = nn.Sequential(Block(UndividedDropPath()))
    with pytest.raises(ValueError, match="it stays as it is, what it keeps is not multiplied by 2"):
        sd.make_stochastic_(net)
    sd.register_drop_path(UndividedDropPath, lambda module: sd.DropPathRule(module.drop_prob, rescale="none"))
    depth, x = sd.make_stochastic_(net), torch.randn(8, 3, D)
    with depth.gates([torch.ones(8, dtype=torch.bool)]):
        torch.testing.assert_close(net(x), x + net[0].f(x))
