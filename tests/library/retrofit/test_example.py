"""`make_stochastic_(..., inputs=...)`: branches are found as an example runs through the model's code.

The reference is each model's own formula with its gates written into it, in float64.
"""

import copy
import itertools
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd


class ByRank(nn.Module):
    """Does something else for volumes than for images, as SwinUNETR does."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.drop_path = linear(), linear(), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.size()
        last = {3: 2, 4: 3}[len(sizes)]
        x = x + self.drop_path(self.f(x).tanh())
        return x + self.drop_path(self.g(x).sum(last, keepdim=True))

    def gated(self, x: Tensor, first: float, second: float) -> Tensor:
        x = x + first * self.f(x).tanh()
        return x + second * self.g(x).sum(-1, keepdim=True)


class Rolling(nn.Module):
    """Its code cannot be traced with symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.BatchNorm1d(D), linear()

    def forward(self, x: Tensor, *, shift: int = 1) -> Tensor:
        return x + self.f(self.norm(x.roll(shift * {1: 0, 2: 1}[len(x.size()[:2])], 0)))


def test_uses_of_a_drop_path_are_told_apart() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(ByRank(), ByRank()).double(), data(4, 2, 3)
    depth = sd.make_stochastic_(net, inputs=[x], granularity="batch")
    assert list(depth.names) == ["0.drop_path#1", "0.drop_path#2", "1.drop_path#1", "1.drop_path#2"]
    for gates in itertools.product((True, False), repeat=4):
        with depth.gates(gates):
            output = net(x)
        first = net[0].gated(x, 2.0 * gates[0], 2.0 * gates[1])
        assert_same(output, net[1].gated(first, 2.0 * gates[2], 2.0 * gates[3]))
    assert depth.masked == []
    assert depth.verify(x).num_masked == 0


def test_additions_are_found_in_code_that_no_symbol_goes_through() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Rolling(), Rolling()).double(), data(4)
    with pytest.raises(ValueError, match=r"Give inputs=\[\.\.\.\] of an example"):
        sd.make_stochastic_(copy.deepcopy(net), sd.uniform(0.5))
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x])
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items()), "no statistics move"
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert not net[0]._forward_pre_hooks
    with depth.gates([True, False]):
        output = net(x)
    normed = (x.roll(1, 0) - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    assert_same(output, x + net[0].f(normed))


class Sometimes(nn.Module):
    """Calls one of its blocks in training only, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Rolling(), Rolling(), Rolling()

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        x = self.first(x * scale)
        return self.second(x) if self.training else x


@pytest.mark.parametrize("training", [True, False])
def test_what_the_example_calls_in_either_mode_is_found(training: bool) -> None:
    net = Sometimes().double().train(training)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs={"x": data(4), "scale": 2.0})
    assert list(depth.names) == ["first#1", "second#1"]
    assert "third (Rolling): not looked into, the example never calls it" in str(depth)


class Expanding(nn.Module):
    """Adds to a row: the sum has another shape than what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.f, self.g = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.row(x.mean(1, keepdim=True)) + self.f(x)
        return x + self.g(x)


def test_a_sum_of_another_shape_is_no_branch() -> None:
    net, x = nn.Sequential(Expanding()).double(), data(4, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x])
    assert list(depth.names) == ["0#1"]
    with depth.gates([False]):
        assert_same(net(x), net[0].row(x.mean(1, keepdim=True)) + net[0].f(x))


def test_bad_examples_are_one_line_and_change_nothing() -> None:
    net = nn.Sequential(ByRank()).double()
    with pytest.raises(TypeError, match="inputs must be the arguments of a forward"):
        sd.make_stochastic_(net, inputs=data(4, 2))
    with pytest.raises(ValueError, match="The model fails on inputs") as caught:
        sd.make_stochastic_(net, inputs=[torch.zeros(4, 2, D + 1, dtype=torch.float64)])
    assert "\n" not in str(caught.value)
    assert type(net) is nn.Sequential
    assert type(net[0]) is ByRank
    assert not net[0]._forward_pre_hooks


