"""Sums in other words: each is a residual branch, and equals its own formula with a gate written into it."""

import copy
from collections.abc import Callable

import pytest
import torch
from plain_blocks import D, assert_same, data, linear
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.retrofit.recording.layouts import in_order


class Adding(nn.Module):
    """Adds its branch as `formula(block, x, branch)` says."""

    def __init__(self, formula: Callable[["Adding", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.f, self.a = (
            nn.LayerNorm(D),
            nn.Sequential(linear(), nn.Tanh(), linear()),
            nn.Parameter(torch.tensor(0.3)),
        )
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x, self.f(self.norm(x)))


def assert_same_with_gradients(net: nn.Module, actual: Tensor, plain: nn.Module, expected: Tensor) -> None:
    """Compare outputs, and the gradients of parameters, where none is what a closed gate may leave instead of zeros."""
    assert_same(actual, expected)
    for module, output in ((net, actual), (plain, expected)):
        module.zero_grad()
        output.square().sum().backward()
    for mine, its in zip(net.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) <= (its.grad is None)
        zeros = torch.zeros_like(mine)
        assert_same(zeros if mine.grad is None else mine.grad, zeros if its.grad is None else its.grad)


def minus(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return x - f


def minus_in_place(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    x = x.clone()
    x -= f
    return x


def branch_changed_in_place(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    f.add_(x)
    return f


def shortcut_changed_in_place(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    x = x.clone()
    x.add_(f)
    return x.tanh()


def sub_with_alpha(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return torch.sub(x, f, alpha=0.25)


def by_name(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return torch.add(x, other=f)


def all_by_name(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return torch.sub(input=x, other=f, alpha=0.25)


def magnitude_preserving(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return x.lerp(f, 0.3) / (0.7**2 + 0.3**2) ** 0.5


def learned_lerp(block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return torch.lerp(x, f, block.a)


def learned_shares(block: Adding, x: Tensor, f: Tensor) -> Tensor:
    share = torch.sigmoid(block.a)
    return torch.sqrt(1 - share) * x + torch.sqrt(share) * f


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize(
    "formula",
    [
        *(minus, minus_in_place, branch_changed_in_place, shortcut_changed_in_place, sub_with_alpha, by_name),
        *(all_by_name, magnitude_preserving, learned_lerp, learned_shares),
    ],
)
def test_a_sum_in_other_words_is_a_branch(formula: Callable[..., Tensor], granularity: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Adding(formula), Adding(formula)).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    assert depth.names == ["0#1", "1#1"]
    gates = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    if granularity == "batch":
        gates = torch.tensor([[0.0] * 4, [1.0] * 4], dtype=torch.float64)
    x = data(4)
    with depth.gates([gate.bool() if granularity == "sample" else bool(gate[0]) for gate in gates]):
        actual = net(x)
    expected = x
    for block, gate in zip(plain, gates, strict=True):
        assert isinstance(block, Adding)
        expected = formula(block, expected, gate[:, None] * block.f(block.norm(expected)))
    assert_same_with_gradients(net, actual, plain, expected)


def in_one_matrix(f: Tensor, other: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(x, f, other)


def in_one_matrix_in_place(f: Tensor, other: Tensor, x: Tensor) -> Tensor:
    return x.clone().addmm_(f, other)


def batch_of_matrices(f: Tensor, other: Tensor, x: Tensor) -> Tensor:
    return torch.baddbmm(x, f, other)


def batch_of_matrices_in_place(f: Tensor, other: Tensor, x: Tensor) -> Tensor:
    return x.clone().baddbmm_(f, other)


class AddsAProduct(nn.Module):
    """Adds a product of matrices in the same call."""

    def __init__(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.weight, self.formula = nn.LayerNorm(D), nn.Parameter(torch.randn(D, D)), formula

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.norm(x).tanh()
        return (f, self.weight) if x.ndim == 2 else (f, f.mT @ f @ self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(*self.factors(x), x)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize(
    "formula", [in_one_matrix, in_one_matrix_in_place, batch_of_matrices, batch_of_matrices_in_place]
)
def test_a_product_that_is_added_in_the_same_call_is_a_branch(
    formula: Callable[[Tensor, Tensor, Tensor], Tensor], granularity: str
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(AddsAProduct(formula), AddsAProduct(formula)).double()
    plain, x = copy.deepcopy(net), torch.randn(*((4, 3) if "batch" in formula.__name__ else (4,)), D).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    assert depth.names == ["0#1", "1#1"]
    some = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool()
    gates = some if granularity == "sample" else torch.tensor([[False] * 4, [True] * 4])
    expected = x
    for block, gate in zip(plain, gates, strict=True):
        assert isinstance(block, AddsAProduct)
        f, other = block.factors(expected)
        expected = expected + gate.view(-1, *[1] * (x.ndim - 1)) * (f @ other)
    with depth.gates([gate if granularity == "sample" else bool(gate[0]) for gate in gates]):
        actual = net(x)
    assert_same_with_gradients(net, actual, plain, expected)
    assert depth.masked == []


class OwnLinear(nn.Module):
    """What `addmm` usually is: a linear map, whose bias is no shortcut (GPT-2's Conv1D)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.addmm(self.bias, x, self.weight).tanh()


def test_a_bias_is_no_shortcut() -> None:
    net = nn.Sequential(OwnLinear(), OwnLinear()).double()
    assert sd.make_stochastic_(net, sd.uniform(0.5)).names == ["0#1", "1#1"]


def reversed_minus(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return f - x


def test_what_is_subtracted_is_no_shortcut() -> None:
    net = nn.Sequential(Adding(reversed_minus), Adding(minus))
    assert sd.make_stochastic_(net, sd.uniform(0.5)).names == ["1#1"]


class Widening(nn.Module):
    """A residual block with a projection as its shortcut."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.project, self.f = (
            nn.Linear(num_in, num_out),
            nn.Sequential(nn.Linear(num_in, num_out), nn.Tanh(), nn.Linear(num_out, num_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.f(x)


class Same(nn.Module):
    def __init__(self, num: int) -> None:
        super().__init__()
        self.f = nn.Linear(num, num)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Denoiser(nn.Module):
    """A network with a shortcut around all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = Widening(D, 2 * D), Same(2 * D), Widening(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.middle(self.down(x)))


def test_a_shortcut_around_a_network_leaves_the_blocks_of_the_network() -> None:
    net = Denoiser().double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    assert depth.names == ["1", "down#1", "middle#1", "up#1"]
    depth.verify(data(3))


class InOtherOrder(nn.Module):
    """A convolution over time on (N, T, C), whose result lies in memory as (N, C, T), and comes first in the sum."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.f, self.in_place = nn.Conv1d(D, D, 3, padding=1), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x.transpose(1, 2)).transpose(1, 2)
        if self.in_place:
            y += x
            return y
        return y + x


@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_that_lies_in_another_order_than_its_shortcut_runs_on_some_of_the_samples(*, in_place: bool) -> None:
    net = nn.Sequential(*[InOtherOrder(in_place=in_place) for _ in range(3)]).double()
    plain, x = copy.deepcopy(net), torch.randn(6, 5, D, dtype=torch.float64)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    for _ in range(9):  # It is recorded again in some of the calls.
        net(x)
    gates = torch.tensor([[1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    expected = x
    for block, gate in zip(plain, gates, strict=True):
        expected = expected + gate.view(-1, 1, 1) * block.f(expected.mT).mT
    with depth.gates(list(gates)):
        actual = net(x)
    assert_same(actual, expected)
    assert actual.stride() == plain(x).stride()
    assert depth.verify(x).num_masked == 0


class Streams(nn.Module):
    """Two streams in one argument, each with a branch, and an exchange between them, which is no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.exchange = linear(), linear(), linear()

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        a, b = streams
        a, b = a + self.f(a), b + self.g(b)
        return [a + self.exchange(b).relu(), b]


@pytest.mark.parametrize("by_example", [False, True])
def test_streams_in_one_argument_are_no_common_source(*, by_example: bool) -> None:
    net, streams = nn.Sequential(Streams(), Streams()).double(), [data(3), data(3, seed=1)]
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), inputs=[streams] if by_example else None)
    assert depth.names == ["0#1", "0#2", "1#1", "1#2"]
    gates = [True, False, False, True]
    a, b = streams
    for block, (first, second) in zip(plain, [gates[:2], gates[2:]], strict=True):
        a, b = a + first * block.f(a), b + second * block.g(b)
        a = a + block.exchange(b).relu()
    with depth.gates(gates):
        for actual, expected in zip(net(streams), (a, b), strict=True):
            assert_same(actual, expected)


class Sliced(nn.Module):
    """Attention over two streams, of whose result one half is taken apart and not used (the last block of MM-DiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = linear(), linear(), linear()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        both = torch.cat([x, context], 1)
        mixed = (self.q(both) @ self.k(both).mT).softmax(-1) @ both
        own, _rest = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
        return x + self.o(own)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_view_that_nothing_uses_keeps_nothing_of_a_branch_running(granularity: str) -> None:
    net = nn.ModuleList([Sliced()]).double()
    x, context = torch.randn(2, 4, 3, D, dtype=torch.float64)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
    net[0](x, context)
    calls: list[int] = []
    net[0].q.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    with depth.gates([False]):
        assert torch.equal(net[0](x, context), x)
    assert calls == []


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_an_expanded_branch_may_come_first_in_the_sum(order: tuple[int, ...], granularity: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x.mean(1, keepdim=True)).expand_as(x) + x

    net = nn.Sequential(Pooled()).double()
    plain, x = copy.deepcopy(net), in_order(torch.randn(4, 3, D, dtype=torch.float64), order)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
    for is_open in (True, False):
        with depth.gates([is_open]):
            actual = net(x)
        assert_same(actual, plain(x) if is_open else x)
        assert actual.stride() == plain(x).stride()


def add_in_place(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    x += f
    return x


def add_to_a_view(_block: Adding, x: Tensor, f: Tensor) -> Tensor:
    x.view(-1, D).add_(f)
    return x


def add_product_in_place(block: Adding, x: Tensor, f: Tensor) -> Tensor:
    return x.addcmul_(f, block.a)


class AddingInPlace(Adding):
    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x, self.f(x.tanh()))  # Not of the norm, whose backward needs x as it was.


class KeepsStates(nn.Module):
    """Keeps the tensors that its blocks change, and uses one block for that change only."""

    def __init__(self, formula: Callable[[Adding, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.blocks = linear(), nn.ModuleList(AddingInPlace(formula) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        x = self.blocks[0](x)
        self.blocks[1](x)
        x = self.blocks[2](x * 2)
        return torch.stack([first, x])


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("formula", [add_in_place, add_to_a_view, add_product_in_place])
def test_the_caller_of_a_block_sees_what_is_added_in_place(formula: Callable[..., Tensor], granularity: str) -> None:
    torch.manual_seed(0)
    net, x = KeepsStates(formula).double(), data(4)
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    some = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0]]).bool()
    for gates in (some, ~some, torch.ones_like(some)):
        gates = gates if granularity == "sample" else gates[:, :1].expand_as(gates)
        with depth.gates([gate if granularity == "sample" else bool(gate[0]) for gate in gates]):
            actual = net(x)
        first = value = plain.stem(x)
        for index, (block, gate) in enumerate(zip(plain.blocks, gates, strict=True)):
            value = value * 2 if index == 2 else value
            value = block.formula(block, value, gate[:, None] * block.f(value.tanh()))
        expected = torch.stack([first, value])
        assert_same_with_gradients(net, actual, plain, expected)
    assert depth.masked == []
    depth.verify(x)


class OfTheMean(nn.Module):
    """Adds a branch of several rows to a shortcut of one row, which therefore cannot take the place of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.rows = linear(), nn.Parameter(torch.randn(5, D))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return mean + self.f(mean * self.rows)


def test_a_sum_that_is_larger_than_its_shortcut_is_named() -> None:
    net, x = nn.Sequential(OfTheMean(), Same(D)), torch.randn(4, 3, D)
    depth = sd.make_stochastic_(copy.deepcopy(net), sd.uniform(0.5), inputs=[x])
    assert depth.names == ["1#1"]
    why = "the sum has another shape than its shortcut"
    assert f"no branch: 0 (OfTheMean): an addition has no gate, {why}" in str(depth)
    sd.make_stochastic_(net, sd.uniform(0.5))  # Without an example, shapes are not known.
    with pytest.raises(RuntimeError, match=why):
        net(x)
