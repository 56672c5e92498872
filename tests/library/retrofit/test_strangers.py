"""Models of other authors: each is correct under given gates, masked, or refused; never silently wrong.

The reference is each model's own formula with its gates written into it, in float64.
"""

import copy
import itertools
import random
import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from types import MethodType, SimpleNamespace

import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from timm.layers import drop_path as timm_drop_path
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchvision.ops import stochastic_depth

import stochastic_depth as sd


def gradients_of(output: Tensor, net: nn.Module) -> list[Tensor | None]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return list(torch.autograd.grad((output * weights).sum(), list(net.parameters()), allow_unused=True))


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], num_blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(num_blocks))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x

    def gated(self, x: Tensor, gates: list[object], *args: object, **kwargs: object) -> Tensor:
        """The plain reference: each block's own formula with its gates, one or several per block."""
        per_block = len(gates) // len(self.blocks)
        for index, block in enumerate(self.blocks):
            x = block.gated(x, *gates[index * per_block : (index + 1) * per_block], *args, **kwargs)
        return x


# ------------------------------------------------------------------ right and skipped, whatever the code asks


class AsksForTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def branch(self, x: Tensor) -> Tensor:
        return self.f(x) if isinstance(x, torch.Tensor) and torch.is_tensor(x) else self.g(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def gated(self, x: Tensor, gate: object) -> Tensor:
        return x + gate * self.f(x)


class AsksForGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x) if torch.is_grad_enabled() else self.g(x))

    def gated(self, x: Tensor, gate: object, other: object) -> Tensor:
        return x + (gate * self.f(x) if torch.is_grad_enabled() else other * self.g(x))


class Windows(nn.Module):
    """Pads to windows, by sizes of intermediate values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(D), linear()

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        pad = (4 - y.shape[1] % 4) % 4
        if pad > 0:
            y = nn.functional.pad(y, (0, 0, 0, pad))
        y = y.reshape(y.shape[0] * int(y.shape[1] // 4), 4, D)
        y = self.f(y.flip(1))
        return y.reshape(x.shape[0], -1, D)[:, : x.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def gated(self, x: Tensor, gate: object) -> Tensor:
        return x + gate * self.branch(x)


class Adaptive(nn.Module):
    """Adaptive LayerNorm: inputs of two branches come out of one `chunk`."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.ada = linear(), linear(), nn.Linear(D, 4 * D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.gated(x, 1, 1, c)

    def gated(self, x: Tensor, first: object, second: object, c: Tensor) -> Tensor:
        a, b, e, d = self.ada(c).chunk(4, dim=1)
        x = x + first * (b[:, None] * self.f(x * (1 + a[:, None])))
        return x + second * (d[:, None] * self.g(x * (1 + e[:, None])))


class AdaptivePlain(Adaptive):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, e, d = self.ada(c).chunk(4, dim=1)
        x = x + b[:, None] * self.f(x * (1 + a[:, None]))
        return x + d[:, None] * self.g(x * (1 + e[:, None]))


class Memory(nn.Module):
    """A branch that is there only where an optional argument is given."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = linear(), linear()

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.f(x)
        if memory is not None:
            x = x + self.g(x * memory)
        return x

    def gated(self, x: Tensor, first: object, second: object, memory: Tensor | None = None) -> Tensor:
        x = x + first * self.f(x)
        return x if memory is None else x + second * self.g(x * memory)


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(D), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return 1.5 * x + self.f(y) + self.g(y)

    def gated(self, x: Tensor, first: object, second: object) -> Tensor:
        y = self.norm(x)
        return 1.5 * x + first * self.f(y) + second * self.g(y)


class InOtherWords(nn.Module):
    """Additions by a function with a factor, by `sum`, and by a module."""

    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h, self.add = linear(), linear(), linear(), self.Add()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.f(x), alpha=0.7)
        x = sum([x, self.g(x)])
        return self.add(x, self.h(x))

    def gated(self, x: Tensor, first: object, second: object, third: object) -> Tensor:
        x = x + 0.7 * first * self.f(x)
        x = x + second * self.g(x)
        return x + third * self.h(x)


class Parameters(nn.Module):
    """A block without children, whose weights are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))
        self.v = self.w

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.w).relu() @ self.v

    def gated(self, x: Tensor, gate: object) -> Tensor:
        return x + gate * ((x @ self.w).relu() @ self.v)


