"""Sums that look like residual additions and are none: they get no gate.

The references are each block's own formulas, without the branches that have gates, in float64.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from plain_blocks import D, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd


class Film(nn.Module):
    """Scaled and shifted by what a condition says."""

    def __init__(self, *, two_maps: bool) -> None:
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(D), linear(), linear()
        self.of_condition, self.two_maps = nn.Linear(D, 2 * D), two_maps
        self.scale, self.shift = linear(), linear()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.two_maps:
            scale, shift = self.scale(condition), self.shift(condition)
        else:
            scale, shift = self.of_condition(condition).chunk(2, -1)
        h = self.norm(self.f(x)) * (1 + scale[:, None]) + shift[:, None]
        return x + self.g(h)


class FilmNet(nn.Module):
    def __init__(self, *, two_maps: bool) -> None:
        super().__init__()
        self.block = Film(two_maps=two_maps)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.block(x, condition)


@pytest.mark.parametrize("two_maps", [False, True])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_shift_is_no_shortcut(*, by_example: bool, two_maps: bool) -> None:
    net, x, condition = FilmNet(two_maps=two_maps).double(), data(4, 3), data(4, seed=1)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x, condition] if by_example else None)
    assert depth.names == ["block#1"]
    with depth.gates([False]):
        assert_same(net(x, condition), x)


class Normalized(nn.Module):
    """RevIN: takes statistics off its input and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        x = (x - mean) / std
        x = x + self.g(self.f(x).relu())
        return x * std + mean


class Experts(nn.Module):
    """Adds the outputs of experts, beginning with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(D), nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Sequential(linear(), nn.ReLU(), linear()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, total = self.router(h).softmax(-1), torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            total = total + expert(h) * weights[..., index : index + 1]
        return x + total


@pytest.mark.parametrize("kind", [Normalized, Experts])
@pytest.mark.parametrize("by_example", [False, True])
def test_statistics_and_sums_of_experts_are_no_branches(kind: type[nn.Module], *, by_example: bool) -> None:
    net, x = nn.Sequential(kind()).double(), data(4, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert depth.names == ["0#1"]
    with depth.gates([False]):
        assert_same(net(x), x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(self.f(x).relu())


class Recurrent(nn.Module):
    """A cell that is written out: `W x + R h`, where h comes from earlier steps."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.r = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], D, dtype=x.dtype)
        for step in range(3):
            h = torch.tanh(self.w(x[:, step]) + self.r(h))
        return h


class RecurrentAhead(Recurrent):
    """The same with one call of W for all steps."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.w(x)
        h = inputs.new_zeros(x.shape[0], D)
        for step in range(3):
            h = torch.tanh(inputs[:, step] + self.r(h))
        return h


class RecurrentOfOneInput(Recurrent):
    """The same for an input that does not change."""

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for _ in range(3):
            h = torch.tanh(self.w(x[:, 0]) + self.r(h))
        return h


class Gated(nn.Module):
    """A GRU cell that is written out, whose new state is a sum of shares."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.ModuleList(linear() for _ in range(3)), nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], D, dtype=x.dtype)
        for step in range(3):
            now = x[:, step]
            z = torch.sigmoid(self.w[0](now) + self.u[0](h))
            r = torch.sigmoid(self.w[1](now) + self.u[1](h))
            n = torch.tanh(self.w[2](now) + r * self.u[2](h))
            h = (1 - z) * n + z * h
        return h


class ResetBefore(nn.Module):
    """The cell of Cho et al. 2014, whose reset gate comes before the recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x = nn.ModuleList(linear() for _ in range(3))
        self.of_h = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x.mean(1, keepdim=True)
        update, reset = (torch.sigmoid(self.of_x[i](x) + self.of_h[i](h)) for i in range(2))
        new = torch.tanh(self.of_x[2](x) + self.of_h[2](reset * h))
        return (1 - update) * h + update * new


class Scores(nn.Module):
    """Additive attention: the score of each step comes from a layer behind a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.score = linear(), nn.Sequential(linear(), nn.ReLU(), linear()), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(torch.tanh(self.query(x.mean(1, keepdim=True)) + self.key(x)))
        return scores.softmax(1) * x


class AttentionGate(nn.Module):
    """The gate of Attention U-Net: a layer with a sigmoid behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = linear(), nn.Sequential(linear(), nn.ReLU(), linear())
        self.gate = nn.Sequential(nn.Linear(D, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(torch.relu(self.coarse(x) + self.fine(x)))


class Adapter(nn.Module):
    """A low-rank adapter beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b, self.dropout = linear(), nn.Linear(D, 2), nn.Linear(2, D), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.dropout(x))) * 0.5


