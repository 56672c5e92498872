"""depth.cost(measure=True) with a clock that counts work: a branch takes the time that a step without it saves."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import conv_net, images, mlp, vectors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth import branch_times

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


class Work(TorchDispatchMode):
    """Counts the numbers that operations compute: the time of a machine on which each takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            for value in output if isinstance(output, (tuple, list)) else (output,):
                self.seconds += value.numel() if isinstance(value, Tensor) else 0
        return output


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()

    def differences(marks: list[float]) -> list[float]:
        return [after - before for before, after in itertools.pairwise(marks)]

    monkeypatch.setattr(branch_times, "_clock", lambda _device: (lambda: work.seconds, differences))
    return work


def step_work(work: Work, net: nn.Module, x: Tensor) -> float:
    parameters = list(net.parameters())
    before = work.seconds
    with work:
        torch.autograd.grad(net(x).sum(), parameters, allow_unused=True)
    return work.seconds - before


class After(nn.Module):
    """A block whose shortcut computes after its branch, as torchvision's and timm's ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.carry = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.two(self.one(x).tanh())
        out += self.carry(x).tanh()
        return out


class Block(nn.Module):
    """A user's block with a drop path; two tensors go into its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).tanh()
        return x + self.two(x * y).tanh()


class Parallel(nn.Module):
    """Two branches of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x) + self.two(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = sd.Residual(branch())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def stem_and(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *blocks, nn.ReLU(), nn.Linear(6, 3)).double()


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def shared() -> nn.Module:
    same = sd.Residual(branch())
    return stem_and(same, nn.ReLU(), same)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "identity": (mlp, vectors),
    "convolutions": (conv_net, images),
    "shortcut first": (lambda: stem_and(sd.Residual(branch(), nn.Linear(6, 6)), sd.Residual(branch())), vectors),
    "shortcut after": (lambda: stem_and(After(), After()), vectors),
    "nothing below": (lambda: nn.Sequential(sd.Residual(nn.Linear(5, 5)), nn.Linear(5, 5)).double(), vectors),
    "somebody's": (lambda: stem_and(Block(), nn.ReLU(), Block()), vectors),
    "used twice": (shared, vectors),
    "in place": (lambda: stem_and(sd.Residual(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)))), vectors),
}


NOT_ITS_OWN = {
    # The gradient of a shortcut that computes before the branch is there later, and is added outside of the branch.
    ("convolutions", 2): 4 * 4 * 8 * 8,
    ("shortcut first", 0): 4 * 6,
    ("shortcut after", 0): 4 * 6,  # in the block's own code; its recorded code computes the branch last
    ("shortcut after", 1): 4 * 6,
    # Nothing else needs the gradient that the head computes for it.
    ("nothing below", 0): 4 * 5,
}


@pytest.mark.parametrize("kind", NETS)
def test_a_branch_takes_the_time_that_a_step_saves_without_it(kind: str, work: Work) -> None:
    make, inputs = NETS[kind]
    net, x = make(), inputs(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), skipped_grad="none")
    with work:
        cost = depth.cost(x, measure=True)
    names = depth.names
    with depth.gates([True] * len(names)):
        step_work(work, net, x)
        whole = step_work(work, net, x)
    assert cost.total.time_s == whole
    for index, each in enumerate(cost.branches):
        with depth.gates([other != index for other in range(len(names))]):
            less = whole - step_work(work, net, x)
        assert each.time_s + NOT_ITS_OWN.get((kind, index), 0) == pytest.approx(less), each.name


def test_nested_branches_have_separate_times(work: Work) -> None:
    inner = sd.Residual(nn.Linear(6, 6))
    net, x = stem_and(sd.Residual(nn.Sequential(nn.Linear(6, 6), inner, nn.Tanh()))), vectors(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), skipped_grad="none")
    with work:
        cost = depth.cost(x, measure=True)
    taken = []
    for gates in ([True, True], [True, False], [False, False]):
        with depth.gates(gates):
            taken.append(step_work(work, net, x))
    # The sum of the inner branch is part of the outer one.
    assert cost.branches[1].time_s == pytest.approx(taken[0] - taken[1])
    assert sum(each.time_s for each in cost.branches) == pytest.approx(taken[0] - taken[2])
    assert cost.share_of_time([1.0, 0.0]) == pytest.approx(taken[1] / taken[0])
    assert cost.share_of_time([0.0, 1.0]) == pytest.approx(taken[2] / taken[0])


def test_parallel_branches_share_the_time_between_them(work: Work) -> None:
    net, x = stem_and(Parallel()), vectors(4)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), skipped_grad="none")
    assert len(depth.names) == 2
    with work:
        cost = depth.cost(x, measure=True)
    with depth.gates([True, True]):
        whole = step_work(work, net, x)
    with depth.gates([False, False]):
        less = whole - step_work(work, net, x)
    assert sum(each.time_s for each in cost.branches) + 4 * 6 == pytest.approx(less)  # one sum of their gradients


def test_a_recomputed_branch_takes_its_forward_twice(work: Work) -> None:
    times = []
    for block in (sd.Residual(branch()), Checkpointed()):
        with work:
            cost = sd.make_stochastic_(stem_and(block), sd.uniform(0.5)).cost(vectors(4), measure=True)
        times.append(cost.branches[0].time_s)
    assert times[1] - times[0] == 4 * (8 + 8)  # not the last layer, whose output nothing needs


def test_expected_share_of_time(work: Work) -> None:
    depth = sd.make_stochastic_(conv_net(), [0.9, 0.7, 0.5, 0.3])
    with work:
        cost = depth.cost(images(4), measure=True)
    seconds = [each.time_s for each in cost.branches]
    saved = sum(s * t for s, t in zip([0.1, 0.3, 0.5, 0.7], seconds, strict=True)) / cost.total.time_s
    assert cost.time_share == pytest.approx(1 - saved)
    assert cost.share_of_time([1.0] * 4) == 1.0
    counted = depth.cost(images(4))
    assert (counted.time_share, counted.share_of_time([1.0] * 4), counted.total.time_s) == (None, None, None)
    assert (cost.flops_share, cost.activation_share) == (counted.flops_share, counted.activation_share)


def test_times_are_printed() -> None:
    cost = sd.make_stochastic_(mlp(), sd.uniform(0.5)).cost(vectors(4), measure=True)
    lines = str(cost).splitlines()
    assert lines[0].endswith("gradients, time when open")
    assert lines[1].split()[-1] == f"{cost.branches[0].time_s / cost.total.time_s:.2%}"
    assert lines[-1].split()[-1] == f"{cost.time_share:.2%}"


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_real_clock(device: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    cost = sd.make_stochastic_(conv_net().to(device), sd.uniform(0.5)).cost(images(4).to(device), measure=True)
    assert all(each.time_s > 0 for each in cost.branches)
    assert sum(each.time_s for each in cost.branches) < cost.total.time_s
    assert 0.5 < cost.time_share < 1


def test_equal_cost_evens_out_time(work: Work) -> None:
    """Every step takes the expected time to within one largest branch, which equal numbers of FLOPs do not give."""
    net = nn.Sequential(
        nn.Linear(5, 5), *(sd.Residual(nn.Sequential(nn.Linear(5, 5), *[nn.Tanh()] * n)) for n in (60, 1, 60, 0, 60, 2))
    )
    depth = sd.make_stochastic_(net, sd.uniform(0.5), draw="equal_cost", seed=1)
    with work:
        cost = depth.cost(torch.randn(2, 5), measure=True)
    seconds = [each.time_s for each in cost.branches]
    largest, expected = max(seconds), sum(seconds) / 2
    depth.set_costs(depth.cost(torch.randn(2, 5)))
    assert max(abs(taken - expected) for taken in times_of_draws(depth, net, seconds)) > largest
    depth.set_costs(cost)
    assert max(abs(taken - expected) for taken in times_of_draws(depth, net, seconds)) <= largest * (1 + 1e-9)
    assert depth.state_dict()["costs"] == seconds


def times_of_draws(depth: sd.Controller, net: nn.Module, seconds: list[float]) -> list[float]:
    taken = []
    for _ in range(200):
        net(torch.zeros(1, 5))
        taken.append(sum(gate * each for gate, each in zip(depth.last_gates or [], seconds, strict=True)))
    return taken


def test_measured_costs_are_refused_on_one_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    depth = sd.make_stochastic_(mlp(), sd.uniform(0.5), draw="equal_cost")
    measured, counted = depth.cost(vectors(4), measure=True), depth.cost(vectors(4))
    monkeypatch.setattr(sys.modules[sd.Controller.__module__], "has_several_ranks", lambda: True)
    depth.set_costs(counted)
    with pytest.raises(ValueError, match=r"^All ranks need the same costs, but measured times differ"):
        depth.set_costs(measured)
    assert depth.state_dict()["costs"] == [each.training_flops for each in counted.branches]


@pytest.mark.parametrize("where", ["all", "some"])
def test_a_model_on_no_single_real_device_cannot_be_timed(where: str) -> None:
    net = mlp()
    net.to("meta") if where == "all" else net.head.to("meta")
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    found = {"all": "meta", "some": "cpu, meta"}[where]
    with pytest.raises(ValueError, match=rf"^The time of a step is measured on one real device, but .* is on {found}"):
        branch_times.with_times(None, net, depth.passes, [vectors(4)])
