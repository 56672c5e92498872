"""The simulation of the slowest rank against exact enumeration."""

import itertools

import numpy as np
import pytest
import ranks  # noqa: F401 -- finds the benchmarks
from stragglers import Network, rank_times, slowest, vit_base


def test_the_slowest_of_two_ranks_is_what_enumeration_gives() -> None:
    network = Network("small", [0.5, 0.3, 0.8], [1.0, 2.0, 4.0], 0.5)
    patterns = []
    for gates in itertools.product((0, 1), repeat=3):
        prob = np.prod([p if gate else 1 - p for p, gate in zip(network.survival_probs, gates, strict=True)])
        patterns.append((prob, 0.5 + float(np.dot(network.costs, gates))))
    expected = sum(p * q * max(a, b) for p, a in patterns for q, b in patterns)
    times = np.concatenate([rank_times(network, "bernoulli", 200, counter) for counter in range(20)])
    assert slowest(times, 2) == pytest.approx(expected, abs=5 * times.std() / len(times) ** 0.5)


def test_with_equal_cost_every_rank_stays_within_one_largest_branch() -> None:
    network = vit_base()
    mean = network.rest + float(np.dot(network.survival_probs, network.costs))
    times = rank_times(network, "equal_cost", 500, 0)
    assert np.abs(times - mean).max() <= max(network.costs) * (1 + 1e-9)
    assert np.abs(rank_times(network, "bernoulli", 500, 0) - mean).max() > 2 * max(network.costs)
    assert len(np.unique(times.round(9))) > 1
