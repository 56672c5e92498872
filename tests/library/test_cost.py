"""depth.cost against FlopCounterMode, against arithmetic by hand, and against what a step really executes."""

from __future__ import annotations

import random
import statistics

import pytest
import reference
import torch
from reference import (
    assert_same,
    buffers,
    conv_flops,
    conv_net,
    copied,
    every_pattern,
    gradients,
    images,
    linear_flops,
    loss_of,
    mlp,
    pattern_prob,
    state_of,
    vectors,
)
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from stochastic_depth.gates import draw_counts

SURVIVAL_PROBS = [0.9, 0.7, 0.5, 0.3]
NETS = {"mlp": (mlp, vectors), "conv": (conv_net, images)}
both_nets = pytest.mark.parametrize(("make", "inputs"), NETS.values(), ids=NETS)
both_granularities = pytest.mark.parametrize("granularity", ["batch", "sample"])
MEASUREMENTS = {
    "cost": lambda depth, x: depth.cost(x),
    "times": lambda depth, x: depth.cost(x, measure=True),
    "verify": lambda depth, x: depth.verify(x),
}
every_measurement = pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
both_skipped_grads = pytest.mark.parametrize("skipped_grad", ["zero", "none"])


def step_flops(net: nn.Module, x: Tensor) -> int:
    """FLOPs of one forward and backward, by PyTorch's own counter."""
    net.zero_grad()
    with FlopCounterMode(display=False) as counter:
        loss_of(net(x)).backward()
    return counter.get_total_flops()


def conv_net_flops(num_samples: int) -> tuple[int, list[int]]:
    """The whole of `reference.conv_net`, and each of its branches, by hand."""
    stem = conv_flops(num_samples, 3, 4, 3, 8, grad_input=False)
    carry = conv_flops(num_samples, 4, 6, 1, 4)
    head = linear_flops(num_samples, 6, 4)
    branches = [
        2 * conv_flops(num_samples, 4, 4, 3, 8),
        2 * conv_flops(num_samples, 4, 4, 3, 8),
        conv_flops(num_samples, 4, 6, 3, 4) + conv_flops(num_samples, 6, 6, 3, 4),
        2 * conv_flops(num_samples, 6, 6, 3, 4),
    ]
    return stem + carry + head + sum(branches), branches


def mlp_flops(num_samples: int) -> tuple[int, list[int]]:
    branches = [linear_flops(num_samples, 6, 8) + linear_flops(num_samples, 8, 6)] * 4
    rest = linear_flops(num_samples, 5, 6, grad_input=False) + linear_flops(num_samples, 6, 3)
    return rest + sum(branches), branches


# ---------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(("kind", "by_hand"), [("mlp", mlp_flops), ("conv", conv_net_flops)], ids=["mlp", "conv"])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_flops_by_hand(kind: str, by_hand, num_samples: int) -> None:
    make, inputs = NETS[kind]
    total, branches = by_hand(num_samples)
    net = make()
    assert step_flops(net, inputs(num_samples)) == total
    cost = sd.make_stochastic_(net, SURVIVAL_PROBS).cost(inputs(num_samples))
    assert cost.total.training_flops == total
    assert [branch.training_flops for branch in cost.branches] == branches
    expected = (total - sum((1 - p) * flops for p, flops in zip(SURVIVAL_PROBS, branches, strict=True))) / total
    assert cost.flops_share == pytest.approx(expected, abs=1e-14)


@both_nets
@both_skipped_grads
@both_granularities
def test_executed_flops_are_the_exact_sum_over_open_branches(make, inputs, skipped_grad: str, granularity: str) -> None:
    net, x = make(), inputs(6)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, skipped_grad=skipped_grad)
    cost = depth.cost(x)
    rest = cost.total.training_flops - sum(branch.training_flops for branch in cost.branches)
    executed_of = []
    for _ in range(25):
        executed = step_flops(net, x)
        shares = depth.last_gates
        exact = rest + sum(s * branch.training_flops for s, branch in zip(shares, cost.branches, strict=True))
        assert executed == pytest.approx(exact, rel=1e-12)
        assert executed / cost.total.training_flops == pytest.approx(cost.share(shares), rel=1e-12)
        executed_of.append(executed)
    assert len(set(executed_of)) >= 3