RIGHT: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "asks-for-tensor": (AsksForTensor, ()),
    "windows": (Windows, ()),
    "adaptive": (AdaptivePlain, (data(4, seed=5),)),
    "memory-given": (Memory, (data(4, 7, seed=5),)),
    "parallel": (Parallel, ()),
    "in-other-words": (InOtherWords, ()),
    "parameters": (Parameters, ()),
}


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("name", RIGHT)
def test_it_equals_its_own_code_under_gates(name: str, granularity: str) -> None:
    make, args = RIGHT[name]
    torch.manual_seed(0)
    net = Stack(make).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    assert depth.masked == []
    num, x = len(depth.names), data(4, 7)
    patterns: list[list[object]] = [[True] * num, [False] * num, [index % 2 == 0 for index in range(num)]]
    if granularity == "sample":
        generator = torch.Generator().manual_seed(1)
        patterns.append([torch.rand(4, generator=generator) < 0.5 for _ in range(num)])
    for training in (True, False):
        net.train(training)
        for gates in patterns:
            with depth.gates(gates):
                output = net(x, *args)
            weights = [g.double().view(-1, 1, 1) if isinstance(g, Tensor) else float(g) for g in gates]
            expected = plain.gated(x, weights, *args)
            assert_same(output, expected)
            for ours, theirs in zip(gradients_of(output, net), gradients_of(expected, plain), strict=True):
                if theirs is not None:
                    assert ours is not None, "gradients of zero are promised"
                    assert_same(ours, theirs)
    report = depth.verify(x, *args)
    assert report.num_masked == 0
    assert report.output_deviation < 1e-9


def test_gradient_mode_is_that_of_the_call() -> None:
    net = Stack(AsksForGradients).double()
    plain, x = copy.deepcopy(net), data(3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    for gate in (True, False):
        with depth.gates([gate] * 2):
            assert_same(net(x), plain.gated(x, [float(gate)] * 4))
    # Without gradients another branch is added, which was not known when the model was made stochastic.
    with torch.no_grad(), depth.gates([False] * 2), pytest.raises(RuntimeError, match=r"not found in its code \(g\)"):
        net(x)


def test_a_closed_branch_of_an_optional_argument_runs_nothing() -> None:
    net = Stack(Memory).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    x, calls = data(2, 3), []
    for block in net.blocks:
        block.g.register_forward_pre_hook(lambda *_: calls.append(1))
    with depth.gates([True, False, True, False]):
        net(x, x)
        net(x)
    assert calls == []


# --------------------------------------------------------------------------------------- drop paths


class Functional(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = linear(), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "timm":
            return x + timm_drop_path(self.f(x), 0.25, self.training)
        return x + stochastic_depth(self.f(x), 0.25, "row", self.training)


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_functional_drop_paths_are_skipped(kind: str) -> None:
    net = Stack(lambda: Functional(kind)).double()
    plain, x = copy.deepcopy(net), data(4)
    depth = sd.make_stochastic_(net)
    assert depth.names == ["blocks.0.drop_path()", "blocks.1.drop_path()"]
    assert depth.survival_probs == [0.75, 0.75]
    gates = [torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])]
    expected = x
    for block, gate in zip(plain.blocks, gates, strict=True):
        expected = expected + block.f(expected) * gate[:, None] / 0.75
    with depth.gates(gates):
        assert_same(net(x), expected)
    seen: list[int] = []
    net.blocks[0].f.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    with depth.gates(gates):
        net(x)
    assert seen == [2]
    assert_same(net.eval()(x), plain.eval()(x))


