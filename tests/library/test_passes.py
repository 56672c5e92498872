"""When gates are drawn: the counter, parts of a model, ranks, resuming, random states."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import reference
import torch
from reference import assert_binomial, counted_calls, drawn_gates, mlp, vectors
from torch import nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.gates import draw_counts

SURVIVAL_PROBS = [0.8, 0.5, 0.5, 0.4]


def stochastic(**options) -> tuple[nn.Module, sd.Controller]:
    net = mlp()
    return net, sd.make_stochastic_(net, SURVIVAL_PROBS, **options)


def counter(model: nn.Module) -> int:
    return sd.controller(model).state_dict()["counter"]


def expected_gates(step: int, *, seed: int = 0, rank: int | None = None, draw: str = "bernoulli") -> tuple[bool, ...]:
    return tuple(map(bool, draw_counts(SURVIVAL_PROBS, 1, seed=seed, counter=step, rank=rank, draw=draw)))


def part_gates(net: nn.Module, first: int = 0, last: int = 4) -> tuple[bool, ...]:
    with counted_calls(net) as calls, torch.no_grad():
        net.blocks[first:last](net.stem(vectors(2)))
    return tuple(bool(sizes) for sizes in calls)


# ---------------------------------------------------------------------------------------------- the counter


@pytest.mark.parametrize("draw", ["bernoulli", "equal_cost"])
@pytest.mark.parametrize("seed", [0, 7])
def test_each_training_forward_is_one_draw(seed: int, draw: str) -> None:
    net, depth = stochastic(seed=seed, draw=draw)
    for step in range(30):
        assert counter(net) == step
        gates = drawn_gates(net, vectors(2))
        assert gates == expected_gates(step, seed=seed, draw=draw)
        assert depth.last_gates == [float(gate) for gate in gates]


def test_evaluation_and_forced_gates_draw_nothing() -> None:
    net, depth = stochastic()
    assert depth.last_gates is None
    net.eval()
    net(vectors(2))
    part_gates(net)
    net.train()
    with depth.gates([True, False, True, False]):
        net(vectors(2))
        net.eval()
        net(vectors(2))
        part_gates(net)
        net.train()
        part_gates(net)
    assert counter(net) == 0
    assert depth.last_gates is None
    assert drawn_gates(net, vectors(2)) == expected_gates(0)


def test_gates_do_not_depend_on_the_data_or_its_size() -> None:
    draws = []
    for size in (1, 5):
        net, _ = stochastic()
        draws.append([drawn_gates(net, vectors(size, seed=size)) for _ in range(10)])
    assert draws[0] == draws[1]


def test_forward_without_gradients_draws_too() -> None:
    net, _ = stochastic()
    with torch.no_grad():
        assert drawn_gates(net, vectors(2)) == expected_gates(0)
    assert drawn_gates(net, vectors(2)) == expected_gates(1)


def test_a_failed_forward_leaves_no_gates_behind() -> None:
    net, _ = stochastic()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.zeros(2, 7, dtype=torch.float64))
    assert part_gates(net) == expected_gates(1)
    assert part_gates(net) == expected_gates(2)
    assert drawn_gates(net, vectors(2)) == expected_gates(3)


class Interrupted:
    """Context in which Ctrl-C arrives when a forward reaches `part`."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __enter__(self) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        self.hook = self.part.register_forward_pre_hook(interrupt)

    def __exit__(self, kind: object, *_: object) -> bool:
        self.hook.remove()
        return kind is KeyboardInterrupt


@pytest.mark.parametrize("place", ["stem", "blocks.2", "head"])
def test_an_interrupted_forward_leaves_no_gates_behind(place: str) -> None:
    """Ctrl-C in a notebook, then the model by its parts."""
    net, depth = stochastic()
    part = net.get_submodule(place)
    with Interrupted(part):
        net(vectors(2))
    assert [part_gates(net) for _ in range(3)] == [expected_gates(step) for step in (1, 2, 3)]

    net.eval()
    with Interrupted(part):
        net(vectors(2))
    net.train()
    assert [part_gates(net) for _ in range(3)] == [expected_gates(step) for step in (4, 5, 6)]

    forced = (False, True, False, True)
    with Interrupted(part), depth.gates(forced):
        net(vectors(2))
    assert part_gates(net) == expected_gates(7)
    with Interrupted(part):
        net(vectors(2))
    with depth.gates(forced):
        assert part_gates(net) == forced
    assert drawn_gates(net, vectors(2)) == expected_gates(9)