@both_nets
def test_a_branch_is_all_open_minus_it_closed(make, inputs) -> None:
    net, x = make(), inputs(4)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    cost = depth.cost(x)
    with depth.gates([True] * 4):
        whole = step_flops(net, x)
    assert cost.total.training_flops == whole
    for index, branch in enumerate(cost.branches):
        with depth.gates([other != index for other in range(4)]):
            assert branch.training_flops == whole - step_flops(net, x)


@both_nets
def test_expected_share_is_the_mean_over_all_subnetworks(make, inputs) -> None:
    net, x = make(), inputs(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    cost, mean = depth.cost(x), 0.0
    for gates in every_pattern(4):
        with depth.gates(gates):
            mean += pattern_prob(gates, SURVIVAL_PROBS) * step_flops(net, x)
    assert cost.flops_share == pytest.approx(mean / cost.total.training_flops, abs=1e-12)
    assert cost.share(SURVIVAL_PROBS) == pytest.approx(cost.flops_share, abs=1e-14)
    assert cost.share([1.0] * 4) == 1.0


def test_a_branch_inside_a_branch() -> None:
    """The inner one is reached only where the outer one is open."""
    inner = sd.Residual(nn.Linear(6, 6))
    net = nn.Sequential(
        nn.Linear(5, 6), sd.Residual(nn.Sequential(nn.Linear(6, 6), inner, nn.Tanh())), sd.Residual(nn.Linear(6, 6))
    ).double()
    probs, x = [0.6, 0.3, 0.8], vectors(4)
    depth = sd.make_stochastic_(net, probs)
    assert depth.names == ["1", "1.branch.1", "2"]
    cost = depth.cost(x)
    one = linear_flops(4, 6, 6)
    assert [branch.training_flops for branch in cost.branches] == [one, one, one]
    assert [branch.outer for branch in cost.branches] == [(), (0,), ()]
    mean = 0.0
    for gates in every_pattern(3):
        with depth.gates(gates):
            executed = step_flops(net, x)
        assert executed == pytest.approx(cost.share(gates) * cost.total.training_flops, rel=1e-12)
        mean += pattern_prob(gates, probs) * executed
    assert cost.flops_share == pytest.approx(mean / cost.total.training_flops, abs=1e-12)


def test_a_residual_used_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 6)
            self.residual = sd.Residual(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.residual(self.residual(self.stem(x)))

    net = Twice().double()
    cost = sd.make_stochastic_(net, [0.5]).cost(vectors(4))
    assert cost.branches[0].training_flops == 2 * linear_flops(4, 6, 6)
    assert cost.branches[0].gradient_bytes == (36 + 6) * 8


def test_the_papers_network() -> None:
    """54 equal blocks but for two transitions: linear decay to 0.5 leaves about three quarters."""
    net = sd.models.cifar_resnet(110)
    cost = sd.make_stochastic_(net, sd.linear_decay(0.5)).cost(torch.zeros(1, 3, 32, 32))
    by_hand = []
    in_width = 16
    for width, size in ((16, 32), (32, 16), (64, 8)):
        for _ in range(18):
            by_hand.append(conv_flops(1, in_width, width, 3, size) + conv_flops(1, width, width, 3, size))
            in_width = width
    assert [branch.training_flops for branch in cost.branches] == by_hand
    total = conv_flops(1, 3, 16, 3, 32, grad_input=False) + sum(by_hand) + linear_flops(1, 64, 10)
    assert cost.total.training_flops == total
    assert cost.flops_share == pytest.approx(0.745, abs=0.005)


# ---------------------------------------------------------------------------------------------- bytes


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(x)
    total = sum(kept.values())
    del output
    return total


@both_nets
def test_activation_bytes_are_those_really_saved(make, inputs) -> None:
    net, x = make(), inputs(4)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    cost = depth.cost(x)
    mean = 0.0
    for gates in every_pattern(4):
        with depth.gates(gates):
            saved = saved_bytes(net, x)
        closed = sum(branch.activation_bytes for branch, gate in zip(cost.branches, gates, strict=True) if not gate)
        assert saved == cost.total.activation_bytes - closed, gates
        mean += pattern_prob(gates, SURVIVAL_PROBS) * saved
    assert cost.activation_share == pytest.approx(mean / cost.total.activation_bytes, abs=1e-12)


def test_gradient_bytes() -> None:
    net, x = conv_net(dtype=torch.float32), images(2, dtype=torch.float32)
    net.blocks[3].residual.branch[0].requires_grad_(False)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    cost = depth.cost(x)
    by_hand = []
    for block in net.blocks:
        trained = [parameter for parameter in block.residual.branch.parameters() if parameter.requires_grad]
        by_hand.append(4 * sum(parameter.numel() for parameter in trained))
    assert [branch.gradient_bytes for branch in cost.branches] == by_hand
    total = 4 * sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    assert cost.total.gradient_bytes == total
    expected = 1 - sum((1 - p) * nbytes for p, nbytes in zip(SURVIVAL_PROBS, by_hand, strict=True)) / total
    assert cost.gradient_share == pytest.approx(expected, abs=1e-14)


def test_shared_parameters_have_gradients_whatever_one_gate_says() -> None:
    shared = nn.Linear(6, 6)
    net = nn.Sequential(nn.Linear(5, 6), sd.Residual(shared), nn.Tanh(), sd.Residual(shared)).double()
    cost = sd.make_stochastic_(net, [0.5, 0.5]).cost(vectors(2))
    assert [branch.gradient_bytes for branch in cost.branches] == [0, 0]
    assert cost.gradient_share == 1.0
    assert [branch.training_flops for branch in cost.branches] == [linear_flops(2, 6, 6)] * 2


# ---------------------------------------------------------------------------------------------- nothing changes


@both_nets
@every_measurement
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_measuring_changes_nothing(make, inputs, measure, granularity: str) -> None:
    net, x = make(), inputs(4)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity)
    loss_of(net(x)).backward()
    net.blocks[1].eval()
    twin = copied(net)
    for name, parameter in twin.named_parameters():
        parameter.grad = dict(net.named_parameters())[name].grad.clone()
    before = (state_of(net), gradients(net), buffers(net))
    identities = [id(tensor) for tensor in [*net.parameters(), *net.buffers()]]
    modes = [module.training for module in net.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()]
    rng = torch.get_rng_state(), random.getstate()
    state, gates = depth.state_dict(), depth.last_gates
    measure(depth, x)
    for ours, theirs in zip((state_of(net), gradients(net), buffers(net)), before, strict=True):
        assert_same(ours, theirs)
    assert [id(tensor) for tensor in [*net.parameters(), *net.buffers()]] == identities
    assert [module.training for module in net.modules()] == modes
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert (depth.state_dict(), depth.last_gates) == (state, gates)
    assert depth._passes.observer is None
    for _ in range(3):
        assert torch.equal(net(x), twin(x))