class ByHand(nn.Module):
    """Drops its branch by a tensor of noise, as many write it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = linear(), kind

    def forward(self, x: Tensor) -> Tensor:
        y, keep = self.f(x), 0.75
        if not self.training:
            return x + y
        if self.kind == "rand >=":
            noise = torch.rand(x.shape[0], 1) >= 1 - keep
        elif self.kind == "rand <":
            noise = torch.rand(x.size(0), 1, device=x.device) < keep
        elif self.kind == "floor":
            noise = torch.floor(keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1)))
        elif self.kind == "floor, 1 - p":
            noise = torch.floor(torch.rand(x.shape[0], 1) + 1.0 - 0.25)
        elif self.kind == "ceil":
            noise = (torch.rand(x.shape[0], 1) * 2 - 0.5).ceil().ge(1)
        elif self.kind == "bernoulli_":
            noise = torch.empty(x.shape[0], 1).bernoulli_(keep)
        else:
            noise = torch.bernoulli(torch.full((x.shape[0], 1), keep))
        return x + y * (noise.to(x) / keep)


@pytest.mark.parametrize("kind", ["rand >=", "rand <", "floor", "floor, 1 - p", "ceil", "bernoulli_", "bernoulli"])
@pytest.mark.parametrize("by_example", [False, True])
def test_drop_paths_by_hand_are_skipped(kind: str, *, by_example: bool) -> None:
    net, x = Stack(lambda: ByHand(kind)).double(), data(4)
    depth = sd.make_stochastic_(net, inputs=[x] if by_example else None)
    assert depth.names == ["blocks.0.drop_path()", "blocks.1.drop_path()"]
    assert depth.survival_probs == [0.75, 0.75]
    gates = [torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])]
    expected = x
    for block, gate in zip(net.blocks, gates, strict=True):
        expected = expected + block.f(expected) * gate[:, None] / 0.75
    calls: list[int] = []
    net.blocks[0].f.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    for _ in range(2):  # The first call proves.
        calls.clear()
        with depth.gates(gates):
            assert_same(net(x), expected)
    assert calls == [2]
    assert depth.verify(x)


def test_a_changed_rate_of_a_functional_drop_path_raises() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.rate = linear(), 0.25

        def forward(self, x: Tensor) -> Tensor:
            return x + timm_drop_path(self.f(x), self.rate, self.training)

    net = Stack(Changing).double()
    sd.make_stochastic_(net)
    net(data(4))
    net.blocks[0].rate = 0.5
    with pytest.raises(RuntimeError, match=r"was changed from 0\.25 to 0\.5: set it back"):
        net(data(4))


class Divided(nn.Module):
    """Divides by the survival probability after the product with the noise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind, self.gain = linear(), kind, nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        y, keep = self.f(x), 0.75
        if not self.training:
            return x + y * self.gain
        noise = torch.empty(x.shape[0], 1, dtype=x.dtype).bernoulli_(keep)
        if self.kind == "/":
            return x + y * noise / keep
        if self.kind == "inverse":
            return x + y * noise * (1 / keep)
        if self.kind == "behind a view and a gain":
            return x + ((y * noise).view(-1, D) * self.gain) / keep
        if self.kind == "alpha":
            return torch.add(x, y * noise, alpha=1 / keep)
        y = y * noise
        y /= keep
        return x + y


@pytest.mark.parametrize("kind", ["/", "inverse", "/=", "behind a view and a gain", "alpha"])
def test_a_division_after_the_product_is_part_of_the_drop_path(kind: str) -> None:
    net, x = Stack(lambda: Divided(kind)).double(), data(4)
    depth = sd.make_stochastic_(net)
    gates = [torch.tensor([True, False, True, False]), True]
    expected = x
    for block, gate in zip(net.blocks, (gates[0][:, None], 1), strict=True):
        expected = expected + block.f(expected) * gate / 0.75
    for training in (True, False):
        net.train(training)
        with depth.gates(gates):
            assert_same(net(x), expected)
        assert depth.verify(x).num_masked == 0


@pytest.mark.parametrize("granularity", [None, "batch"])
def test_one_draw_for_two_branches_is_refused(granularity: str | None) -> None:
    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.empty(x.shape[0], 1, dtype=x.dtype).bernoulli_(0.5) if self.training else 1.0
            x = x + self.f(x) * gate
            return x + self.g(x) * gate

    with pytest.raises(ValueError, match="one random draw drops several"):
        sd.make_stochastic_(nn.Sequential(Together()), granularity=granularity)