class AdapterOfParameters(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.weight.t() @ self.b.weight.t()


class TwoAdapters(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Adapter(), nn.ReLU(), Adapter())


class Parallel(nn.Module):
    """Parallel convolutions and a norm that become one convolution later, as in RepVGG and MobileOne."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for conv in self.convs:
            y = y + conv(x)
        return y.relu()


class TwoInputs(nn.Module):
    """Positions and features of points in one tensor, each with layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D - 2, D), nn.Sequential(nn.Linear(2, D), nn.Tanh(), linear())

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[..., 2:]) + self.second(x[..., :2])


class TwoInputsSplit(TwoInputs):
    def forward(self, x: Tensor) -> Tensor:
        second, first = x.split([2, D - 2], dim=-1)
        return self.first(first) + self.second(second)


class ItemAndRest(TwoInputs):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, D), nn.Sequential(nn.Linear(D - 1, D), nn.Tanh(), linear())

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[..., 0, None]) + self.second(x[..., 1:])


class WithPositions(nn.Module):
    """Positions that are added before each of three layers, as in Point-MAE."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Linear(2, D), nn.Linear(D - 2, D)
        self.encoder = PositionsAgain()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.tokens(x[..., :2]), self.positions(x[..., 2:]))


class PositionsAgain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(linear(), nn.Tanh(), linear()) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x + positions)
        return x


@pytest.mark.parametrize(
    "kind",
    [
        TwoInputs,
        TwoInputsSplit,
        ItemAndRest,
        WithPositions,
        Recurrent,
        RecurrentAhead,
        RecurrentOfOneInput,
        Gated,
        ResetBefore,
        Scores,
        AttentionGate,
        Adapter,
        AdapterOfParameters,
        TwoAdapters,
        Parallel,
    ],
)
@pytest.mark.parametrize("by_example", [False, True])
def test_a_sum_of_layers_is_no_residual_addition(kind: type[nn.Module], *, by_example: bool) -> None:
    net, x = nn.Sequential(kind(), Block()).double(), data(4, 3)
    expected = net[0](x)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x] if by_example else None)
    assert depth.names == ["1#1"]
    with depth.gates([False]):
        assert_same(net(x), expected)


class Wave(nn.Module):
    """WaveNet: each layer adds to the stream, and gives a part of the output, which is the sum of these."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.on, self.out = (nn.ModuleList(linear() for _ in range(3)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = None
        for f, g, on, out in zip(self.f, self.g, self.on, self.out, strict=True):
            z = torch.tanh(f(x)) * torch.sigmoid(g(x))
            total = out(z) if total is None else total + out(z)
            x = x + on(z)
        return torch.cat([x, total], -1)


class WaveLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.on, self.out = (linear() for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.f(x)) * torch.sigmoid(self.g(x))
        return x + self.on(z), self.out(z)


class WaveOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WaveLayer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for layer in self.layers:
            x, part = layer(x)
            parts.append(part)
        return torch.cat([x, sum(parts[1:], start=parts[0])], -1)


class WaveToTheEnd(WaveOfLayers):
    """The same, adding as it goes; nothing uses the stream of the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        stream, total = self.layers[0](x)
        for layer in self.layers[1:]:
            stream, part = layer(stream)
            total = total + part
        return torch.cat([x, total], -1)


@pytest.mark.parametrize("kind", [Wave, WaveOfLayers, WaveToTheEnd])
@pytest.mark.parametrize("by_example", [False, True])
def test_what_layers_give_besides_the_stream_is_added_without_a_gate(
    kind: type[nn.Module], *, by_example: bool
) -> None:
    net, x = nn.Sequential(kind()).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x] if by_example else None)
    assert len(depth) == 3
    wave = net[0]
    layers = wave.layers if isinstance(wave, WaveOfLayers) else None
    parts = [
        (layer.out if layers else wave.out[index])(
            torch.tanh((layer.f if layers else wave.f[index])(x))
            * torch.sigmoid((layer.g if layers else wave.g[index])(x))
        )
        for index, layer in enumerate(layers or wave.f)
    ]
    with depth.gates([False, False, False]):
        assert_same(net(x), torch.cat([x, parts[0] + parts[1] + parts[2]], -1))


class RungeKutta(nn.Module):
    """A step of a Runge-Kutta method: the points at which f is called are no branches."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.f, self.method = nn.Sequential(linear(), nn.Tanh(), linear()), method
        self.register_buffer("step", torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.f(x)
        if self.method == "midpoint":
            return x + self.step * self.f(x + self.step / 2 * a)
        if self.method == "Heun":
            return x + 0.05 * (a + self.f(x + 0.1 * a))
        b = self.f(x + 0.05 * a)
        c = self.f(x + 0.05 * b)
        return x + 0.1 / 6 * (a + 2 * b + 2 * c + self.f(x + 0.1 * c))


@pytest.mark.parametrize("method", ["midpoint", "Heun", "classical"])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_runge_kutta_step_is_one_branch(method: str, *, by_example: bool) -> None:
    net, x = nn.Sequential(RungeKutta(method), RungeKutta(method)).double(), data(4)
    expected = net[1](x)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x] if by_example else None)
    assert depth.names == ["0#1", "1#1"]
    with depth.gates([False, True]):
        assert_same(net(x), expected)


