"""Calls with arguments of sizes that never repeat, and arguments whose rows may be those of samples or not."""

import copy
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_blocks import D, DropPath, assert_same, data, linear
from torch import Tensor, nn
from torch.nn import functional as F

import stochastic_depth as sd


class Messages(nn.Module):
    """A layer of a graph network: its numbers of nodes and edges are others in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(D), nn.Linear(2 * D, D)

    def branch(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        h = self.norm(x)
        messages = self.f(torch.cat([h[start], h[end]], -1))
        return torch.zeros_like(x).index_add(0, end, messages)

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return x + self.branch(x, start, end)


class Asking(Messages):
    """The same, with another factor in large graphs."""

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        factor = 2 if x.shape[0] > 20 else 1
        return x + factor * self.branch(x, start, end)


class Graph(nn.Module):
    def __init__(self, kind: type[Messages]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, start, end)
        return x


def graph(num_nodes: int, num_edges: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_nodes)
    start, end = torch.randint(num_nodes, (2, num_edges), generator=generator)
    return data(num_nodes, seed=num_nodes), start, end


SIZES = [(11, 25), (13, 31), (17, 40), (19, 41), (23, 52), (29, 61), (31, 75), (10, 21), (37, 83)]


@pytest.mark.parametrize("kind", [Messages, Asking])
def test_each_size_equals_the_plain_formula(kind: type[Messages]) -> None:
    torch.manual_seed(0)
    net = Graph(kind).double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    gates = [True, False, True]
    for num_nodes, num_edges in SIZES:
        x, start, end = graph(num_nodes, num_edges)
        with depth.gates(gates):
            actual = net(x, start, end)
        expected = x
        for layer, gate in zip(plain.layers, gates, strict=True):
            assert isinstance(layer, Messages)
            factor = 2 if kind is Asking and num_nodes > 20 else 1
            expected = expected + gate * factor * layer.branch(expected, start, end)
        assert_same(actual, expected)
        net.zero_grad()
        plain.zero_grad()
        actual.square().sum().backward()
        expected.square().sum().backward()
        for mine, its in zip(net.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert its.grad is not None
            assert_same(mine.grad, its.grad)


def num_prepared(kind: type[Messages]) -> int:
    net = Graph(kind).double()
    sd.make_stochastic_(net, sd.uniform(0.5))
    for sizes in SIZES:
        net(*graph(*sizes))
    layer = net.layers[0]
    return len(layer._stochastic_depth_branch.forms.prepared)  # pyright: ignore


def test_code_that_asks_for_no_sizes_is_prepared_once() -> None:
    # The first layer is given what requires no gradient, and the others what does.
    assert num_prepared(Messages) == 2
    assert num_prepared(Asking) == 2 * len(SIZES)


class Attention(nn.Module):
    """Attends from its first argument to the keys and values of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.q = linear()

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor] | list[Tensor]) -> Tensor:
        k, v = kv
        return (self.q(x) @ k.transpose(-1, -2)).softmax(-1) @ v