def test_noise_that_is_closed_where_its_draw_is_large_is_named() -> None:
    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = linear()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * (1 - (torch.rand(x.shape[0], 1) < 0.25).to(x)) if self.training else x + self.f(x)

    with pytest.raises(ValueError, match=r"draws random numbers itself \(rand\)"):
        sd.make_stochastic_(nn.Sequential(Inverted()))


def test_a_factor_that_may_be_the_blocks_own_stays_its_own() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = linear()

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return x + (y * torch.empty(x.shape[0], 1).bernoulli_(0.5).to(x) if self.training else y) * 2.0

    net, x = nn.Sequential(Doubling()).double(), data(4)
    depth = sd.make_stochastic_(net)
    for training in (True, False):
        net.train(training)
        with depth.gates([True]):
            assert_same(net(x), x + 2 * net[0].f(x))


class Function(nn.Module):
    """Drops two branches by a function with settings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.rates = linear(), linear(), [0.25, 0.5]
        self.scales, self.mode = True, "row"

    def drop(self, x: Tensor, rate: float) -> Tensor:
        if not self.training or rate == 0:
            return x
        size = [x.shape[0] if self.mode == "row" else 1, 1]
        noise = torch.empty(size, dtype=x.dtype).bernoulli_(1 - rate)
        return x * (noise / (1 - rate) if self.scales else noise)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.f(x), self.rates[0])
        return x + self.drop(self.g(x), self.rates[1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rates", [0.25, 0.1], r"drop_path\(\)#2 was changed from 0\.5 to 0\.1"),
        ("scales", False, r"#1 was changed from .*'train'.* to .*'none'"),
        ("mode", "batch", r"#1 was changed from .*'sample'.* to .*'batch'"),
    ],
)
def test_a_functional_drop_path_that_changes_is_refused(name: str, value: object, message: str) -> None:
    net = nn.Sequential(Function()).double()
    sd.make_stochastic_(net)
    for size in (4, 1):
        net(data(size))
    setattr(net[0], name, value)
    with pytest.raises(RuntimeError, match=message):
        net(data(4))


@pytest.mark.parametrize("rates", [[0.0, 0.5], [0.25, 0.0], [0.0, 0.0]])
def test_a_functional_drop_path_whose_rate_becomes_0_drops_no_more(rates: list[float]) -> None:
    net = nn.Sequential(Function()).double()
    f, g, x = net[0].f, net[0].g, data(32)
    depth = sd.make_stochastic_(net)
    net(x)
    net[0].rates = rates
    firsts = [x + f(x)] if rates[0] == 0 else [x, x + f(x) / 0.75]
    ways = [h + factor * g(h) for h in firsts for factor in ([1] if rates[1] == 0 else [0, 2])]
    taken: set[int] = set()
    for _ in range(3):  # 96 samples, each of which must go one of the ways
        out = net(x)
        deviation, way = torch.stack([(out - y).abs().amax(1) for y in ways]).min(0)
        assert deviation.max() < 1e-12
        taken |= set(way.tolist())
    assert len(taken) == len(ways)
    assert depth.verify(x).num_masked == 0
    with depth.gates([False, False]):  # forced, they are closed all the same
        assert torch.equal(net(x), x)


class Switched(nn.Module):
    """Calls its drop path in training if a flag or an argument says so."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path, self.drops = linear(), DropPath(0.5), True

    def forward(self, x: Tensor, drops: bool = True) -> Tensor:
        y = self.f(x)
        return x + (self.drop_path(y) if self.training and self.drops and drops else y)


@pytest.mark.parametrize("was_called", [True, False])
@pytest.mark.parametrize("by", ["flag", "argument"])
def test_a_drop_path_that_is_not_called_in_training_does_not_drop(by: str, *, was_called: bool) -> None:
    block = Switched().double()
    net, x = nn.ModuleList([block]), data(32)
    depth = sd.make_stochastic_(net)
    if was_called:
        block(x)
    block.drops = by != "flag"
    full = x + block.f(x)
    for _ in range(3):
        y = block(x, drops=by != "argument")
        assert_same(y, full)
    with depth.gates([False]):
        assert torch.equal(block(x, drops=by != "argument"), x)
    block.drops = True
    gates = torch.arange(32) % 2 == 0
    with depth.gates([gates]):
        assert_same(block(x), x + 2 * gates[:, None] * block.f(x))