class Implicit(nn.Module):
    """The same layer again and again, on what it gave before and on the embedded input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.f, self.kind = linear(), linear(), kind

    def forward(self, x: Tensor) -> Tensor:
        u = self.first(x)
        z = torch.zeros_like(u)
        for _ in range(4):
            if self.kind == "tanh":
                z = torch.tanh(self.f(z) + u)
            elif self.kind == "damped":
                z = torch.tanh(u + 0.9 * self.f(z))
            elif self.kind == "linear":
                z = u + self.f(z)
            else:
                v = u + self.f(z)
                z = v.sign() * (v.abs() - 0.1).relu()
        return z


@pytest.mark.parametrize("kind", ["tanh", "damped", "linear", "shrinkage"])
@pytest.mark.parametrize("by_example", [False, True])
def test_the_iterations_of_an_implicit_layer_are_no_branches(kind: str, *, by_example: bool) -> None:
    net, x = nn.Sequential(Implicit(kind), Block()).double(), data(4)
    expected = net[0](x)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert depth.names == ["1#1"]
    with depth.gates([False]):
        assert_same(net(x), expected)


class WideAndDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = linear(), nn.Sequential(linear(), nn.ReLU(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.wide(x) + self.deep(x))


class SideOutputs(nn.Module):
    """Outputs of two depths that are fused, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.early, self.late, self.head = linear(), Block(), linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.head(self.early(h) + 0.5 * self.late(self.deep(h)))


class Lookback(nn.Module):
    """TiDE: a sum of the model around blocks whose shortcuts have projections."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.lookback, self.head = Projected(), linear(), nn.Sequential(linear(), nn.ReLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(x)) + self.lookback(x)


class Interactions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.sum(-1, keepdim=True) ** 2 - (x**2).sum(-1, keepdim=True)) / 2


class Prediction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x + self.bias)


class Recommender(nn.Module):
    """DeepFM: three parts make one score, one of them without layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.interactions = linear(), Interactions()
        self.linear = nn.Sequential(linear(), nn.ReLU(), linear())
        self.deep, self.score, self.prediction = Block(), linear(), Prediction()

    def forward(self, x: Tensor) -> Tensor:
        e = self.first(x)
        score = self.linear(x)
        score = score + self.interactions(e)
        score = score + self.score(self.deep(e))
        return self.prediction(score)


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("kind", [WideAndDeep, SideOutputs, Lookback, Recommender])
def test_a_sum_of_outputs_is_no_residual_addition(kind: type[nn.Module], *, by_example: bool) -> None:
    net, x = kind().double(), data(4)
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x] if by_example else None)
    blocks = [name for name, module in plain.named_modules() if isinstance(module, (Block, Projected))]
    assert depth.names == [f"{name}#1" for name in blocks]
    assert "an addition has no gate, it joins outputs" in str(depth)
    for name in blocks:
        plain.get_submodule(name).g = Zero()
    with depth.gates([False] * len(blocks)):
        assert_same(net(x), plain(x))