class SharedKeys(nn.Module):
    """Two branches that are given the same keys and values, in a tuple or a list."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.kv, self.a, self.b = kind, nn.Linear(D, 2 * D), Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        kv = self.kind(self.kv(x).chunk(2, -1))
        x = x + self.a(x, kv)
        return x + self.b(x, kv)


@pytest.mark.parametrize("kind", [tuple, list])
def test_tuples_and_lists_are_cut_to_the_surviving_samples(kind: type) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(SharedKeys(kind)).double()
    plain = copy.deepcopy(net)[0]
    assert isinstance(plain, SharedKeys)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    gates = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.float64)
    x = data(4, 3)
    with depth.gates([*gates.bool()]):
        actual = net(x)
    k, v = plain.kv(x).chunk(2, -1)
    expected = x + gates[0, :, None, None] * plain.a(x, (k, v))
    expected = expected + gates[1, :, None, None] * plain.b(expected, (k, v))
    assert_same(actual, expected)
    with depth.gates([False, False]):
        net(x).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in net.parameters())


class ToTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = linear(), linear()

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        keys = self.k(table)
        return (self.q(x) @ keys.T).softmax(-1) @ keys


class Prototypes(nn.Module):
    """Attends to a table that all samples share, and that may have as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.f = ToTable()

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + self.f(x, table)


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.table = Prototypes(), nn.Parameter(torch.randn(5, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.table)


@pytest.mark.parametrize("num_samples", [5, 3, 10, 1])
def test_a_table_may_have_as_many_rows_as_there_are_samples(num_samples: int) -> None:
    torch.manual_seed(0)
    net = WithTable().double()
    plain = copy.deepcopy(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    gate = torch.arange(num_samples) % 2 == 0
    x = data(num_samples)
    with depth.gates([gate]):
        assert_same(net(x), x + gate[:, None] * plain.block.f(x, plain.table))


class Sorted(nn.Module):
    """Mixes each sample with another one, in an order by random numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = linear(), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "topk":
            order = torch.rand(len(x)).topk(len(x)).indices
        else:
            order = (torch.randn if self.kind == "randn" else torch.rand)(len(x)).argsort()
        return self.f(x + x[order])


class AroundSorted(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Sorted(kind)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("kind", ["topk", "randn", "rand"])
def test_samples_that_are_exchanged_at_random_are_noticed(kind: str) -> None:
    net = nn.Sequential(AroundSorted(kind)).double()
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    with pytest.raises(RuntimeError, match="its first dimension is not one of independent samples"):
        net(data(8))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm, self.drop = linear(), nn.BatchNorm1d(D), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.f(x)).tanh())


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(Plain())


class AroundScripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = scripted()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_scripted_child_is_skipped(granularity: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(scripted(), AroundScripted()).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity, rescale="none")
    before = {name: value.clone() for name, value in net.state_dict().items() if name.startswith("1.")}
    x = data(4)
    net.eval()
    with depth.gates([True]):
        y = net[0](x)
        inner = net[1].inner
        assert_same(net(x), y + inner(y))
    net.train()
    with depth.gates([False]):
        net(x).sum().backward()  # the proof for training leaves no trace either
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(each.grad is not None and not each.grad.any() for each in net[1].parameters())
    depth.verify(x)


class Counting(nn.Module):
    """A layer that counts its runs."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        Counting.runs += 1
        return x + self.f(x)


def test_a_layer_is_not_tried_with_every_length() -> None:
    net = nn.Sequential(Counting()).double()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), layers=["0"], granularity="sample")
    Counting.runs = 0
    with depth.gates([torch.tensor([True, False, True])]):
        for length in range(1, 33):
            net(data(3, length))
    # 32 calls, and two runs each with the lengths 1, 2, 4, 8, 16 and 32; one more finds what the layer returns.
    assert Counting.runs - 32 <= 2 * 6 + 1


_told = {"tokens": 0}


class Telling(nn.Module):
    """A child that tells the block the number of tokens."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.f, self.place, self.told = linear(), place, SimpleNamespace(tokens=0)

    def forward(self, x: Tensor, info: dict[str, int] | None = None) -> tuple[Tensor, int | None]:
        tokens = x.shape[1]
        if info is not None:
            info["tokens"] = tokens
        if self.place == "global":
            _told["tokens"] = tokens
        self.told.tokens = tokens if self.place == "object" else 0
        return self.f(x), tokens if self.place == "output" else None


class Told(nn.Module):
    """A block that divides by the number of tokens, for which it does not ask itself."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.child, self.g, self.place, self.told = Telling(place), linear(), place, SimpleNamespace(tokens=0)
        self.child.told = self.told

    def forward(self, x: Tensor) -> Tensor:
        info: dict[str, int] = {}
        h, tokens = self.child(x, info) if self.place == "dict" else self.child(x)
        if self.place == "dict":
            tokens = info["tokens"]
        elif self.place == "global":
            tokens = _told["tokens"]
        elif self.place == "object":
            tokens = self.told.tokens
        return x + self.g(h) / tokens


@pytest.mark.parametrize("place", ["output", "dict"])
def test_a_size_that_a_child_tells_is_that_of_the_call(place: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Told(place)).double()
    plain = copy.deepcopy(net)[0]
    assert isinstance(plain, Told)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), rescale="none", inputs=[data(3, 4)])
    for tokens in (4, 4, 7, 3, 9, 4, 6, 5, 8):
        x = data(3, tokens)
        with depth.gates([True]):
            assert_same(net(x), x + plain.g(plain.child.f(x)) / tokens)


@pytest.mark.parametrize("place", ["global", "object"])
def test_a_size_that_a_child_tells_by_way_of_others_is_refused(place: str) -> None:
    net = nn.Sequential(Told(place)).double()
    with pytest.raises(ValueError, match="not looked into, the forward changes"):
        sd.make_stochastic_(net, sd.uniform(0.5), inputs=[data(3, 4)])


