"""Patterns of public repositories that were read wrongly once. Each comparison is with plain formulas in float64."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd


class Block(nn.Module):
    """`x + branch(x)`."""

    def __init__(self, size: int = D) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def with_and_without(*inputs: Tensor) -> list[dict[str, object]]:
    return [{}, {"inputs": inputs}]


class LearnedPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(torch.arange(x.shape[1], device=x.device))


class FixedPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", data(1, 20))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[:, : x.size(1)]


class AddsPositions(nn.Module):
    """Performer's and Reformer's."""

    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions(x)


class Embeds(AddsPositions):
    """The Time-Series-Library's, and BERT-pytorch's: a projection beside positions."""

    def __init__(self, positions: nn.Module) -> None:
        super().__init__(positions)
        self.values = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x) + self.positions(x)


@pytest.mark.parametrize("embedding", [AddsPositions, Embeds])
@pytest.mark.parametrize("positions", [LearnedPositions, FixedPositions])
def test_positions_are_no_branch(embedding: Callable[..., nn.Module], positions: Callable[[], nn.Module]) -> None:
    x = data(3, 5)
    for example in with_and_without(x):
        model = nn.Sequential(embedding(positions()), Block(), Block()).double()
        depth = sd.make_stochastic_(model, sd.linear_decay(0.5), **example)
        assert depth.names == ["1#1", "2#1"]
        with depth.gates([False, False]):
            assert_same(model(x), model[0](x))


def drop_connect(x: Tensor, rate: float) -> Tensor:
    """Of pytorch-cifar: in place on the branch's value."""
    mask = torch.empty([x.shape[0], 1], dtype=x.dtype, device=x.device)
    mask.bernoulli_(1 - rate)
    x.div_(1 - rate)
    x.mul_(mask)
    return x


class DropsInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.training:
            out = drop_connect(out, 0.2)
        return out + x


@pytest.mark.parametrize(
    "gates", [[True, False], [torch.tensor([True, False, True]), torch.tensor([False, True, True])]]
)
def test_a_drop_path_in_place_is_skipped(gates: list[bool] | list[Tensor]) -> None:
    model = nn.Sequential(DropsInPlace(), DropsInPlace()).double()
    plain, x = copy.deepcopy(model), data(3)
    depth = sd.make_stochastic_(model, granularity="batch" if isinstance(gates[0], bool) else "sample")
    with depth.gates(gates):
        output = model(x)
    expected = x
    for block, gate in zip(plain, gates, strict=True):
        expected = expected + torch.as_tensor(gate).double().view(-1, 1) / 0.8 * block.branch(expected)
    assert_same(output, expected)
    assert depth.masked == []


class ConvGroup(nn.Module):
    """SwinIR's: a convolution on what was a sequence, whose memory format depends on the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(D), nn.Conv2d(D, D, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        image = self.norm(x).transpose(1, 2).view(x.shape[0], D, 4, 4)
        return self.conv(image).flatten(2).transpose(1, 2) + x


def test_a_single_sample_has_no_memory_format_of_its_own() -> None:
    model = nn.Sequential(ConvGroup(), ConvGroup()).double()
    plain, x = copy.deepcopy(model), data(3, 16)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    with depth.gates([True, False]):
        for batch in (x, x[:1], x[2:]):
            sequence = batch.transpose(1, 2).contiguous().transpose(1, 2)
            assert_same(model(sequence), plain[0](batch))
    model.eval()
    first = 0.5 * (plain[0](x[:1]) - x[:1]) + x[:1]
    assert_same(model(x[:1]), first + 0.5 * (plain[1](first) - first))


class UShaped(nn.Module):
    """Registers its blocks in another order than it runs them (diffusion policy)."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.up, self.down = (nn.ModuleList([Block(), Block()]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for blocks in (self.down, self.middle, self.up):
            for block in blocks:
                x = block(x)
        return x


def test_an_example_gives_the_order() -> None:
    model = UShaped()
    depth = sd.make_stochastic_(model, sd.linear_decay(0.4), inputs=[torch.randn(2, D)])
    assert depth.names == [f"{part}.{index}#1" for part in ("down", "middle", "up") for index in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, D))