class PositionsOfPoints(nn.Module):
    """Point-MAE: an MLP embeds where a point lies, and is added to what a network makes of its neighbors."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Sequential(linear(), nn.GELU(), linear())
        self.deep, self.block = nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), linear(), linear()), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.deep(x - x[:1]) + self.positions(x))


@pytest.mark.parametrize("by_example", [False, True])
def test_an_mlp_is_no_projection(*, by_example: bool) -> None:
    net, x = PositionsOfPoints().double(), data(4)
    expected = net.deep(x - x[:1]) + net.positions(x)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert depth.names == ["block#1"]
    with depth.gates([False]):
        assert_same(net(x), expected)


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Patches(nn.Module):
    """Returns patches with their height and width, side by side (PVT) or as a pair (XCiT)."""

    def __init__(self, *, as_pair: bool) -> None:
        super().__init__()
        self.f, self.as_pair = nn.Conv2d(2, D, 2, 2), as_pair

    def forward(self, image: Tensor) -> tuple[Any, ...]:
        x = self.f(image)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        return (x, (height, width)) if self.as_pair else (x, height, width)


class Positions(nn.Module):
    """A position encoding that is computed from a height and a width."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, height: int, width: int) -> Tensor:
        return self.g(self.f(torch.ones(height * width, D, dtype=torch.float64).cumsum(0)).relu())


class WithPositions(nn.Module):
    def __init__(self, *, as_pair: bool) -> None:
        super().__init__()
        self.patches, self.positions, self.as_pair = Patches(as_pair=as_pair), Positions(), as_pair
        self.block = Block()

    def forward(self, image: Tensor) -> Tensor:
        if self.as_pair:
            x, (height, width) = self.patches(image)
        else:
            x, height, width = self.patches(image)
        x = x + self.positions(height, width)
        return self.block(x)


@pytest.mark.parametrize("as_pair", [False, True])
@pytest.mark.parametrize("by_example", [False, True])
def test_positions_computed_from_a_returned_size_are_no_branch(*, by_example: bool, as_pair: bool) -> None:
    image = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    net = WithPositions(as_pair=as_pair).double()
    expected = net.patches(image)[0] + net.positions(4, 3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[image] if by_example else None)
    assert depth.names == ["block#1"]
    with depth.gates([False]):
        assert_same(net(image), expected)


class Tied(nn.Module):
    """The same layer again and again, first without a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(linear(), nn.ReLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        for _ in range(2):
            h = h + self.f(h)
        return h


class Projected(nn.Module):
    """A shortcut with a projection, from behind the common norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.projection, self.f, self.g = nn.LayerNorm(D), linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).relu()
        return self.projection(h) + self.g(self.f(h).relu())


class Masked(Projected):
    """The same with a mask that comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(D) % 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).relu()
        return self.projection(h) + self.mask.to(x.dtype) * self.g(self.f(h).relu())


class NormedTwice(Projected):
    """The norm is called once for the projection and once for the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.h = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.norm(x)) + self.h(self.g(self.f(self.norm(x)).relu()).relu())


class Squashed(Projected):
    """A sigmoid behind the sum, whose result is the block's output, not a gate."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Queries(nn.Module):
    """A shortcut in what computes the queries of an attention, as in EfficientFormerV2."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.value, self.f = Block(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.block(x).softmax(-1) * self.value(x))


class Downsampled(nn.Module):
    """Such an attention beside a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.attention = linear(), Queries()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x) + self.attention(x)


class Pooled(nn.Module):
    """A shortcut that is pooled, in words that no layer of PyTorch says, as in Hiera."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.f, self.g = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.projection(x).view(-1, 1, D).max(dim=1)[0]
        return shortcut + self.g(self.f(x).relu())


class Prepare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x), self.g(x)


class Prepared(nn.Module):
    """One child prepares the shortcut and the input of the branch, as in MobileBert."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare, self.f = Prepare(), nn.Sequential(linear(), nn.ReLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        shortcut, inner = self.prepare(x)
        return shortcut + self.f(inner)


class Halves(nn.Module):
    """A reversible block: each half is added what comes from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(D // 2, D // 2), nn.Linear(D // 2, D // 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        b = b + self.g(a)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("by_example", [False, True])
def test_what_the_lookalikes_look_like_are_branches(*, by_example: bool) -> None:
    net, x = (
        nn.Sequential(
            Tied(), Projected(), Masked(), NormedTwice(), Squashed(), Downsampled(), Pooled(), Prepared(), Halves()
        ).double(),
        data(4),
    )
    tied, projected, masked, normed, squashed, downsampled, pooled, prepared, _ = net
    first = tied.f(x)
    expected = first + tied.f(first)
    for block in (projected, masked):
        expected = block.projection(block.norm(expected).relu())
    expected = normed.projection(normed.norm(expected))
    expected = squashed.projection(squashed.norm(expected).relu()).sigmoid()
    expected = downsampled.projection(expected)
    expected = prepared.prepare(pooled.projection(expected))[0]
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[x] if by_example else None)
    assert depth.names == [
        "0#1", "0#2", "1#1", "2#1", "3#1", "4#1", "5#1", "5.attention.block#1", "6#1", "7#1", "8#1", "8#2",
    ]  # fmt: skip
    with depth.gates([True, *[False] * 11]):
        assert_same(net(x), expected)


