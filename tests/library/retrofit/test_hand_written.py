"""Drop paths as people write them by hand: of other names, drawn in other ways, by the paper's rule.

The references are each block's own formulas times the gates, in float64.
"""

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from plain_blocks import D, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd


class SkipSample(nn.Module):
    """Acts in training only, and does not say so by its name."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (torch.rand(x.shape[0], *[1] * (x.dim() - 1)) > self.p).to(x.dtype) / (1 - self.p)
        return x


class ByPaper(nn.Module):
    """The paper's rule: not scaled in training, times the survival probability in evaluation."""

    def __init__(self, keep_prob: float) -> None:
        super().__init__()
        self.keep_prob = keep_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.keep_prob * x
        return x * torch.bernoulli(torch.full((len(x), *[1] * (x.dim() - 1)), self.keep_prob)).to(x.dtype)


class ByPython(nn.Module):
    """One draw for a mini-batch."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.training and random.random() < self.rate else x


class ByNumpy(nn.Module):
    def __init__(self, survival: float) -> None:
        super().__init__()
        self.survival = survival

    def forward(self, x: Tensor) -> Tensor:
        return x * float(numpy.random.binomial(1, self.survival)) / self.survival if self.training else x


class ImageDropPath(nn.Module):
    """Its noise is for images only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop_prob = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.size(0), 1, 1, 1) >= self.drop_prob) / (1 - self.drop_prob)