def test_without_one_another_order_is_warned_of_once() -> None:
    model = UShaped()
    sd.make_stochastic_(model, sd.linear_decay(0.4))
    with pytest.warns(UserWarning, match="run in another order than that of depth.names, by up to 4 places"):
        model(torch.randn(2, D))
    model(torch.randn(2, D))
    model = UShaped()
    sd.make_stochastic_(model, sd.uniform(0.4))
    model(torch.randn(2, D))  # The order does not matter.


class CalledByAnotherName(nn.Module):
    """RetNet's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = linear()

    def forward_parallel(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.branch(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_parallel(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CalledByAnotherName() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward_parallel(x)
        return x


class CallsForward(Stack):
    """i-RevNet's."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x


@pytest.mark.parametrize("kind", [Stack, CallsForward])
def test_code_that_an_outer_block_runs_is_counted_once(kind: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(kind()).double(), data(3)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    assert depth.names == ["0#1", "0#2", "0#3"]
    assert "0.layers.0 (CalledByAnotherName) and 2 more: 0 runs the code of a branch itself" in str(depth)
    with depth.gates([True, False, True]):
        first, _, last = model[0].layers
        assert_same(model(x), last.forward_parallel(first.forward_parallel(x)))


def test_layers_that_are_never_called_are_warned_of() -> None:
    model = nn.Sequential(Stack())
    sd.make_stochastic_(model, sd.uniform(0.5), layers=["0.layers.*"])
    with pytest.warns(
        UserWarning, match=r"3 of 3 branches .* were not reached .*: 0\.layers\.0, 0\.layers\.1, 0\.layers\.2\."
    ):
        model(torch.randn(2, D))


class AddsItsInputAgain(nn.Module):
    """nanochat's."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(num_blocks)])
        self.keeps = nn.Parameter(torch.linspace(1.2, 1.0, num_blocks))
        self.adds = nn.Parameter(torch.linspace(0.2, 0.1, num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index, block in enumerate(self.blocks):
            x = self.keeps[index] * x + self.adds[index] * first
            x = block(x)
        return x


@pytest.mark.parametrize("num_blocks", [3, 5])
def test_an_early_value_that_is_added_again_and_again_is_no_shortcut(num_blocks: int) -> None:
    for example in with_and_without(torch.randn(2, D)):
        depth = sd.make_stochastic_(AddsItsInputAgain(num_blocks), sd.linear_decay(0.5), **example)
        assert depth.names == [f"blocks.{index}#1" for index in range(num_blocks)]


class SkipsTheTrunk(nn.Module):
    """A skip around blocks that are written out in the same forward: both are branches, as in EDSR."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList([linear() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for module in self.maps:
            x = x + torch.tanh(module(x))
        return x + first


def test_a_skip_around_the_trunk_still_is_one() -> None:
    assert len(sd.make_stochastic_(SkipsTheTrunk(), sd.uniform(0.5))) == 4


class Propagates(nn.Module):
    """APPNP's: a product of two values that belongs to no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(linear(), nn.Tanh())

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = x + 0.9 * (adjacency @ x)
        return x + self.branch(x)


def test_propagation_without_parameters_is_no_branch() -> None:
    x, adjacency = data(5), data(5)[:, :5]
    for example in with_and_without(x, adjacency):
        model = Propagates().double()
        depth = sd.make_stochastic_(model, sd.linear_decay(0.5), **example)
        assert depth.survival_probs == [0.5]
        with depth.gates([False]):
            assert_same(model(x, adjacency), x + 0.9 * (adjacency @ x))
        assert "no branch" not in str(depth)


class MultipliesByParameters(nn.Module):
    """A graph convolution whose methods are named like no child."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.v, self.w = nn.Parameter(torch.eye(D)), nn.Parameter(torch.eye(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).matmul(self.v) + torch.relu(self.b(x)).matmul(self.w)


def test_names_of_methods_are_not_taken_for_children() -> None:
    depth = sd.make_stochastic_(nn.Sequential(MultipliesByParameters(), Block()), sd.uniform(0.5))
    assert depth.names[-1] == "1#1"


class Merges(nn.Module):
    """ECBSR's: in evaluation, one layer with the identity in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = linear()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.branch(x) + x
        return F.linear(x, self.branch.weight + torch.eye(D, dtype=x.dtype), self.branch.bias)


def test_evaluation_without_the_sum_is_refused_where_it_needs_a_factor() -> None:
    model = nn.Sequential(Merges())
    sd.make_stochastic_(model, sd.uniform(0.5))
    model(torch.randn(2, D))
    with pytest.raises(RuntimeError, match=r"evaluation has no sum for 0#1, .* use rescale='train'"):
        model.eval()(torch.randn(2, D))
    model, x = nn.Sequential(Merges()).double(), data(2)
    sd.make_stochastic_(model, sd.uniform(0.5), rescale="train")
    assert_same(model.eval()(x), x + model[0].branch(x))


class GivenItsShortcut(nn.Module):
    """DLA's."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(linear(), nn.Tanh(), linear())

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return self.maps(x) + (x if shortcut is None else shortcut)


class Tree(nn.Module):
    def __init__(self, *, projects: bool) -> None:
        super().__init__()
        self.first, self.second = GivenItsShortcut(), GivenItsShortcut()
        self.projection = linear() if projects else None

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, x if self.projection is None else self.projection(x)))