class MaskedPair(nn.Module):
    """Takes values and a mask together; its second branch is multiplied by the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = inputs
        x = x + self.f(x).tanh() * mask
        x = x + self.g(x).tanh()
        return x, mask


@pytest.mark.parametrize("by_example", [False, True])
def test_a_mask_beside_the_stream_is_no_scale(*, by_example: bool) -> None:
    torch.manual_seed(0)
    net, x, mask = nn.Sequential(MaskedPair()).double(), data(4, 3), data(4, 3, seed=1)[..., :1].sign().relu()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[(x, mask)] if by_example else None)
    assert depth.names == ["0#1", "0#2"]
    for first, second in itertools.product((True, False), repeat=2):
        expected = x + first * net[0].f(x).tanh() * mask
        expected = expected + second * net[0].g(expected).tanh()
        with depth.gates([first, second]):
            assert_same(net((x, mask))[0], expected)


class GatedGraph(nn.Module):
    """A node's own value plus gated messages of its neighbors: the branch of a residual layer (GatedGCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.message, self.gate, self.norm = linear(), linear(), linear(), nn.LayerNorm(D)

    def branch(self, h: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        gate = (self.gate(h)[source] + self.gate(h)[target]).sigmoid()
        messages = torch.zeros_like(h).index_add(0, target, gate * self.message(h)[source])
        return self.norm(self.own(h) + messages).relu()

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        return h + self.branch(h, edges)


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedGraph() for _ in range(2))

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h, edges)
        return h


@pytest.mark.parametrize("by_example", [False, True])
def test_messages_added_to_a_nodes_own_value_are_no_branch(*, by_example: bool) -> None:
    torch.manual_seed(0)
    net, h, edges = GraphNet().double(), data(3), torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[h, edges] if by_example else None)
    assert depth.names == ["layers.0#1", "layers.1#1"]
    with depth.gates([False, True]):
        assert_same(net(h, edges), h + net.layers[1].branch(h, edges))


class DeepOutside(nn.Module):
    """A projected block between layers, inside a sum around everything: the inner sum is a branch too."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.f, self.g, self.out = linear(), linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.skip(x) + self.g(self.f(x).relu())
        return x + self.out(h.relu())


def test_a_projected_block_inside_a_sum_stays_a_branch() -> None:
    torch.manual_seed(0)
    net, x = DeepOutside().double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert len(depth.names) == 2
    with depth.gates([False, True]):
        assert_same(net(x), x + net.out(net.skip(x).relu()))


class Streams(nn.Module):
    """A reversible block of two arguments, which have nothing in common."""

    def __init__(self, *, in_a_tuple: bool) -> None:
        super().__init__()
        self.f, self.g, self.in_a_tuple = linear(), linear(), in_a_tuple

    def forward(self, *streams: Any) -> tuple[Tensor, Tensor]:
        a, b = streams[0] if self.in_a_tuple else streams
        a = a + self.f(b).tanh()
        b = self.g(a).tanh() + b
        return a, b


class StreamsNet(nn.Module):
    def __init__(self, *, in_a_tuple: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Streams(in_a_tuple=in_a_tuple) for _ in range(2))
        self.in_a_tuple = in_a_tuple

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for block in self.blocks:
            a, b = block((a, b)) if self.in_a_tuple else block(a, b)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("in_a_tuple", [False, True])
@pytest.mark.parametrize("by_example", [False, True])
def test_streams_that_update_each_other_have_a_branch_each(
    *, by_example: bool, in_a_tuple: bool, granularity: Any
) -> None:
    torch.manual_seed(0)
    net, a, b = StreamsNet(in_a_tuple=in_a_tuple).double(), data(4), data(4, seed=1)
    reference = copy.deepcopy(net)
    depth = sd.make_stochastic_(
        net, sd.uniform(0.5), granularity=granularity, inputs=[a, b] if by_example else None, seed=3
    )
    assert depth.names == ["blocks.0#1", "blocks.0#2", "blocks.1#1", "blocks.1#2"]
    rows = 4 if granularity == "sample" else 1
    for seed in range(4):
        gates = torch.rand(4, rows, generator=torch.Generator().manual_seed(seed)) < 0.5
        first, second = a, b
        for index, block in enumerate(reference.blocks):
            of_first, of_second = gates[2 * index, :, None], gates[2 * index + 1, :, None]
            first = first + of_first * block.f(second).tanh()
            second = second + of_second * block.g(first).tanh()
        with depth.gates(gates if granularity == "sample" else gates[:, 0].tolist()):
            y = net(a, b)
        expected = torch.cat([first, second], -1)
        assert_same(y, expected)
        for model, output in ((net, y), (reference, expected)):
            model.zero_grad()
            output.square().sum().backward()
        for own, other in zip(net.parameters(), reference.parameters(), strict=True):
            assert_same(own.grad, other.grad)


class Conditioned(nn.Module):
    """What is computed from the hidden state is added to a condition, and ends there."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.g((condition + self.f(x)).relu())


