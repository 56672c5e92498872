"""The draws: pure functions of (seed, counter, branch, rank) with exactly the promised distributions."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from reference import assert_binomial

import stochastic_depth as sd
from stochastic_depth import gates
from stochastic_depth.gates import draw_counts, draw_order

NUM_DRAWS = 4000


def draws(survival_probs: list[float], num_samples: int = 1, num_draws: int = NUM_DRAWS, **options) -> list[list[int]]:
    options = {"seed": 0, **options}
    return [draw_counts(survival_probs, num_samples, counter=counter, **options) for counter in range(num_draws)]


def assert_marginals(drawn: list[list[int]], survival_probs: list[float], num_samples: int = 1) -> None:
    """Each count is floor or ceil of p * N, and each as often as the mean demands, by an exact binomial test."""
    for branch, survival_prob in enumerate(survival_probs):
        counts = [row[branch] for row in drawn]
        low = math.floor(survival_prob * num_samples)
        assert set(counts) <= {low, low + 1}
        assert max(counts) <= num_samples
        fraction = survival_prob * num_samples - low
        assert_binomial(sum(counts) - low * len(counts), len(counts), fraction, f"branch {branch}")


def assert_independent(first: list[int], second: list[int], p_first: float, p_second: float, what: str) -> None:
    together = sum(a and b for a, b in zip(first, second, strict=True))
    assert_binomial(together, len(first), p_first * p_second, what)


class FixedUniform:
    """Takes the place of `random.Random`: every number drawn is the one given."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, _seed: str) -> FixedUniform:
        return self

    def random(self) -> float:
        return self.value


# ---------------------------------------------------------------------------------------------- Bernoulli


@pytest.mark.parametrize(
    "survival_probs",
    [sd.linear_decay(0.5)(9), sd.uniform(0.8)(4), [1.0, 0.01, 0.99, 0.5]],
    ids=["linear", "uniform", "extreme"],
)
@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890])
def test_gate_frequencies(survival_probs: list[float], seed: int) -> None:
    assert_marginals(draws(survival_probs, seed=seed), survival_probs)


def test_a_survival_prob_of_one_is_always_open() -> None:
    assert {row[0] for row in draws([1.0, 0.5])} == {1}


def test_branches_are_independent() -> None:
    survival_probs = [0.9, 0.7, 0.5, 0.3]
    drawn = draws(survival_probs)
    for a, b in itertools.combinations(range(4), 2):
        first, second = ([row[branch] for row in drawn] for branch in (a, b))
        assert_independent(first, second, survival_probs[a], survival_probs[b], f"{a} and {b}")


def test_all_sixteen_subnetworks_have_their_probability() -> None:
    survival_probs = [0.9, 0.7, 0.5, 0.3]
    seen = Counter(tuple(row) for row in draws(survival_probs))
    for pattern in itertools.product([0, 1], repeat=4):
        prob = math.prod(p if gate else 1 - p for gate, p in zip(pattern, survival_probs, strict=True))
        assert_binomial(seen[pattern], NUM_DRAWS, prob, str(pattern))


@pytest.mark.parametrize("lag", [1, 2, 32])
def test_steps_are_independent(lag: int) -> None:
    gate = [row[0] for row in draws([0.6])]
    assert_independent(gate[:-lag], gate[lag:], 0.6, 0.6, f"steps {lag} apart")


@pytest.mark.parametrize("other", [1, -1, 2**32, 2**64], ids=["next", "negative", "2**32", "2**64"])
def test_seeds_are_independent(other: int) -> None:
    ours, theirs = ([row[0] for row in draws([0.6], seed=seed)] for seed in (0, other))
    assert_independent(ours, theirs, 0.6, 0.6, f"seeds 0 and {other}")


def test_seed_and_counter_are_not_added_up() -> None:
    assert draws([0.5] * 20, seed=1, num_draws=20)[2:] != draws([0.5] * 20, seed=2, num_draws=20)[1:-1]
    assert draw_counts([0.5] * 64, 1, seed=1, counter=11) != draw_counts([0.5] * 64, 1, seed=11, counter=1)


def test_ranks_are_independent_and_keep_the_marginals() -> None:
    by_rank = [draws([0.6, 0.3], rank=rank) for rank in range(3)]
    for drawn in by_rank:
        assert_marginals(drawn, [0.6, 0.3])
    for a, b in itertools.combinations(by_rank, 2):
        assert_independent([row[0] for row in a], [row[0] for row in b], 0.6, 0.6, "ranks")