def test_a_schedule_does_not_ask_whether_a_drop_path_is_called() -> None:
    net = nn.Sequential(Switched()).double()
    net[0].drops, x = False, data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    seen = set()
    for _ in range(30):
        y = net(x)
        assert_same(y, x + depth.last_gates[0] * net[0].f(x))
        seen.add(depth.last_gates[0])
    assert seen == {0.0, 1.0}


class Shared(nn.Module):
    """One drop path for two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.drop_path = linear(), linear(), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        n = int(x.shape[0])
        x = x + self.drop_path(self.f(x)).view(n, D)
        return x + self.drop_path(self.g(x))


def test_each_use_of_a_drop_path_has_a_gate_of_its_own() -> None:
    net = nn.Sequential(Shared()).double()
    plain, x = copy.deepcopy(net)[0], data(4)
    depth = sd.make_stochastic_(net, rescale="none")
    assert depth.names == ["0.drop_path#1", "0.drop_path#2"]
    for first, second in itertools.product((True, False), repeat=2):
        with depth.gates([first, second]):
            y = x + first * plain.f(x)
            assert_same(net(x), y + second * plain.g(y))


class AddedFirst(nn.Module):
    """Adds two dropped branches to each other, and then to the shortcut."""

    def __init__(self, *, is_left: bool) -> None:
        super().__init__()
        self.f, self.g, self.p, self.q, self.is_left = linear(), linear(), DropPath(0.5), DropPath(0.25), is_left

    def forward(self, x: Tensor) -> Tensor:
        both = self.p(self.f(x)) + self.q(self.g(x))
        return both + x if self.is_left else x + both


@pytest.mark.parametrize("is_left", [True, False])
def test_dropped_branches_that_are_added_to_each_other_first_are_skipped(*, is_left: bool) -> None:
    net = nn.Sequential(AddedFirst(is_left=is_left)).double()
    f, g, x = net[0].f, net[0].g, data(4)
    depth = sd.make_stochastic_(net)
    calls: list[int] = []
    g.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    gates = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    first, second = gates.double()[..., None]
    for _ in range(2):  # The first call proves.
        calls.clear()
        with depth.gates(list(gates)):
            assert_same(net(x), x + 2 * first * f(x) + second / 0.75 * nn.functional.linear(x, g.weight, g.bias))
    assert calls[0] == 2
    assert depth.verify(x).num_masked == 0


class Bypassing(nn.Module):
    """Calls its drop path in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x)) if self.training else x + self.f(x)


def test_a_drop_path_that_is_called_in_training_only_has_its_rule_in_evaluation() -> None:
    net = Stack(Bypassing).double()
    plain, x = copy.deepcopy(net), data(3)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    expected = x
    for block in plain.blocks:
        expected = expected + 0.5 * block.f(expected)
    assert_same(net.eval()(x), expected)
    with depth.gates([False, False]):
        assert torch.equal(net(x), x)
    assert depth.verify(x).num_masked == 0


def test_rates_that_change_are_followed() -> None:
    net = Stack(Bypassing)
    depth = sd.make_stochastic_(net)
    net.blocks[0].drop_path.drop_prob = 0.4
    net.blocks[1].drop_path.drop_prob = 0.0
    assert depth.survival_probs == [0.6, 1.0]
    net.blocks[0].drop_path.eval()
    assert_same(net.double()(data(3)), copy.deepcopy(net).eval()(data(3)))
    sd.restore_(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), where="blocks.0.*")
    with pytest.raises(RuntimeError, match="come from a schedule"):
        net.blocks[0].drop_path.drop_prob = 0.2


def test_a_drop_path_that_is_replaced_is_refused() -> None:
    net = Stack(Bypassing)
    sd.make_stochastic_(net)
    net.blocks[0].drop_path = nn.Identity()
    with pytest.raises(RuntimeError, match="was replaced after make_stochastic_"):
        net(data(3).float())