class TwiceUnread(nn.Module):
    """Uses its drop path twice, in code that cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.drop_path, self.scale = linear(), linear(), DropPath(), torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale.to(x)
        x = x + self.drop_path(self.f(x) * self.scale)
        return x + self.drop_path(self.g(x) * self.scale)


@pytest.mark.filterwarnings("ignore::stochastic_depth.MaskedBranchWarning")
def test_uses_of_a_drop_path_are_counted_where_code_cannot_be_recorded() -> None:
    net, x = nn.Sequential(TwiceUnread()).double(), data(4)
    depth = sd.make_stochastic_(net, granularity="batch", inputs=[x])
    assert [branch.treatment for branch in depth.branches] == ["mask", "mask"]
    with depth.gates([False, True]):
        assert_same(net(x), x + 2 * net[0].g(x))
    with depth.gates([True, False]):
        assert_same(net(x), x + 2 * net[0].f(x))


class InitialResidual(nn.Module):
    """A layer of GCNII: in the first, both arguments are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor, first: Tensor, graph: Tensor) -> Tensor:
        return self.gated(x, first, graph, 1.0)

    def gated(self, x: Tensor, first: Tensor, graph: Tensor, gate: float) -> Tensor:
        x = 0.9 * (graph @ x) + 0.1 * first
        return 0.75 * x + gate * (0.25 * self.f(x))


class Gcnii(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InitialResidual() for _ in range(3))

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, first, graph)
        return x


def test_two_arguments_that_are_one_tensor_in_the_first_layer() -> None:
    torch.manual_seed(0)
    net, x, graph = Gcnii().double(), data(4, 5), data(4, 5)[..., :1].expand(4, 5, 5)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x, graph])
    assert list(depth.names) == ["layers.0#1", "layers.1#1", "layers.2#1"]
    for gates in itertools.product((True, False), repeat=3):
        with depth.gates(gates):
            output = net(x, graph)
        expected = x
        for layer, gate in zip(net.layers, gates, strict=True):
            expected = layer.gated(expected, x, graph, float(gate))
        assert_same(output, expected)


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class SkipsLayers(nn.Module):
    """LayerDrop, written as a loop."""

    def __init__(self, draw: Callable[[], bool]) -> None:
        super().__init__()
        self.layers, self.draw = nn.ModuleList(Adding() for _ in range(2)), draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self.draw():
                continue
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "draw",
    [
        lambda: bool(torch.rand(1) < 0.3),
        lambda: torch.rand([]).item() < 0.3,
        lambda: random.random() < 0.3,
        lambda: np.random.rand() < 0.3,
    ],
    ids=["bool", "item", "random", "numpy"],
)
@pytest.mark.parametrize("inputs", [None, [data(4)]], ids=["read", "run"])
def test_a_model_that_skips_layers_itself_is_said_to_drop_them_twice(
    draw: Callable[[], bool], inputs: list[Tensor] | None
) -> None:
    depth = sd.make_stochastic_(SkipsLayers(draw).double(), sd.uniform(0.5), inputs=inputs)
    assert re.search(r"the model \(SkipsLayers\): not looked into, .* dropped twice", str(depth))
    plain = SkipsLayers(lambda: False).double()
    assert "dropped twice" not in str(sd.make_stochastic_(plain, sd.uniform(0.5), inputs=inputs))


class Shuffling(nn.Module):
    """Permutes its samples in training, beside a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.f = nn.Sequential(Adding(), Adding()), linear()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x[torch.randperm(x.shape[0])]
        x = self.layers(x)
        return x + self.f(x)


@pytest.mark.parametrize("inputs", [None, [data(4)]], ids=["read", "run"])
def test_a_sum_in_code_that_cannot_be_gated_in_training_is_left_out(inputs: list[Tensor] | None) -> None:
    net = Shuffling().double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=inputs)
    assert list(depth.names) == ["layers.0#1", "layers.1#1"]
    assert "the model (Shuffling): not looked into, " in str(depth)
    net(data(4)).sum().backward()
