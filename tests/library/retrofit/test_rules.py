"""Modules that are named like drop paths but do something else stay as they are, and `print` says so."""

from __future__ import annotations

import random
import re
import types
from typing import Any

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


class MultiplyingDropPath(DropPath):
    """Divides what it keeps only if it is told to."""

    scale_by_keep: bool

    def __init__(self) -> None:
        super().__init__()
        self.scale_by_keep = True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.scale_by_keep or not self.training else y * (1 - self.drop_prob)


class ScheduledDropPath(DropPath):
    """Its rate rises over training."""

    def __init__(self, progress: float = 0.0, *, divides: bool = True, schedule: Any = None) -> None:
        super().__init__()
        self.progress, self.divides, self.schedule = progress, divides, schedule

    def forward(self, x: Tensor) -> Tensor:
        rate = self.drop_prob * (self.progress if self.schedule is None else self.schedule.progress)
        if rate == 0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - rate)
        return x * kept / (1 - rate if self.divides else 1)


class SeldomDropPath(ScheduledDropPath):
    """Drops half as often as its rate says."""

    def __init__(self) -> None:
        super().__init__(0.5, divides=False)
        self.scale_by_keep = False


OTHERWISE = {
    GainedDropPath: "it has modules or parameters of its own",
    UndividedDropPath: "what it keeps is not multiplied by 2",
    TokenDropPath: "it drops single values of a sample",
    BatchDropPath: "it drops whole mini-batches",
    DroppingDropPath: "it changes what it is given in evaluation",
    ScheduledDropPath: "it drops nothing, where its rate is 0.5",
}


def test_a_drop_path_that_drops_less_often_than_its_rate_stays_as_it_is() -> None:
    depth = sd.make_stochastic_(nn.Sequential(Block(DropPath()), Block(SeldomDropPath())))
    assert list(depth.names) == ["0.drop_path"]
    assert re.search(r"it stays as it is, it drops 0\.[123]\d of the samples, where its rate is 0\.5", str(depth))


def test_a_drop_path_whose_rate_depends_on_more_than_its_rate_is_not_ignored() -> None:
    net = nn.Sequential(Block(ScheduledDropPath(1.0)))
    sd.make_stochastic_(net)
    net(torch.randn(4, D))
    with pytest.raises(RuntimeError, match=r"0\.drop_path was changed, and its gates cannot follow: what it keeps"):
        net[0].drop_path.progress = 0.9


def test_a_schedule_that_drop_paths_share_is_noticed() -> None:
    schedule = types.SimpleNamespace(progress=1.0)
    net = nn.Sequential(Block(ScheduledDropPath(schedule=schedule)))
    sd.make_stochastic_(net)
    net(torch.randn(4, D))
    schedule.progress = 0.5  # Noticed by the second, fourth, eighth, … call.
    with pytest.raises(RuntimeError, match="its gates cannot follow"):
        net(torch.randn(4, D))


def test_what_a_drop_path_keeps_may_not_change_later() -> None:
    net = nn.Sequential(Block(MultiplyingDropPath()))
    sd.make_stochastic_(net)
    with pytest.raises(RuntimeError, match="which its gates cannot follow: change it before make_stochastic_"):
        net[0].drop_path.scale_by_keep = False


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


def test_a_model_without_data_has_drop_paths_too() -> None:
    with torch.device("meta"):
        depth = sd.make_stochastic_(nn.Sequential(Block(DropPath()), Block(BatchDropPath())))
    assert list(depth.names) == ["0.drop_path"]


@pytest.mark.parametrize("rate", [0.0005, 0.002, 0.01, 0.3, 0.99])
def test_a_drop_path_of_any_rate_is_one(rate: float) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        assert sd.make_stochastic_(nn.Sequential(Block(DropPath(rate)))).survival_probs == [1 - rate]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"drop_rate": -0.1}, ValueError, r"drop_rate must be in \[0, 1\], but is -0\.1"),
        ({"drop_rate": "a"}, TypeError, r"drop_rate must be a number in \[0, 1\], but is 'a'"),
        (
            {"drop_rate": 0.1, "rescale": "both"},
            ValueError,
            "rescale must be one of 'eval', 'train', 'none', but is 'both'",
        ),
        ({"drop_rate": 0.1, "granularity": "row"}, ValueError, "granularity must be 'batch' or 'sample', but is 'row'"),
    ],
)
def test_bad_rules(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sd.DropPathRule(**values)


def test_bad_registrations() -> None:
    with pytest.raises(TypeError, match="cls must be a class of modules, such as DropPath, but is Identity"):
        sd.register_drop_path(nn.Identity(), lambda _: sd.DropPathRule(0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rule must be a function of a module that returns its DropPathRule"):
        sd.register_drop_path(nn.Identity, 0.5)  # type: ignore[arg-type]


def test_a_controller_is_no_model() -> None:
    net = nn.Sequential(sd.Residual(nn.Linear(3, 3)))
    depth: Any = sd.make_stochastic_(net, sd.uniform(0.5))
    for function in (sd.fold_, sd.restore_, sd.controller, lambda model: sd.subnetwork(model, [0])):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but is a Controller: pass the model"):
            function(depth)


@pytest.mark.parametrize("rate", [[0.5], "half", torch.ones(2)])
def test_a_rate_that_is_no_number_is_named(rate: object) -> None:
    drop_path = DropPath()
    drop_path.drop_prob = rate
    with pytest.raises(ValueError, match=r"looks like a drop path, but its rate is .*, which is no number"):
        sd.make_stochastic_(nn.Sequential(Block(drop_path)))