class Block(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.f, self.g, self.skip = linear(), linear(), drop

    def branch(self, x: Tensor) -> Tensor:
        return self.g(self.f(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.skip(self.branch(x))


class EvaluatedByHand(Block):
    """The paper's rule in the code of a block."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        p = 0.8
        y = y * torch.bernoulli(torch.full((x.shape[0], 1), p)).to(x.dtype) if self.training else p * y
        return x + y


DROPS: dict[str, tuple[nn.Module, str, str, float]] = {
    "training only": (SkipSample(0.2), "sample", "train", 0.8),
    "the paper's": (ByPaper(0.8), "sample", "eval", 0.8),
    "of Python": (ByPython(0.3), "batch", "none", 0.7),
    "of NumPy": (ByNumpy(0.75), "batch", "train", 0.75),
    "for images": (ImageDropPath(0.2), "sample", "train", 0.8),
}


def make(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    block = EvaluatedByHand(nn.Identity()) if name == "in code" else Block(copy.deepcopy(DROPS[name][0]))
    return nn.Sequential(block, copy.deepcopy(block)).double()


def factor(net: nn.Module, x: Tensor) -> Tensor:
    """What the branch of the first block is multiplied by, (N,)."""
    block: Any = net[0]
    branch = block.branch(x)
    ratio = (block(x) - x) / branch
    assert_same(ratio, ratio.flatten(1)[:, 0].reshape(-1, *[1] * (x.dim() - 1)).expand_as(ratio))
    return ratio.flatten(1)[:, 0].detach()


@pytest.mark.parametrize("name", [*DROPS, "in code"])
def test_without_a_schedule_they_keep_their_rule(name: str) -> None:
    net, x = make(name), data(4, 3, 2) if name == "for images" else data(4)
    _, granularity, rescale, survival_prob = DROPS.get(name, (None, "sample", "eval", 0.8))
    depth = sd.make_stochastic_(net)
    assert [branch.treatment for branch in depth] == ["subset" if granularity == "sample" else "skip"] * 2
    assert depth[0].survival_prob == pytest.approx(survival_prob)
    opened = 1 / survival_prob if rescale == "train" else 1.0
    with depth.gates([True, False]):
        assert_same(factor(net, x), torch.full((4,), opened, dtype=x.dtype))
        assert_same(net[1](x), x)
    net.eval()
    expected = survival_prob if rescale == "eval" else 1.0
    assert_same(factor(net, x), torch.full((4,), expected, dtype=x.dtype))
    with depth.gates([True, True]):
        assert_same(factor(net, x), torch.full((4,), opened, dtype=x.dtype))
    depth.verify(x)


@pytest.mark.parametrize("rescale", ["eval", "train"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("name", [*DROPS, "in code"])
def test_a_schedule_takes_their_place(name: str, granularity: Any, rescale: Any) -> None:
    net, x = make(name), data(4, 3, 2) if name == "for images" else data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale=rescale)
    assert len(depth) == 2
    opened = 2.0 if rescale == "train" else 1.0
    for mode in (True, False):
        net.train(mode)
        with depth.gates([True, True]):
            assert_same(factor(net, x), torch.full((4,), opened, dtype=x.dtype))
        with depth.gates([False, False]):
            assert_same(net(x), x)
    assert_same(factor(net, x), torch.full((4,), 0.5 if rescale == "eval" else 1.0, dtype=x.dtype))
    depth.verify(x)


class DropsAnInput(nn.Module):
    """Drops one of two inputs of some samples: no branch, although it works like a drop path."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.stem, self.block = SkipSample(0.3), linear(), Block(nn.Identity())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.block(self.stem(self.drop(x)) + y)


@pytest.mark.parametrize("by_example", [False, True])
def test_one_that_drops_an_input_stays_as_it_is(*, by_example: bool) -> None:
    torch.manual_seed(0)
    net, inputs = DropsAnInput().double(), [data(64), data(64, seed=1)]
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=inputs if by_example else None)
    assert depth.names == ["block#1"]
    assert "it drops what no layer has computed" in str(depth)
    with depth.gates([False]):
        dropped = net(*inputs)
    kept = net.stem(inputs[0] / 0.7) + inputs[1]
    is_kept = (dropped - kept).abs().amax(1) < 1e-9
    assert_same(dropped[~is_kept], (net.stem(0 * inputs[0]) + inputs[1])[~is_kept])
    assert 0.3 < is_kept.double().mean() < 0.95


class CalledInTraining(Block):
    """Masked, because it keeps a value of its branch; its drop path is called in training only."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.training:
            y = self.skip(y)
        self.last = y.detach()
        return x + y


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_a_masked_drop_path_that_evaluation_does_not_call_is_refused_there() -> None:
    net, x = nn.Sequential(CalledInTraining(SkipSample(0.2))).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.warns(sd.MaskedBranchWarning), depth.gates([True]):
        assert_same(net(x), x + net[0].branch(x))
    with pytest.raises(RuntimeError, match=r"0\.skip is masked, and its block calls the drop path in training only"):
        net.eval()(x)
    sd.restore_(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="train")
    assert_same(net(x), x + net[0].branch(x))
    with pytest.raises(RuntimeError, match="in training only"), depth.gates([True]):
        net(x)


class OverAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [x + self.f(x) for x in xs]


def test_a_longer_list_than_was_read_is_refused() -> None:
    net, xs = nn.Sequential(OverAList()).double(), [data(3), data(2), data(4)]
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(
        RuntimeError, match=r"it adds the branch of f more often than in the code that was read.*inputs="
    ):
        net(xs)
    sd.restore_(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[xs])
    with depth.gates([False] * len(depth)):
        for x, y in zip(xs, net(xs), strict=True):
            assert_same(x, y)


class Domains(nn.Module):
    """One layer for the first half of the samples, another one for the second, to which a single sample belongs."""

    def __init__(self) -> None:
        super().__init__()
        self.of_first, self.of_second = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        half = len(x) // 2
        return torch.cat([self.of_first(x[:half]), self.of_second(x[half:])])


class SingleOtherwise(nn.Module):
    """Does not normalize a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(D), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.norm(x) if x.shape[0] > 1 else x)


class Around(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x).relu()


@pytest.mark.parametrize("num_samples", [8, 128])
@pytest.mark.parametrize("child", [Domains, SingleOtherwise])
def test_a_child_that_asks_for_the_place_or_number_of_its_samples_is_refused(
    child: type[nn.Module], num_samples: int
) -> None:
    net = nn.Sequential(Around(child())).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    with pytest.raises(RuntimeError, match="its first dimension is not one of independent samples"):
        net(data(num_samples))
    sd.restore_(net)
    sd.make_stochastic_(net, sd.uniform(0.5))
    net(data(num_samples))


class SplitBatchNorm(nn.BatchNorm1d):
    """timm's: in training, one norm for the first half of the batch and another one for the second."""

    def __init__(self) -> None:
        super().__init__(D)
        self.second = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, second = x.split(len(x) // 2)
        return torch.cat([super().forward(first), self.second(second)])


class Normed(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.f, self.norm, self.drop = linear(), SplitBatchNorm(), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.f(x)))


def test_a_batch_norm_of_halves_is_masked_or_refused_per_sample() -> None:
    x = torch.randn(8, D, dtype=torch.float64)
    net = nn.Sequential(Normed(SkipSample(0.5))).double()
    reference = copy.deepcopy(net)
    branch = reference[0].norm(reference[0].f(x))
    depth = sd.make_stochastic_(net)
    gates = torch.tensor([[True, False, False, False, True, True, False, True]])
    with pytest.warns(sd.MaskedBranchWarning, match="asks for the places of the samples"), depth.gates(gates):
        assert_same(net(x), x + 2 * gates[0, :, None] * branch)
    net = nn.Sequential(Normed(nn.Identity())).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    with pytest.raises(RuntimeError, match="asks for the places of the samples"):
        net(x)
