"""Code as it is in many public repositories, against each model's own formula with its gates written into it."""

import copy
import warnings
from typing import Any

import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd


class PreNormDecoderLayer(nn.Module):
    """DETR's: the positions of the queries are added to the normalized stream, twice, and are not a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.own, self.cross, self.mlp = linear(), linear(), linear()

    def forward(self, x: Tensor, memory: Tensor, query_pos: Tensor) -> Tensor:
        y = self.norms[0](x)
        q = y + query_pos
        x = x + self.own(q * y)
        y = self.norms[1](x)
        x = x + self.cross((y + query_pos) * memory)
        return x + self.mlp(self.norms[2](x))


class PostNormDecoderLayer(PreNormDecoderLayer):
    def forward(self, x: Tensor, memory: Tensor, query_pos: Tensor) -> Tensor:
        q = x + query_pos
        x = self.norms[0](x + self.own(q * x))
        x = self.norms[1](x + self.cross((x + query_pos) * memory))
        return self.norms[2](x + self.mlp(x))


class Decoder(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor, query_pos: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, query_pos)
        return x


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("layer", [PreNormDecoderLayer, PostNormDecoderLayer])
def test_positions_that_are_added_to_a_stream_are_no_shortcut(layer: type[nn.Module], *, by_example: bool) -> None:
    net, inputs = Decoder(layer).double(), [data(4), data(4, seed=1), data(4, seed=2)]
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=inputs if by_example else None)
    assert depth.names == [f"layers.{index}#{number}" for index in range(2) for number in (1, 2, 3)]
    assert "no branch" not in str(depth)
    with depth.gates([False] * 6):
        expected = inputs[0]
        if layer is PostNormDecoderLayer:
            for each in net.layers:
                for norm in each.norms:
                    expected = norm(expected)
        assert_same(net(*inputs), expected)


class Forecaster(nn.Module):
    """Takes the mean off a series and puts it back, by another view than before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.f = kind, nn.ModuleList(linear() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            means = x.mean(1, keepdim=True).detach()
            stdev = torch.sqrt(torch.var(x - means, dim=1, keepdim=True, unbiased=False) + 1e-5)
            x = (x - means) / stdev
            for layer in self.f:
                x = x + layer(x.transpose(1, 2)).transpose(1, 2)
            x = x * stdev[:, 0, :].unsqueeze(1).repeat(1, D, 1)
            return x + means[:, 0, :].unsqueeze(1).repeat(1, D, 1)
        last = x[:, -1:].detach()
        x = x - last
        for layer in self.f:
            x = x + layer(x.transpose(1, 2)).transpose(1, 2)
        return x + last


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("kind", ["mean", "last"])
def test_what_was_taken_off_and_is_put_back_is_no_shortcut(kind: str, *, by_example: bool) -> None:
    net, x = Forecaster(kind).double(), data(4, D)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[x] if by_example else None)
    assert depth.names == ["1", "2"]
    with depth.gates([False, False]):
        assert_same(net(x), x)
    with depth.gates([True, True]):
        net(x).sum().backward()


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv, self.drop_path = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv(self.bn(x)))


def test_a_single_survivor_of_a_drop_path_behind_batch_norm() -> None:
    """To see how many values BatchNorm gets, the block is copied, with its drop path."""
    net, x = nn.Sequential(Convolution(), Convolution()).double(), data(2, 3, 4)
    block = copy.deepcopy(net[0])
    depth = sd.make_stochastic_(net)
    with depth.gates([torch.tensor([True, False]), False]):
        output = net(x)
    alone = x[:1] + block.conv(block.bn(x[:1])) / (1 - block.drop_path.drop_prob)
    assert_same(output, torch.cat([alone, x[1:]]))


class Casting(nn.Module):
    """Computes in another type than that of its input and output, as wrappers of fused attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() @ self.f.weight.bfloat16().T).to(x)


class Plain(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(D), f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


class WithAutocast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("where", ["children", "root"])
def test_half_precision_inside_a_model_is_compared_as_such(where: str, granularity: Any) -> None:
    torch.manual_seed(0)
    if where == "children":
        net = nn.Sequential(*(Plain(Casting()) for _ in range(4)))
    else:
        net = WithAutocast(*(Plain(nn.Linear(D, D)) for _ in range(4)))
    depth, x = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity), torch.randn(16, 5, D)
    for _ in range(4):
        net(x).sum().backward()
    assert depth.verify(x).num_masked == 0


class Mixing(Casting):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.05 * y.mean(0, keepdim=True)


def test_half_precision_does_not_hide_that_samples_are_mixed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Plain(Mixing()) for _ in range(4)))
    depth, x = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample"), torch.randn(16, 5, D)
    some = [torch.arange(16) % 2 == 0] * 4
    with depth.gates(some), pytest.raises(RuntimeError, match="first dimension is not one of independent samples"):
        net(x)


class GainFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.gain = linear(), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.gain, self.f(x))


@pytest.mark.parametrize("num_samples", [4, D])
def test_a_gain_that_is_the_first_factor_has_no_samples(num_samples: int) -> None:
    net, x = nn.Sequential(GainFirst(), GainFirst()).double(), data(num_samples)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    some = torch.arange(num_samples) % 3 > 0
    expected = x
    for block, gate in zip(copy.deepcopy(net), (some, ~some), strict=True):
        expected = expected + block.gain * block.f(expected) * gate[:, None]
    with depth.gates([some, ~some]):
        assert_same(net(x), expected)


class TwoViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(WithDropPath(), WithDropPath())

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone(a), self.backbone(b)


class WithDropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


def test_a_network_that_a_forward_calls_twice_is_told() -> None:
    net, a, b = TwoViews().double(), data(4), data(4, seed=1)
    sd.make_stochastic_(net)
    with pytest.warns(UserWarning, match=r"backbone\.0\.drop_path runs several times in one forward"):
        net(a, b)
    other = TwoViews().double()
    depth = sd.make_stochastic_(other.backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(a, b)  # told once
        for _ in range(3):
            other(a, b)
            other.eval()(a, b)
            other.train()
    assert depth.passes.counter == 6


class OneParameter(nn.Module):
    """All layers in one parameter, as in DCN's cross network."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(3, D, D) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index in range(3):
            x = first * (x @ self.kernels[index]) + x
        return x


class Unbound(OneParameter):
    def forward(self, x: Tensor) -> Tensor:
        first = x
        for kernel in self.kernels:
            x = first * (x @ kernel) + x
        return x


@pytest.mark.parametrize("kind", [OneParameter, Unbound])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_layers_that_are_one_parameter(granularity: Any, kind: type[OneParameter]) -> None:
    net, x = nn.Sequential(kind()).double(), data(4)
    inputs = None if kind is OneParameter else [x]  # how often a loop runs over a parameter is not read
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none", inputs=inputs)
    assert depth.names == ["0#1", "0#2", "0#3"]
    some = torch.tensor([True, False, True, True])
    gates: list[Any] = [False, True, False] if granularity == "batch" else [some, ~some, some]
    expected = x
    for kernel, gate in zip(net[0].kernels, gates, strict=True):
        expected = expected + x * (expected @ kernel) * torch.as_tensor(gate).view(-1, 1)
    with depth.gates(gates):
        assert_same(net(x), expected)
    depth.verify(x)