class Controlled(Conditioned):
    """The condition is added at the end of the branch."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + (self.g(self.f(x).relu()) + condition)


@pytest.mark.parametrize("make", [Conditioned, Controlled])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_condition_inside_a_branch_is_no_stream(make: type[nn.Module], *, by_example: bool) -> None:
    net, inputs = make().double(), [data(4), data(4, seed=1)]
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=inputs if by_example else None)
    assert depth.names == ["1"]
    with depth.gates([False]):
        assert_same(net(*inputs), inputs[0])


class Conditioning(nn.Module):
    """Adds a condition in the form of the hidden state, and then has a branch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.time, self.segment = linear(), linear(), nn.Embedding(2, D)
        self.bias = nn.Parameter(torch.randn(D))
        self.kind = kind

    def condition(self, x: Tensor, time: Tensor) -> Tensor:
        given = self.time(time)
        return {
            "plain": lambda: given,
            "expand_as": lambda: given[:1].expand_as(x),
            "type_as": lambda: given.type_as(x),
            "to": lambda: given.to(x),
            "view_as": lambda: given.view_as(x),
            "segment": lambda: self.segment(torch.zeros_like(x[:, 0], dtype=torch.long)),
            "new_zeros": lambda: self.segment(x.new_ones(x.shape[0], dtype=torch.long)),
            "bias": lambda: self.bias.expand_as(x),
        }[self.kind]()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.condition(x, time)
        return x + self.f(x)


class ConditionedInside(Conditioning):
    """Adds the condition inside the branch."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = x.tanh()
        return x + self.f(h + self.condition(h, time))


@pytest.mark.parametrize("make", [Conditioning, ConditionedInside])
@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("kind", ["plain", "expand_as", "type_as", "to", "view_as", "segment", "new_zeros", "bias"])
def test_a_value_that_takes_the_form_of_the_stream_is_no_branch(
    kind: str, make: type[Conditioning], *, by_example: bool
) -> None:
    torch.manual_seed(0)
    net, x, time = make(kind).double(), data(4), data(4, seed=1)
    before = x + net.condition(x, time) if make is Conditioning else x
    inner = before if make is Conditioning else x.tanh() + net.condition(x, time)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x, time] if by_example else None)
    assert len(depth) == 1
    with depth.gates([False]):
        assert_same(net(x, time), before)
    assert_same(net.eval()(x, time), before + 0.5 * net.f(inner))


class InTheFormOfTheBranch(nn.Module):
    """The shortcut takes the branch's type: only the values of the branch depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x).relu()
        return x.to(h) + self.g(h)


@pytest.mark.parametrize("by_example", [False, True])
def test_a_shortcut_in_the_form_of_its_branch(*, by_example: bool) -> None:
    net, x = InTheFormOfTheBranch().double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    with depth.gates([False]):
        assert_same(net(x), x)
    assert_same(net.eval()(x), x + 0.5 * net.g(net.f(x).relu()))