def test_parts_that_are_checkpointed_after_ctrl_c_are_recomputed_with_their_own_gates() -> None:
    net, _ = stochastic()
    with Interrupted(net.stem):
        net(vectors(2))
    hidden = net.stem(vectors(2))
    with counted_calls(net) as calls:
        loss = checkpoint(net.blocks, hidden, use_reentrant=True).sum()
        drawn = [len(sizes) for sizes in calls]
    assert drawn == list(expected_gates(1))
    assert drawn_gates(net, vectors(2)) == expected_gates(2) != expected_gates(1)
    with counted_calls(net) as calls:
        loss.backward()
    assert [len(sizes) for sizes in calls] == drawn


def test_a_branch_that_is_called_twice_in_a_forward_has_one_gate() -> None:
    net, _ = stochastic()
    net.blocks.append(net.blocks[0])
    for step in range(10):
        gates = expected_gates(step)
        with counted_calls(net) as calls:
            net(vectors(2))
        assert [len(sizes) for sizes in calls] == [2 * gates[0], *gates[1:]]


def test_branches_in_evaluation_mode_follow_the_rule_of_evaluation() -> None:
    """A frozen stage: `model.blocks[1].eval()` under a root in training mode."""
    net, _ = stochastic()
    net.blocks[1].eval()
    for step in range(10):
        gates = expected_gates(step)
        assert drawn_gates(net, vectors(2)) == (gates[0], True, *gates[2:])


def test_branches_in_training_mode_under_a_root_in_evaluation() -> None:
    net, _ = stochastic()
    net.eval()
    net.blocks[1].train()
    net.blocks[2].train()
    for step in range(10):
        gates = expected_gates(step)
        assert drawn_gates(net, vectors(2)) == (True, gates[1], gates[2], True)
    assert counter(net) == 10


# ---------------------------------------------------------------------------------------------- parts


def test_parts_without_the_root_draw_anew() -> None:
    net, depth = stochastic()
    for step in range(20):
        gates = part_gates(net)
        assert gates == expected_gates(step)
        assert depth.last_gates == [float(gate) for gate in gates]
    assert counter(net) == 20


def test_parts_called_one_after_the_other_share_a_draw() -> None:
    net, _ = stochastic()
    for step in range(10):
        first, second = part_gates(net, 0, 2), part_gates(net, 2, 4)
        assert first[:2] + second[2:] == expected_gates(step)
    assert counter(net) == 10


def test_a_part_after_a_forward_of_the_root_is_never_stale() -> None:
    net, _ = stochastic()
    for step in range(0, 20, 2):
        assert drawn_gates(net, vectors(2)) == expected_gates(step)
        assert part_gates(net) == expected_gates(step + 1)


def test_a_part_after_forced_gates_and_before() -> None:
    net, depth = stochastic()
    assert part_gates(net, 0, 2)[:2] == expected_gates(0)[:2]
    with depth.gates([False] * 4):
        assert part_gates(net, 2, 4) == (False,) * 4
    with depth.gates([True] * 4):
        assert part_gates(net, 0, 2) == (True, True, False, False)
    assert part_gates(net, 2, 4)[2:] == expected_gates(1)[2:]
    assert counter(net) == 2


def test_a_part_after_changed_survival_probs_uses_them() -> None:
    net, depth = stochastic()
    part_gates(net, 0, 2)
    depth.set_survival_probs([1e-9] * 4)
    assert part_gates(net, 2, 4) == (False,) * 4


def test_a_part_after_a_loaded_state_draws_as_it_says() -> None:
    net, depth = stochastic()
    state = {**depth.state_dict(), "counter": 40}
    part_gates(net, 0, 2)
    depth.load_state_dict(state)
    assert part_gates(net, 2, 4)[2:] == expected_gates(40)[2:]
    assert counter(net) == 41


def test_a_single_module_called_by_itself() -> None:
    net, _ = stochastic()
    residual = net.blocks[1].residual
    opened = 0
    for _ in range(200):
        with counted_calls(net) as calls:
            residual(torch.zeros(2, 6, dtype=torch.float64))
        opened += len(calls[1])
    assert_binomial(opened, 200, 0.5)


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_resumed_run_draws_the_same(granularity: str, tmp_path) -> None:
    x = vectors(7)
    net, depth = stochastic(granularity=granularity, seed=3)
    for _ in range(5):
        net(x)
    depth.set_survival_probs([0.7, 0.6, 0.5, 0.4])
    torch.save({"model": net.state_dict(), "depth": depth.state_dict()}, tmp_path / "state.pt")
    uninterrupted = [net(x) for _ in range(5)]
    resumed, again = stochastic(granularity=granularity, seed=99)
    resumed(x)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["depth"])
    assert again.state_dict() == state["depth"]
    for output in uninterrupted:
        assert torch.equal(resumed(x), output)