def test_a_block_that_is_given_its_input_as_shortcut_too() -> None:
    model, x = nn.Sequential(Tree(projects=True), Tree(projects=False)).double(), data(3)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), inputs=[x])
    assert depth.names == ["0#1", "0.second#1", "1#1", "1.second#1"]
    with depth.gates([True, False, False, True]):
        first = model[0].first.maps(x) + model[0].projection(x)
        assert_same(model(x), first + model[1].second.maps(first))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_block_is_left_out_with_a_note() -> None:
    class Scripted(torch.jit.ScriptModule):
        """pytorch-cifar100's."""

        def __init__(self) -> None:
            super().__init__()
            self.map = linear()

        @torch.jit.script_method
        def forward(self, x: Tensor) -> Tensor:
            return x + self.map(x)

    x = torch.randn(2, D)
    for example in with_and_without(x):
        model = nn.Sequential(Block(), Scripted(), Block())
        depth = sd.make_stochastic_(model, sd.uniform(0.5), **example)
        assert depth.names == ["0#1", "2#1"]
        assert "1 (Scripted) and 1 more: not looked into, it is a torch.jit.ScriptModule, which layers=" in str(depth)
        model(x)
    depth = sd.make_stochastic_(nn.Sequential(Block(), Scripted()), sd.uniform(0.5), layers=["1"])
    assert depth.names == ["1"]