@every_measurement
def test_a_failed_measurement_changes_nothing_either(measure) -> None:
    net = conv_net()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    net.blocks[1].eval()
    before, modes = state_of(net), [module.training for module in net.modules()]
    with pytest.raises(RuntimeError):
        measure(depth, torch.zeros(2, 3, 8, 8))  # float32 into float64
    assert_same(state_of(net), before)
    assert [module.training for module in net.modules()] == modes
    assert depth.state_dict()["counter"] == 0
    drawn = [reference.drawn_gates(net, images(2)) for _ in range(10)]
    assert len(set(drawn)) > 1


def test_inside_forced_gates_the_measurement_is_the_same() -> None:
    net, x = mlp(), vectors(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    expected = depth.cost(x)
    with depth.gates([False] * 4):
        assert depth.cost(x) == expected
        assert reference.drawn_gates(net, x) == (False,) * 4
        depth.verify(x)
        assert reference.drawn_gates(net, x) == (False,) * 4


def test_cost_follows_survival_probs() -> None:
    net, x = mlp(), vectors(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    depth.set_survival_probs([1.0] * 4)
    cost = depth.cost(x)
    assert (cost.flops_share, cost.activation_share, cost.gradient_share) == (1.0, 1.0, 1.0)


def test_cost_prints_every_branch() -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    cost = depth.cost(vectors(3))
    lines = str(cost).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == depth.names
    assert f"{cost.flops_share:.2%}" in lines[-1]


def test_no_training_step_is_an_error() -> None:
    net = mlp().requires_grad_(False)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    with pytest.raises(ValueError, match=r"^No output of the model requires gradients: there is no training step"):
        depth.cost(vectors(2))


def test_under_no_grad() -> None:
    net, x = mlp(), vectors(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS)
    expected = depth.cost(x)
    with torch.no_grad():
        assert depth.cost(x) == expected


# ---------------------------------------------------------------------------------------------- equal cost


WIDTHS = [3, 40, 8, 90, 25, 4, 60, 12]
PROBS = [0.9, 0.3, 0.6, 0.55, 0.7, 0.45, 0.8, 0.2]


def uneven_net() -> nn.Module:
    """Eight branches of very different cost."""
    branches = [nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 5)) for width in WIDTHS]
    return nn.Sequential(nn.Linear(5, 5), *map(sd.Residual, branches))