# --------------------------------------------------------- what cannot be skipped is masked or refused


class TokensFirst(nn.Module):
    """The branch mixes the entries of dimension 0, on which its drop path works."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(0.5)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(x - x.detach().mean(0, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


@pytest.mark.parametrize(
    "first", [data(5), data(1), torch.zeros(5, D, dtype=torch.float64)], ids=["data", "one", "zeros"]
)
def test_a_branch_that_mixes_samples_is_masked(first: Tensor) -> None:
    net = nn.Sequential(TokensFirst()).double()
    plain, x = copy.deepcopy(net)[0], data(5)
    depth = sd.make_stochastic_(net)
    with pytest.warns(sd.MaskedBranchWarning, match="not one of independent samples"):
        net(first)
    gate = torch.tensor([True, False, True, True, False])
    with depth.gates([gate]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(net(x), x + plain.branch(x) * gate[:, None] / 0.5)
    assert "independent samples" in str(depth)


def test_a_branch_that_mixes_samples_is_refused_with_a_schedule() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = linear()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x - x.mean(0, keepdim=True))

    net = nn.Sequential(Mixing()).double()
    for example, advice in ((None, ", inputs="), ([data(4)], ", layers=")):
        sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", inputs=example)
        message = rf"The block 0 \(Mixing\) cannot be gated here .*Use granularity='batch'{advice}"
        with pytest.raises(RuntimeError, match=message):
            net(data(4))
        sd.restore_(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    with depth.gates([False]):
        assert_same(net(data(4)), data(4))


FLAGS = SimpleNamespace(squared=False)
TOTAL = {"calls": 0}
HW = namedtuple("HW", "height width")


def _helper(x: Tensor) -> Tensor:
    return x.square() if FLAGS.squared else x


class Beside(nn.Module):
    """Does something beside its sum, which is given to it."""

    def __init__(self, beside: Callable[..., object]) -> None:
        super().__init__()
        self.f, self.beside = linear(), beside
        self.rng, self.stats = random.Random(0), {"inner": {"n": 0}}
        if beside is advances:
            self.numbers = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        self.beside(self, x)
        return x + self.f(x)


def rolls_dice(_block: Beside, _x: Tensor) -> object:
    return torch.rand(1).item() < 0.5


def rolls_rare_dice(block: Beside, _x: Tensor) -> object:
    return block.rng.random() < 0.001


def advances(block: Beside, _x: Tensor) -> object:
    return next(block.numbers)


def counts(_block: Beside, _x: Tensor) -> None:
    TOTAL["calls"] += 1


def counts_inside(block: Beside, _x: Tensor) -> None:
    block.stats["inner"]["n"] += 1


def looks_at_values(_block: Beside, x: Tensor) -> object:
    return bool(x.sum() > 0)


def looks_at_sizes_of_values(_block: Beside, x: Tensor) -> object:
    return x[x > 0].shape[0] > 3


def leaves_on_a_child(block: Beside, x: Tensor) -> None:
    block.f.seen = x


@pytest.mark.parametrize(
    ("beside", "cause"),
    [
        (rolls_dice, "draws random numbers itself|depends on the values"),
        (rolls_rare_dice, "draws random numbers itself"),
        (advances, "may advance the iterator numbers"),
        (counts, "changes the global variable TOTAL"),
        (counts_inside, "stores stats"),
        (looks_at_values, "depends on the value"),
        (looks_at_sizes_of_values, "depends on a size that depends on the values"),
        (leaves_on_a_child, "changes f.seen"),
    ],
)
def test_code_that_is_no_function_is_refused(beside: Callable[..., object], cause: str) -> None:
    net = nn.Sequential(Beside(beside), Beside(lambda *_: None)).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    if "0#1" in depth.names:
        with pytest.raises(RuntimeError, match=cause):
            net(data(4))
    else:
        assert re.search(f"no branch: 0 .*({cause})", str(depth)), "it is told at once"
    assert TOTAL["calls"] == 0
    assert net[0].stats == {"inner": {"n": 0}}
    assert not hasattr(net[0].f, "seen") or isinstance(net[0].f.seen, Tensor)


class Lists(nn.Module):
    """Appends an auxiliary loss to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop_path = linear(), DropPath(0.5)

    def forward(self, x: Tensor, losses: list[Tensor]) -> Tensor:
        losses.append(x.mean())
        return x + self.drop_path(self.f(x))