class DropsSamples(nn.Module):
    """DINOv2's above a rate of 0.1: its drop paths are there, but not called."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.drop_path = linear(), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.map(x)
        kept = torch.randperm(len(x))[: len(x) // 2]
        return torch.index_add(x, 0, kept, self.map(x[kept]), alpha=2.0)


def test_drop_paths_that_the_code_does_not_call_are_warned_of() -> None:
    model = nn.Sequential(DropsSamples())
    sd.make_stochastic_(model)
    with (
        pytest.warns(sd.MaskedBranchWarning, match="randperm"),
        pytest.warns(UserWarning, match=r"1 of 1 branches .* not reached .*: 0\.drop_path\."),
    ):
        model(torch.randn(4, D))
    model = nn.Sequential(DropsSamples())
    depth = sd.make_stochastic_(model, layers=["0"], granularity="batch")
    with depth.gates([True]), pytest.warns(UserWarning, match="layer 0 does not call its drop paths in training"):
        model(torch.randn(4, D))


class HoldsInClosure(nn.Module):
    """minGPT's: a function on the block whose closure holds its children."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 2 * D), "act": nn.GELU(), "c_proj": nn.Linear(2 * D, D)})
        m = self.mlp
        self.mlpf = lambda x: m.c_proj(m.act(m.c_fc(x)))

    def branch(self, x: Tensor) -> Tensor:
        return self.mlp.c_proj(self.mlp.act(self.mlp.c_fc(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlpf(self.norm(x))


class HoldsInList(nn.Module):
    """The ECG networks': registered children that are called by way of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("first", nn.Linear(D, D))
        self.add_module("second", nn.Tanh())
        self.layers, self.by_name = ([self.first, self.second],), {"norm": nn.LayerNorm(D)}
        self.add_module("norm", self.by_name["norm"])

    def branch(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.by_name["norm"](x)
        for layer in self.layers[0]:
            y = layer(y)
        return x + y


@pytest.mark.parametrize("kind", [HoldsInClosure, HoldsInList])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_children_that_are_called_by_way_of_what_a_block_holds(kind: type[nn.Module], granularity: str) -> None:
    gates = [True, False] if granularity == "batch" else [data(3) > 0, torch.tensor([True, False, True])]
    gates = [gate if isinstance(gate, bool) else gate[:, 0] if gate.dim() > 1 else gate for gate in gates]
    x = data(3)
    for example in with_and_without(x)[kind is HoldsInList :]:  # Without one, the loop cannot be read.
        model = nn.Sequential(kind(), kind()).double()
        reference = nn.Sequential(kind(), kind()).double()
        reference.load_state_dict(model.state_dict())
        depth = sd.make_stochastic_(model, sd.uniform(0.5), granularity=granularity, **example)
        with depth.gates(gates):
            output = model(x)
        expected = x
        for block, gate in zip(reference, gates, strict=True):
            expected = expected + torch.as_tensor(gate).double().view(-1, 1) * block.branch(expected)
        assert_same(output, expected)
        assert depth.masked == []
        depth.verify(x)
        if kind is HoldsInList:
            assert all(block.layers == ([block.first, block.second],) for block in model), "they stay its own"


class Coupling(nn.Module):
    """RealNVP's: what its mask leaves is no shortcut."""

    def __init__(self, flip: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(D) % 2 == flip).double())
        self.scale, self.shift = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        kept = x * self.mask
        return kept + (1 - self.mask) * (x * self.scale(kept).tanh().exp() + self.shift(kept))


class InPaints(nn.Module):
    """The same with a mask that is computed."""

    def __init__(self, _flip: int) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x)
        kept = x * mask
        return kept + (1 - mask) * self.f(kept)


@pytest.mark.parametrize("kind", [Coupling, InPaints])
def test_a_masked_coupling_is_no_branch(kind: type[nn.Module]) -> None:
    for example in with_and_without(data(3)):
        model = nn.Sequential(kind(0), Block(), kind(1)).double()
        assert sd.make_stochastic_(model, sd.uniform(0.5), **example).names == ["1#1"]


def test_lazy_modules_want_a_forward_first() -> None:
    model = nn.Sequential(Block(), nn.LazyLinear(D)).double()
    for example in with_and_without(data(3)):
        with pytest.raises(ValueError, match=r"1.weight has no size yet: run the model once before"):
            sd.make_stochastic_(model, sd.uniform(0.5), **example)
    model(data(3))
    assert sd.make_stochastic_(model, sd.uniform(0.5)).names == ["0#1"]


@dataclass
class State:
    x: Tensor


class TakesState(Block):
    def forward(self, state: State) -> State:
        return State(state.x + self.branch(state.x))


def test_samples_inside_an_object_are_refused_with_the_cause() -> None:
    model = nn.Sequential(TakesState(), TakesState()).double()
    plain, x = copy.deepcopy(model), data(3)
    sd.make_stochastic_(model, sd.uniform(0.5), granularity="sample")
    with pytest.raises(RuntimeError, match=r"samples are inside an object that .* Use granularity='batch'"):
        model(State(x))
    sd.restore_(model)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    with depth.gates([False, True]):
        assert_same(model(State(x)).x, plain[1](State(x)).x)