def flops_of_draws(depth: sd.Controller, num_draws: int, net: nn.Module) -> list[float]:
    """FLOPs of the branches that the gates of each draw open, by hand: two layers, forward and twice that backward."""
    by_hand = [6 * 2 * 5 * width for width in WIDTHS]
    spent = []
    for _ in range(num_draws):
        net(torch.zeros(1, 5))
        spent.append(sum(gate * cost for gate, cost in zip(depth.last_gates or [], by_hand, strict=True)))
    return spent


def test_equal_cost_meets_a_budget_of_flops_within_one_largest_branch() -> None:
    net = uneven_net()
    depth = sd.make_stochastic_(net, PROBS, draw="equal_cost", seed=3)
    expected = sum(p * 60 * width for p, width in zip(PROBS, WIDTHS, strict=True))
    largest = 60 * max(WIDTHS)
    assert max(abs(spent - expected) for spent in flops_of_draws(depth, 200, net)) > largest  # numbers alone do not
    depth.set_costs(depth.cost(torch.randn(7, 5)))
    spent = flops_of_draws(depth, 2000, net)
    assert max(abs(each - expected) for each in spent) <= largest * (1 + 1e-9)
    assert statistics.mean(spent) == pytest.approx(expected, abs=4 * statistics.stdev(spent) / 2000**0.5)


def test_costs_keep_every_survival_probability() -> None:
    depth = sd.make_stochastic_(uneven_net(), PROBS, draw="equal_cost", seed=3)
    depth.set_costs([60.0 * width for width in WIDTHS])
    counts = [0] * len(PROBS)
    for counter in range(4000):
        drawn = draw_counts(PROBS, 1, seed=3, counter=counter, draw="equal_cost", costs=depth.state_dict()["costs"])
        counts = [count + gate for count, gate in zip(counts, drawn, strict=True)]
    for count, survival_prob in zip(counts, PROBS, strict=True):
        assert binomtest(count, 4000, survival_prob).pvalue > 1e-4


def test_costs_are_part_of_the_state_and_can_be_taken_back() -> None:
    net, other = uneven_net(), uneven_net()
    depth = sd.make_stochastic_(net, PROBS, draw="equal_cost", seed=3)
    equal = flops_of_draws(depth, 40, net)
    depth.set_costs(depth.cost(torch.randn(2, 5)))
    resumed = sd.make_stochastic_(other, PROBS, draw="equal_cost")
    resumed.load_state_dict(depth.state_dict())
    assert flops_of_draws(resumed, 40, other) == flops_of_draws(depth, 40, net)
    depth.set_costs(None)
    depth.load_state_dict({**depth.state_dict(), "counter": 0})
    assert flops_of_draws(depth, 40, net) == equal