@pytest.mark.parametrize("draw", ["bernoulli", "equal_cost"])
def test_the_same_arguments_draw_the_same(draw: str) -> None:
    again = {"seed": 3, "counter": 7, "draw": draw}
    assert draw_counts([0.5] * 30, 5, **again) == draw_counts([0.5] * 30, 5, **again)
    assert torch.equal(draw_order(4, 9, seed=3, counter=7), draw_order(4, 9, seed=3, counter=7))


def test_the_draw_is_stable_across_versions_and_machines() -> None:
    """A resumed run draws the same gates on another machine: the numbers are frozen here."""
    assert draw_counts([0.5] * 16, 1, seed=0, counter=0) == [1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1]
    assert draw_order(2, 6, seed=0, counter=0).tolist() == [[5, 0, 4, 3, 1, 2], [5, 0, 2, 1, 4, 3]]


def test_no_global_random_state_is_used() -> None:
    np = pytest.importorskip("numpy")
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    for draw in ("bernoulli", "equal_cost"):
        draw_counts([0.5] * 9, 7, seed=0, counter=0, draw=draw)
    draw_order(9, 7, seed=0, counter=0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


# ---------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("num_samples", range(1, 65))
def test_the_mean_count_is_p_times_the_batch(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: the count steps from floor to ceil where the uniform number passes the fraction of p * b."""
    probs = [Fraction(1, 10), Fraction(1, 2), Fraction(7, 10), Fraction(125, 128), Fraction(1)]
    for prob in probs:
        mean = prob * num_samples
        low, fraction = mean // 1, float(mean % 1)
        for uniform in (0.0, fraction - 1e-9, fraction + 1e-9, 1 - 2**-53):
            if not 0 <= uniform < 1:
                continue
            monkeypatch.setattr(gates.random, "Random", FixedUniform(uniform))
            (count,) = draw_counts([float(prob)], num_samples, seed=0, counter=0)
            assert count == low + (uniform < fraction), (prob, uniform)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("draw", ["bernoulli", "equal_cost"])
def test_count_frequencies(draw: str, num_samples: int) -> None:
    survival_probs = [1.0, 0.83, 0.5, 0.31, 0.013]
    assert_marginals(draws(survival_probs, num_samples, draw=draw), survival_probs, num_samples)


def test_each_row_is_a_permutation() -> None:
    order = draw_order(5, 33, seed=0, counter=0)
    assert order.dtype == torch.int64
    assert order.sort(dim=1).values.tolist() == [list(range(33))] * 5
    assert len({tuple(row) for row in order.tolist()}) == 5


@pytest.mark.parametrize(("num_samples", "num_open"), [(2, 1), (5, 1), (5, 3), (8, 7)])
def test_each_sample_is_equally_likely(num_samples: int, num_open: int) -> None:
    chosen = [draw_order(1, num_samples, seed=0, counter=c)[0, :num_open].tolist() for c in range(NUM_DRAWS)]
    for sample in range(num_samples):
        assert_binomial(sum(sample in row for row in chosen), NUM_DRAWS, num_open / num_samples, f"sample {sample}")


def test_each_subset_of_samples_is_equally_likely() -> None:
    seen = Counter(frozenset(draw_order(1, 5, seed=0, counter=c)[0, :2].tolist()) for c in range(NUM_DRAWS))
    for subset in itertools.combinations(range(5), 2):
        assert_binomial(seen[frozenset(subset)], NUM_DRAWS, 1 / 10, str(subset))


def test_subsets_of_branches_steps_and_ranks_are_independent() -> None:
    def first(counter: int, branch: int = 0, rank: int | None = None) -> int:
        return int(0 in draw_order(2, 4, seed=0, counter=counter, rank=rank)[branch, :2])

    here = [first(counter) for counter in range(NUM_DRAWS)]
    assert_independent(here, [first(c, branch=1) for c in range(NUM_DRAWS)], 0.5, 0.5, "branches")
    assert_independent(here[:-1], here[1:], 0.5, 0.5, "steps")
    for rank in (0, 1):
        assert_independent(here, [first(c, rank=rank) for c in range(NUM_DRAWS)], 0.5, 0.5, f"rank {rank}")


def test_order_is_independent_of_the_counts() -> None:
    counts = [row[0] for row in draws([0.5], 3)]
    first = [int(draw_order(1, 3, seed=0, counter=counter)[0, 0] == 0) for counter in range(NUM_DRAWS)]
    assert_independent([count - 1 for count in counts], first, 0.5, 1 / 3, "count and first sample")


def test_large_batches_have_no_ties() -> None:
    """24-bit keys would tie about 2,000 times here, and a stable sort would favor the first samples."""
    order = draw_order(1, 2**18, seed=0, counter=0)[0]
    assert len(order.unique()) == 2**18
    assert_binomial(int((order[: 2**17] < 2**17).sum()), 2**17, 0.5)


# ---------------------------------------------------------------------------------------------- equal cost

EQUAL_COST = {
    "paper": (sd.linear_decay(0.5)(54), 1),
    "whole-sum": ([0.5] * 8, 1),
    "rounding-errors": ([0.7] * 10, 1),
    "decimal": (sd.linear_decay(0.2)(9), 1),
    "with-certain-ones": ([1.0, 0.9, 1.0, 0.25], 1),
    "single": ([0.3], 1),
    "samples": ([0.83, 0.5, 0.31, 0.013], 7),
    "whole-samples": ([0.75, 0.5, 0.25], 4),
}


@pytest.mark.parametrize(("survival_probs", "num_samples"), EQUAL_COST.values(), ids=EQUAL_COST)
def test_equal_cost_is_floor_or_ceil_every_step(survival_probs: list[float], num_samples: int) -> None:
    drawn = draws(survival_probs, num_samples, num_draws=1500, draw="equal_cost")
    assert_marginals(drawn, survival_probs, num_samples)
    # Decimal fractions: 0.7 is meant to be 7/10.
    mean = sum(Fraction(survival_prob).limit_denominator(10**6) for survival_prob in survival_probs) * num_samples
    totals = Counter(sum(row) for row in drawn)
    assert set(totals) <= {math.floor(mean), math.ceil(mean)}
    assert_binomial(totals[math.floor(mean) + 1], len(drawn), float(mean % 1), "steps with one branch more")


def test_equal_cost_draws_every_pattern() -> None:
    seen = Counter(tuple(row) for row in draws([0.5] * 6, draw="equal_cost"))
    assert all(sum(pattern) == 3 for pattern in seen)
    assert len(seen) == 20
    for pattern, count in seen.items():
        assert_binomial(count, NUM_DRAWS, 1 / 20, str(pattern))


def test_equal_cost_draws_many_patterns_of_the_papers_network() -> None:
    drawn = draws(sd.linear_decay(0.5)(54), num_draws=500, draw="equal_cost")
    assert len({tuple(row) for row in drawn}) == 500


def test_equal_cost_steps_are_independent() -> None:
    gate = [row[0] for row in draws([0.5] * 6, draw="equal_cost")]
    assert_independent(gate[:-1], gate[1:], 0.5, 0.5, "steps")


def test_equal_cost_has_the_same_count_on_every_rank_in_other_patterns() -> None:
    survival_probs = sd.linear_decay(0.5)(9)
    by_rank = [draws(survival_probs, draw="equal_cost", rank=rank, num_draws=2000) for rank in (None, 0, 1, 2)]
    for rows in zip(*by_rank, strict=True):
        assert len({sum(row) for row in rows}) == 1
    for drawn in by_rank:
        assert_marginals(drawn, survival_probs)
    assert sum(len({tuple(row) for row in rows}) == 4 for rows in zip(*by_rank, strict=True)) > 1000


UNEQUAL = {
    "two-kinds": ([0.5] * 16, [1.0] * 8 + [3.0] * 8),
    "spread": ([0.9, 0.7, 0.5, 0.3, 0.6], [1.0, 10.0, 2.5, 40.0, 7.0]),
    "flops": (sd.linear_decay(0.5)(9), [123456.0, 123456.0, 123456.0, 92160.0, 120000.0, 120000.0, 9e4, 1e5, 1e5]),
}


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize(("survival_probs", "costs"), UNEQUAL.values(), ids=UNEQUAL)
def test_budget_is_met_to_within_one_largest_branch(
    survival_probs: list[float], costs: list[float], num_samples: int
) -> None:
    drawn = draws(survival_probs, num_samples, draw="equal_cost", costs=costs)
    assert_marginals(drawn, survival_probs, num_samples)
    totals = [sum(count * cost for count, cost in zip(row, costs, strict=True)) for row in drawn]
    budget = sum(p * cost * num_samples for p, cost in zip(survival_probs, costs, strict=True))
    assert max(abs(total - budget) for total in totals) <= max(costs) * (1 + 1e-9)
    assert len({tuple(row) for row in drawn}) > 5
