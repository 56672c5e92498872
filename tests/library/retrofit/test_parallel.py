"""Parallel branches that are added to each other before they are added to the shortcut: each has a gate."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from masked import awake, calls_when_closed
from test_inlined import WIDTH, assert_same, features, multiplied
from torch import Tensor, nn

import stochastic_depth as sd


class Parallel(nn.Module):
    """GPT-NeoX's: the second is written first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        first = self.first(y)
        return self.second(y) + first + x


class ParallelBehind(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        first = self.first(self.norm(x))
        return x + (first + self.second(x))


def of_two(block: type[nn.Module]) -> nn.Module:
    return awake(nn.Sequential(block(), block())).train()


ENDS = ["0.first", "0.second", "1.first", "1.second"]


@pytest.mark.parametrize("block", [Parallel, ParallelBehind])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_each_of_two_parallel_branches_has_a_gate(block: type[nn.Module], granularity: str) -> None:
    original = of_two(block)
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), granularity=granularity)
    assert depth.names == ["0#1", "0#2", "1#1", "1#2"]
    if granularity == "sample":
        gates = [torch.tensor([(row + index) % 3 > 0 for row in range(4)]) for index in range(4)]
    else:
        gates = [True, False, False, True]
    with depth.gates(gates):
        assert_same(model, multiplied(original, ENDS, gates), features())
    assert depth.masked == []
    assert calls_when_closed(model, depth, [features()]) == []
    depth.verify(features())


def test_folded_and_taken_out() -> None:
    original = of_two(Parallel)
    model = copy.deepcopy(original)
    sd.make_stochastic_(model, [0.9, 0.8, 0.7, 0.6])
    smaller = sd.subnetwork(model, [0, 3], inputs=[features()])
    sd.fold_(model, inputs=[features()])
    factors = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    expected = multiplied(original, ENDS, list(factors)).eval()(features())
    torch.testing.assert_close(model(features()), expected, rtol=0, atol=1e-12)
    factors[1:3] = 0
    expected = multiplied(original, ENDS, list(factors)).eval()(features())
    torch.testing.assert_close(smaller.eval()(features()), expected, rtol=0, atol=1e-12)


class BranchInABranch(nn.Module):
    """The value added to the shortcut is a sum with its own shortcut: no parallel branches."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(x)
        return x + (y + self.inner(y))


def test_a_sum_within_a_branch_keeps_its_shortcut() -> None:
    original = awake(nn.Sequential(BranchInABranch())).train()
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    with depth.gates([False, True]):
        assert_same(model, multiplied(original, ["0.inner"], [False]), features())
    with depth.gates([True, False]):
        torch.testing.assert_close(model(features()), features(), rtol=0, atol=0)


class Several(nn.Module):
    """Adds four parallel branches in some order."""

    def __init__(self, total: Callable[..., Tensor]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        return x + self.total([path(x).tanh() for path in self.paths])


@pytest.mark.parametrize(
    "total",
    [
        sum,
        lambda p: p[0] + (p[1] + (p[2] + p[3])),
        lambda p: (p[3] + p[1]) + (p[0] + p[2]),
        lambda p: torch.add(p[0], p[1] + p[2]).add(p[3]),
    ],
)
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_each_of_several_parallel_branches_has_a_gate(total: Callable[..., Tensor], granularity: str) -> None:
    model = awake(nn.Sequential(Several(total), Several(total))).train()
    plain, x = copy.deepcopy(model), features()
    depth = sd.make_stochastic_(model, sd.uniform(0.5), granularity=granularity, rescale="none")
    assert depth.names == [f"{block}#{branch}" for block in range(2) for branch in range(1, 5)]
    some = torch.tensor([[(row + index) % 3 > 0 for row in range(len(x))] for index in range(8)])
    gates = some if granularity == "sample" else some[:, :1].expand_as(some)
    expected = x
    for block, own in zip(plain, gates.view(2, 4, -1), strict=True):
        assert isinstance(block, Several)
        terms = [path(expected).tanh() for path in block.paths]
        expected = expected + sum(term * gate[:, None, None] for term, gate in zip(terms, own, strict=True))
    with depth.gates([gate if granularity == "sample" else bool(gate[0]) for gate in gates]):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert depth.masked == []
    assert calls_when_closed(model, depth, [x]) == []


class BranchesInABranch(nn.Module):
    """Two parallel branches of a value that is itself part of a branch: they are not parallel to it."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.a, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(x)
        return x + (y + (self.a(y) + self.b(y)))


def test_parallel_branches_in_a_branch_keep_their_shortcut() -> None:
    original = awake(nn.Sequential(BranchesInABranch())).train()
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), inputs=[features()])
    for index, end in enumerate(["0.a", "0.b"]):
        model.zero_grad()
        gates = [number != index for number in range(3)]
        with depth.gates(gates):
            assert_same(model, multiplied(original, [end], [False]), features())
    with depth.gates([True, True, False]):
        torch.testing.assert_close(model(features()), features(), rtol=0, atol=0)


def test_gpt_neox_has_two_branches_in_each_layer() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    original = awake(transformers.GPTNeoXModel(config)).train()
    model = copy.deepcopy(original)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    assert depth.names == ["layers.0#1", "layers.0#2", "layers.1#1", "layers.1#2"]
    ends = [f"layers.{i}.{end}" for i in range(2) for end in ("post_attention_dropout", "post_mlp_dropout")]
    tokens = torch.randint(3, 20, (4, 7), generator=torch.Generator().manual_seed(2))
    for gates in ([True, False, False, True], [False, True, True, False]):
        model.zero_grad()
        with depth.gates(gates):
            assert_same(model, multiplied(original, ends, gates), tokens)
    assert depth.masked == []