def test_what_a_block_leaves_in_a_list_is_kept() -> None:
    net = Stack(Lists, 3).double()
    sd.make_stochastic_(net)
    losses: list[Tensor] = []
    with pytest.warns(sd.MaskedBranchWarning, match="changes its list argument"):
        net(data(4), losses)
    assert len(losses) == 3


class Checkpointed(nn.Module):
    """Checkpoints a part of itself: all of it, what is inside of the branch, or what lies around it."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.f, self.g, self.drop_path, self.part = linear(), linear(), DropPath(0.5), part

    def inner(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x).tanh())

    def branch(self, x: Tensor) -> Tensor:
        return self.f(x).tanh()

    def around(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sigmoid() + x, self.branch(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.part == "all":
            return checkpoint(self.inner, x, use_reentrant=False)
        if self.part == "branch":
            return x + self.drop_path(checkpoint(self.branch, x, use_reentrant=False).cos())
        shortcut, h = checkpoint(self.around, x, use_reentrant=False)
        return shortcut + self.drop_path(checkpoint(self.g, h, use_reentrant=False))


def gated_checkpointed(block: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    h = block.f(x).tanh()
    if block.part == "all":
        return x + h * gate
    return x + h.cos() * gate if block.part == "branch" else x.sigmoid() + x + block.g(h) * gate


@pytest.mark.parametrize("granularity", ["sample", "batch"])
@pytest.mark.parametrize("part", ["all", "branch", "around"])
def test_a_checkpoint_inside_a_block_stays_one(part: str, granularity: str) -> None:
    net = nn.Sequential(Checkpointed(part), Checkpointed(part)).double()
    plain, x = copy.deepcopy(net), data(4).requires_grad_()
    depth = sd.make_stochastic_(net, granularity=granularity)
    calls: list[int] = []
    kept: list[Tensor] = []
    first = torch.tensor([True, False, True, False])
    gates = [first, ~first] if granularity == "sample" else [True, False]
    with depth.gates(gates):
        net(x)  # The proof of the first call is not part of the step.
        net[0].f.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            output = net(x)
        output.sum().backward()
    assert depth.masked == []
    assert calls == ([2, 2] if granularity == "sample" else [4, 4]), "computed again in the backward"
    if part == "all":
        assert all(tensor.data_ptr() != net[0].f.weight.data_ptr() for tensor in kept)
    expected = x
    for block, gate in zip(plain, gates, strict=True):
        weights = 2.0 * gate.double()[:, None] if isinstance(gate, Tensor) else torch.tensor(2.0 * gate)
        expected = gated_checkpointed(block, expected, weights)
    assert_same(output, expected)
    named = dict(plain.named_parameters())
    gradients = torch.autograd.grad(expected.sum(), list(named.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(named, gradients, strict=True):
        own = net.get_parameter(name).grad
        assert_same(torch.zeros_like(gradient) if own is None else own, gradient)


def test_a_selective_checkpoint_is_masked() -> None:
    class Selective(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            save = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
            return checkpoint(self.inner, x, use_reentrant=False, context_fn=save)

    net, x = nn.Sequential(Selective("all")).double(), data(4)
    plain = copy.deepcopy(net)[0]
    depth = sd.make_stochastic_(net)
    gate = torch.tensor([True, False, True, False])
    with depth.gates([gate]), pytest.warns(sd.MaskedBranchWarning, match="selective activation checkpoint"):
        assert_same(net(x), gated_checkpointed(plain, x, 2 * gate.double()[:, None]))


# ------------------------------------------------------------------------- what changes afterward


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.act, self.scales, self.config = linear(), torch.relu, [1.0], {"scale": 1.0}

    def forward(self, x: Tensor, size: tuple[int, int] = (2, 3)) -> Tensor:
        height, width = size
        h = self.f(x).view(-1, height, width).flip(1).reshape(-1, D)
        return x + _helper(self.act(h)) * self.scales[0] * self.config["scale"]


def other_activation(net: nn.Sequential) -> None:
    net[0].act = torch.tanh


def other_list(net: nn.Sequential) -> None:
    net[0].scales[0] = 3.0


def other_dict(net: nn.Sequential) -> None:
    net[0].config["scale"] = 3.0


def other_flag(_net: nn.Sequential) -> None:
    FLAGS.squared = True


@pytest.mark.parametrize("change", [other_activation, other_list, other_dict, other_flag])
def test_what_the_code_reads_may_change(change: Callable[[nn.Sequential], None]) -> None:
    net = nn.Sequential(Reads()).double()
    plain, x = copy.deepcopy(net), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with depth.gates([True]):
        assert_same(net(x), plain(x))
        before = plain(x)
        try:
            change(net), change(plain)
            assert not torch.allclose(plain(x), before)
            assert_same(net(x), plain(x))
        finally:
            FLAGS.squared = False


def test_arguments_of_any_kind_are_part_of_the_form() -> None:
    net = Stack(Reads).double()
    plain, x = copy.deepcopy(net), data(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with depth.gates([True, True]):
        for size in (HW(2, 3), HW(3, 2), (1, 6), [6, 1]):
            assert_same(net(x, size), plain(x, size))


class Doubled(Reads):
    """What tools give to blocks that they patch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.f(x)