def test_modes_of_the_parts_of_a_scripted_child_stay() -> None:
    net = nn.Sequential(AroundScripted()).double()
    net[0].inner.norm.eval()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    net(data(4))
    depth.verify(data(4))
    assert [module.training for module in net[0].inner.modules()] == [True, True, False, True]


class Selecting(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[mask]


class CountingValues(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> int:
        return x[mask].shape[0]


class Scaled(nn.Module):
    """Divides its branch by a number that depends on the values of its mask."""

    def __init__(self, number: Callable[..., Any]) -> None:
        super().__init__()
        self.f, self.drop_path, self.number = linear(), DropPath(0.5), number
        self.identity, self.select, self.count = nn.Identity(), Selecting(), CountingValues()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x) / (1 + self.number(self, x, mask)))


def packed(_block: Scaled, x: Tensor, mask: Tensor) -> int:
    lengths = mask.sum().expand(len(x))
    return nn.utils.rnn.pack_padded_sequence(x[:, None].expand(-1, 6, -1), lengths, batch_first=True).data.shape[0]


@torch.library.custom_op("stochastic_depth_tests::selected", mutates_args=())
def selected(x: Tensor, mask: Tensor) -> Tensor:
    """An operator of an extension, which does not say that it reads values."""
    return x[mask]


@selected.register_fake
def _(x: Tensor, _mask: Tensor) -> Tensor:
    return torch.empty_like(x)


NUMBERS: dict[str, Callable[..., Any]] = {
    "loop": lambda _block, _x, mask: sum(1 for _ in mask.cumsum(0).unique()),
    "unbind": lambda _block, x, mask: len(x[mask].unbind()),
    "chunk": lambda _block, x, mask: len(x[mask].split(1)),
    "one_hot": lambda _block, _x, mask: F.one_hot(mask.long().cumsum(0)).shape[1],
    "slice": lambda _block, x, mask: x[: mask.sum()].shape[0],
    "slices": lambda _block, x, mask: x[:, : mask.sum()].numel(),
    "arange": lambda _block, _x, mask: len(torch.arange(mask.sum())),
    "zeros": lambda _block, _x, mask: torch.zeros(mask.sum(), 2).shape[0],
    "full": lambda _block, _x, mask: len(torch.full((mask.sum(),), 0.5)),
    "new_full": lambda _block, x, mask: x.new_full((mask.sum(), 2), 0.5).shape[0],
    "expand": lambda _block, x, mask: x[:1].expand(mask.sum(), -1).shape[0],
    "repeat": lambda _block, x, mask: x.repeat(mask.sum(), 1).shape[0],
    "pad": lambda _block, x, mask: F.pad(x, (0, mask.sum())).shape[1],
    "topk": lambda _block, x, mask: x.topk(mask.sum(), 0).values.shape[0],
    "split": lambda _block, x, mask: len(x.split(mask.sum())),
    "sparse": lambda _block, _x, mask: mask.double().to_sparse().indices().shape[1],
    "packed": packed,
    "after other functions": lambda _block, x, mask: torch.cat([x[mask] * 2, x]).T.shape[1],
    "one mask": lambda _block, x, mask: x[mask.sum() > 3].shape[0],
    "an extension": lambda _block, x, mask: selected(x.detach(), mask).shape[0],
    "through a child": lambda block, x, mask: block.identity(x[mask]).shape[0],
    "of a child": lambda block, x, mask: block.select(x, mask).shape[0],
    "a child's number": lambda block, x, mask: block.count(x, mask),
    "as text": lambda _block, _x, mask: float(f"{mask.sum().double():.1f}"),
    "by way of NumPy": lambda _block, _x, mask: int(np.from_dlpack(mask.long()).sum()),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_depends_on_values_is_that_of_the_call(name: str) -> None:
    torch.manual_seed(0)
    block = Scaled(NUMBERS[name]).double()
    reference = copy.deepcopy(block)
    depth = sd.make_stochastic_(block, granularity="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.MaskedBranchWarning)
        for call, count in enumerate((3, 3, 4, 5, 4, 6, 1, 2)):
            x, mask = data(6, seed=call), torch.arange(6) < count
            with depth.gates([True]):
                found = block(x, mask)
            assert_same(found, x + 2 * reference.f(x) / (1 + NUMBERS[name](reference, x, mask)))
    assert depth.masked
    assert re.search("depends? on .*the values of|where a tensor is stored", str(depth))