class WithMerge(nn.Module):
    def merged(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Streaming(WithMerge):
    """A block with other ways to run its branch, and with methods that do something else."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def step(self, x: Tensor) -> Tensor:
        return x.add(self.f(x))

    def inverse(self, y: Tensor, times: int = 5) -> Tensor:
        x = y
        for _ in range(times):
            x = y - self.f(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        return self.f(x)

    def merged(self, x: Tensor) -> Tensor:
        return self.f(x)

    def num_outputs(self, extra: int = 0) -> int:
        return self.f.out_features + extra

    def clipped(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1) + 1


def test_methods_that_add_without_gates_are_told() -> None:
    depth = sd.make_stochastic_(nn.Sequential(Streaming()).double(), sd.uniform(0.5))
    note = "no branch: 0 (Streaming): inverse and step, if you call them yourself, run without gates, which only the"
    assert note in " ".join(str(depth).split())


class Grid(nn.Module):
    """Coordinates through a layer, made from the size of a map and cast to its type."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(2, D)

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.meshgrid(torch.linspace(0, 1, x.size(1)), torch.zeros(1), indexing="ij")
        return self.f(torch.stack(grid, -1).flatten(0, 1).to(x))


class Frequencies(nn.Module):
    """Sines of positions with learned frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x.new_tensor(range(x.shape[1]))[:, None] * self.frequencies).sin()


class Counted(nn.Module):
    """Embedded positions, from a cumulative sum of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Embedding(9, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(torch.ones_like(x[..., 0]).cumsum(1).long())


class WithGrid(nn.Module):
    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.positions, self.f = positions, linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(x)
        return x + self.f(x)


@pytest.mark.parametrize("make", [Grid, Frequencies, Counted])
@pytest.mark.parametrize("by_example", [False, True])
def test_positions_in_the_form_of_the_stream_are_no_branch(make: type[nn.Module], *, by_example: bool) -> None:
    net, x = WithGrid(make()).double(), data(4, 3)
    expected = x + net.positions(x)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert len(depth) == 1
    with depth.gates([False]):
        assert_same(net(x), expected)


class ScoresAlong(nn.Module):
    """RealFormer: the scores of attention are handed to the next layer, which adds them to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.f = (linear() for _ in range(4))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.q(x) @ self.k(x).mT
        if before is not None:
            scores = scores + before
        x = x + scores.softmax(-1) @ self.v(x)
        return x + self.f(x).tanh(), scores


class ScoresAlongNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ScoresAlong() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = None
        for layer in self.layers:
            x, scores = layer(x, scores)
        return x


@pytest.mark.parametrize("by_example", [False, True])
def test_scores_that_are_passed_along_the_layers_are_no_stream(*, by_example: bool) -> None:
    torch.manual_seed(0)
    net, x = ScoresAlongNet().double(), data(4, 3)
    reference = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert depth.names == [f"layers.{index}#{number}" for index in range(3) for number in (1, 2)]
    for seed in range(4):
        gates = (torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.5).tolist()
        h, scores = x, None
        for layer, attends, maps in zip(reference.layers, gates[::2], gates[1::2], strict=True):
            own = layer.q(h) @ layer.k(h).mT
            scores = own if scores is None else own + scores
            h = h + attends * (scores.softmax(-1) @ layer.v(h))
            h = h + maps * layer.f(h).tanh()
        with depth.gates(gates):
            assert_same(net(x), h)


class Exchange(nn.Module):
    """Two modalities are given what was computed of the other one, at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = linear(), linear(), linear()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = a + self.f(b).tanh(), b + self.g(a).tanh()
        return a + self.h(a).tanh(), b


class ExchangeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Exchange() for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for block in self.blocks:
            a, b = block(a, b)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("by_example", [False, True])
def test_streams_that_exchange_have_a_branch_each(*, by_example: bool, granularity: Any) -> None:
    torch.manual_seed(0)
    net, a, b = ExchangeNet().double(), data(4), data(4, seed=1)
    reference = copy.deepcopy(net)
    depth = sd.make_stochastic_(
        net, sd.uniform(0.5), granularity=granularity, inputs=[a, b] if by_example else None, seed=3
    )
    assert depth.names == [f"blocks.{index}#{number}" for index in range(2) for number in (1, 2, 3)]
    for seed in range(4):
        gates = torch.rand(6, 4 if granularity == "sample" else 1, generator=torch.Generator().manual_seed(seed)) < 0.5
        first, second = a, b
        for block, (to_first, to_second, alone) in zip(reference.blocks, gates[..., None].split(3), strict=True):
            first, second = (
                first + to_first * block.f(second).tanh(),
                second + to_second * block.g(first).tanh(),
            )
            first = first + alone * block.h(first).tanh()
        with depth.gates(gates if granularity == "sample" else gates[:, 0].tolist()):
            assert_same(net(a, b), torch.cat([first, second], -1))


class Anchored(nn.Module):
    """GCNII: the stream begins with a value that every layer is given again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = linear(), nn.ModuleList(linear() for _ in range(3))
        self.register_buffer("graph", torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = start = self.first(x).relu()
        for layer in self.layers:
            h = h + layer(0.9 * self.graph @ h + 0.1 * start).relu()
        return h


class Touching(nn.Module):
    """Adds 0 times all of its input, so that nothing is without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Anchored(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + 0.0 * x.sum()


@pytest.mark.parametrize("by_example", [False, True])
def test_a_stream_that_begins_with_what_is_added_again_has_all_branches(*, by_example: bool) -> None:
    torch.manual_seed(0)
    net, x = Touching().double(), data(4)
    body = copy.deepcopy(net.body)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert depth.names == ["body#1", "body#2", "body#3"]
    for gates in itertools.product([False, True], repeat=3):
        h = start = body.first(x).relu()
        for gate, layer in zip(gates, body.layers, strict=True):
            h = h + gate * layer(0.9 * body.graph @ h + 0.1 * start).relu()
        with depth.gates(gates):
            assert_same(net(x), net.head(h))


class Padded(nn.Module):
    """A block that multiplies its shortcut by a mask, or a window."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.f, self.g, self.kind = linear(), linear(), linear(), kind
        self.register_buffer("window", torch.linspace(0, 1, D))

    def f_of(self, x: Tensor) -> Tensor:
        return self.g(self.f(x).relu())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "of argument":
            return x * mask + self.f_of(x)
        h = self.first(x)
        if self.kind == "both":
            return h * mask + self.f_of(h) * mask
        if self.kind == "input":
            return h * mask + self.f_of(h * mask)
        return h * self.window + self.f_of(h)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("kind", ["both", "input", "of argument", "window"])
@pytest.mark.parametrize("by_example", [False, True])
def test_a_shortcut_may_be_masked(kind: str, granularity: Any, *, by_example: bool) -> None:
    torch.manual_seed(0)
    net, x, mask = Padded(kind).double(), data(4), torch.tensor([[1.0], [0.0], [1.0], [1.0]]).double()
    depth = sd.make_stochastic_(
        net, sd.uniform(0.5), granularity=granularity, rescale="none", inputs=[x, mask] if by_example else None
    )
    assert depth.names == ["1"]
    h = x if kind == "of argument" else net.first(x)
    shortcut = h * (net.window if kind == "window" else mask)
    branch = net.f_of(h * mask if kind == "input" else h) * (mask if kind == "both" else 1)
    gates = torch.tensor([True, False, False, True]) if granularity == "sample" else torch.tensor([False])
    with depth.gates(gates[None] if granularity == "sample" else [False]):
        assert_same(net(x, mask), shortcut + gates[:, None] * branch)
    with depth.gates([True]):
        assert_same(net(x, mask), shortcut + branch)


class Denoiser(nn.Module):
    """EDM: the image and what a network says of it, each with a coefficient of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(), Block(), Block(), linear())

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma[:, None]
        skip, out = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt()
        return skip * x + out * self.net(x * out)


@pytest.mark.parametrize("by_example", [False, True])
def test_the_coefficients_of_a_denoiser_make_no_branch(*, by_example: bool) -> None:
    net, x, sigma = Denoiser().double(), data(4), torch.rand(4, dtype=torch.float64)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x, sigma] if by_example else None)
    assert depth.names == ["net.1#1", "net.2#1"]


class Unclear(nn.Module):
    """Adds what layers compute to a value that was changed, or at some positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = linear(), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "relu":
            return torch.relu(x) + self.f(x)
        if self.kind == "index_add":
            return x.index_add(0, torch.arange(2), self.f(x[:2]))
        index = torch.zeros(1, D, dtype=torch.long)
        return torch.scatter_add(x, 0, index, self.f(x[:1]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("relu", "its shortcut passes relu"),
        ("index_add", "it is a call of index_add, which adds to some positions only"),
        ("scatter_add", "it is a call of scatter_add, which adds to some positions only"),
    ],
)
@pytest.mark.parametrize("by_example", [False, True])
def test_what_may_be_a_residual_addition_is_named(kind: str, reason: str, *, by_example: bool) -> None:
    net, x = nn.Sequential(Block(), Unclear(kind)).double(), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert depth.names == ["0#1"]
    assert f"1 (Unclear): an addition has no gate, {reason}" in " ".join(str(depth).split())