def test_a_forward_that_is_set_before_is_gated_and_one_that_bypasses_is_refused() -> None:
    def own(self: nn.Module, x: Tensor, size: tuple[int, int] = (2, 3)) -> Tensor:
        assert size
        return x + 2 * self.f(x)

    net = nn.Sequential(Reads()).double()
    net[0].forward = MethodType(own, net[0])
    x = data(3)
    expected = net(x)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with depth.gates([True]):
        assert_same(net(x), expected)
    with depth.gates([False]):
        assert torch.equal(net(x), x)
    with pytest.raises(RuntimeError, match="would bypass its gates"):
        net[0].forward = MethodType(own, net[0])
    with pytest.raises(RuntimeError, match="would remove its gates"):
        net[0].__class__ = Doubled
    before = net[0].forward
    net[0].forward = lambda x: before(x) + 1
    with depth.gates([False]):
        assert_same(net(x), x + 1)
    del net[0].forward
    sd.restore_(net)
    assert_same(net(x), expected)
    del net[0].forward
    net[0].__class__ = Doubled
    assert_same(net(x), expected)


def test_a_child_that_is_replaced_is_trained_and_its_zeros_are_its_own() -> None:
    net = nn.Sequential(AsksForTensor()).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    x = data(3)
    net(x)
    net[0].f = nn.Sequential(net[0].f, linear().double())
    with depth.gates([False]):
        net(x.requires_grad_()).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net[0].f.parameters())
    with depth.gates([True]):
        assert_same(net(x), x + net[0].f(x))


# ------------------------------------------------------------------------------------------ the proof


def test_a_proof_leaves_no_trace_and_equal_blocks_share_it() -> None:
    net = Stack(lambda: nn.Sequential(Windows(), nn.BatchNorm1d(7), nn.Dropout(0.1)), 4).double()
    hooks: list[int] = []
    net.blocks[0][0].f.register_forward_hook(lambda *_: hooks.append(1))
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    statistics = net.blocks[0][1].running_mean.clone()
    states = torch.get_rng_state(), random.getstate()
    forms = net.blocks[0][0]._stochastic_depth_branch.forms
    with depth.gates([False] * 4), torch.no_grad():
        net.eval()(data(4, 7))
    assert hooks == []
    assert torch.equal(net.blocks[0][1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert len(forms.prepared) == 1, "four equal blocks"
    assert forms.num_runs <= 10
    assert depth.passes.counter == 0


def test_an_encoder_of_pytorch_trains_evaluates_and_is_proven() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 3).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5), rescale="none")
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert len(depth.names) == 6
    with depth.gates([True] * 6):
        assert_same(net(x), plain(x))
    assert_same(net.eval()(x), plain.eval()(x))
    assert depth.verify(x).num_masked == 0