def test_a_loaded_seed_draws_its_own_samples_at_the_same_counter() -> None:
    """The draw of one seed at counter 0 says nothing about another seed's."""
    x = vectors(16)
    ours, depth = stochastic(granularity="sample", seed=0)
    theirs, other = stochastic(granularity="sample", seed=1)
    ours(x)
    depth.load_state_dict(other.state_dict())
    assert torch.equal(ours(x), theirs(x))


def test_state_dict_is_plain_data() -> None:
    _, depth = stochastic(seed=2**70)
    assert depth.state_dict() == {
        "names": [f"blocks.{index}.residual" for index in range(4)],
        "survival_probs": SURVIVAL_PROBS,
        "costs": None,
        "seed": 2**70,
        "counter": 0,
    }
    changed = depth.state_dict()
    changed["names"].clear()
    changed["survival_probs"].clear()
    assert len(depth.names) == len(depth.survival_probs) == 4


# ---------------------------------------------------------------------------------------------- random states and ranks


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("draw", ["bernoulli", "equal_cost"])
def test_no_global_random_state_is_used(granularity: str, draw: str) -> None:
    np = pytest.importorskip("numpy")
    net = mlp()
    before = random.getstate(), torch.get_rng_state(), copy.deepcopy(np.random.get_state())
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity=granularity, draw=draw)
    for _ in range(5):
        reference.loss_of(net(vectors(5))).backward()
        part_gates(net)
    depth.cost(vectors(5))
    depth.verify(vectors(5))
    after = random.getstate(), torch.get_rng_state(), np.random.get_state()
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    assert all(
        (ours == theirs).all() if hasattr(ours, "all") else ours == theirs
        for ours, theirs in zip(after[2], before[2], strict=True)
    )


def test_the_global_random_state_does_not_matter() -> None:
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        net, _ = stochastic(granularity="sample")
        draws.append([net(vectors(6)) for _ in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def become(rank: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    return become


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("draw", ["bernoulli", "equal_cost"])
def test_ranks_agree(granularity: str, draw: str, as_rank: Callable[[int], None]) -> None:
    outputs = []
    for rank in range(3):
        as_rank(rank)
        net, _ = stochastic(granularity=granularity, draw=draw)
        outputs.append([net(vectors(6)) for _ in range(5)])
    for by_rank in zip(*outputs, strict=True):
        assert torch.equal(by_rank[0], by_rank[1])
        assert torch.equal(by_rank[0], by_rank[2])


def test_ranks_decorrelate(as_rank: Callable[[int], None]) -> None:
    drawn = []
    for rank in range(2):
        as_rank(rank)
        net, _ = stochastic(ranks="decorrelate")
        drawn.append([drawn_gates(net, vectors(2)) for _ in range(400)])
        assert drawn[-1][:20] == [expected_gates(step, rank=rank) for step in range(20)]
    for branch, survival_prob in enumerate(SURVIVAL_PROBS):
        together = sum(a[branch] and b[branch] for a, b in zip(*drawn, strict=True))
        assert_binomial(together, 400, survival_prob**2, f"branch {branch}")


@pytest.mark.parametrize("draw", ["bernoulli", "equal_cost"])
def test_decorrelated_ranks_agree_on_how_many_samples(draw: str, as_rank: Callable[[int], None]) -> None:
    """Whether a branch is called at all must not differ between ranks: only which samples it gets."""
    sizes, outputs = [], []
    for rank in range(2):
        as_rank(rank)
        net, _ = stochastic(granularity="sample", ranks="decorrelate", draw=draw)
        with counted_calls(net) as calls:
            outputs.append([net(vectors(8)) for _ in range(30)])
        sizes.append(calls)
    assert sizes[0] == sizes[1]
    assert sum(not torch.equal(a, b) for a, b in zip(*outputs, strict=True)) >= 29


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_equal_cost_in_a_model(granularity: str) -> None:
    """floor(E) or ceil(E) of the branches' samples in every step: E = 2.2 branches."""
    net, depth = stochastic(granularity=granularity, draw="equal_cost")
    num_samples = 5
    totals = set()
    for _ in range(100):
        with counted_calls(net) as calls:
            net(vectors(num_samples))
        totals.add(sum(size for sizes in calls for size in sizes))
        assert sum(depth.last_gates) * num_samples == pytest.approx(sum(map(sum, calls)))
    assert totals == ({2 * num_samples, 3 * num_samples} if granularity == "batch" else {11})
