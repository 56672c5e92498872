"""Survival over time: values computed by hand, and their effect in a run."""

import json
import math

import pytest
import torch
from small_runs import CPU, Silent, small, train

import stochastic_depth as sd
from stochastic_depth_lab.after.evaluation import evaluate_run
from stochastic_depth_lab.experiments.config import Depth
from stochastic_depth_lab.training.schedules import mean_survival_probs, strength, survival_probs

BY_HAND = {  # strength at 0, 1/8, ..., 7/8 of a run that turns at 1/2
    "constant": [1, 1, 1, 1, 1, 1, 1, 1],
    "warm_up": [0, 0.25, 0.5, 0.75, 1, 1, 1, 1],
    "early": [1, 0.75, 0.5, 0.25, 0, 0, 0, 0],
    "late": [0, 0, 0, 0, 1, 1, 1, 1],
    "exponential": [1 - math.exp(-math.log(100) * 2 * e / 8) for e in range(8)],
    "plateau": [1, 1, 1, 1, 1, 0.5, 0, 0.5],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_strength_over_time(name):
    depth = Depth(over_time=name, turn=0.5)
    assert [strength(depth, e / 8) for e in range(8)] == pytest.approx(BY_HAND[name])
    over_depth = sd.linear_decay(0.2)(5)
    for epoch in range(1, 9):
        probs = survival_probs(over_depth, depth, epoch, 8)
        drops = [(1 - prob) / (1 - whole) for prob, whole in zip(probs, over_depth, strict=True)]
        assert drops == pytest.approx([BY_HAND[name][epoch - 1]] * 5)
        assert all(0 < prob <= 1 for prob in probs)
    mean = sum(BY_HAND[name]) / 8
    expected = [1 - mean * (1 - prob) for prob in over_depth]
    assert mean_survival_probs(over_depth, depth, 8) == pytest.approx(expected)


def test_a_run_follows_its_schedule_and_is_evaluated_with_its_probabilities(tmp_path):
    """Early and uniform at 0.3: most is dropped at first, nothing after the turn; p counts in evaluation."""
    observer = Silent()
    early = Depth("uniform", 0.3, over_time="early", turn=0.5)
    result = train(small(early, epochs=4), tmp_path / "run", observer=observer)
    assert [row["realized_depth"] == 6 for row in observer.rows] == [False, False, True, True]
    assert observer.rows[0]["realized_depth"] < 3 < observer.rows[1]["realized_depth"]
    branches = json.loads((tmp_path / "run" / "branches.json").read_text())
    assert branches["survival_probs"] == pytest.approx([1 - 0.375 * 0.7] * 6)
    assert branches["expected_depth"] == pytest.approx(6 * (1 - 0.375 * 0.7))
    assert branches["expected_cost"] == pytest.approx(1 - 0.375 * 0.7 * (1 - sub_share()))

    again = evaluate_run(tmp_path / "run", device=CPU)
    assert again["last"]["test"].error == result["final_test_error"]
    assert again["last"]["test"].loss == observer.rows[-1]["test_loss"]
    assert again["best"]["validation"].error == result["validation_error"]
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert list(state["gates"]["survival_probs"]) == pytest.approx([1.0] * 6)


def sub_share() -> float:
    """Share of the FLOPs that remains with every branch closed."""
    net = sd.models.cifar_resnet(14, 10, in_channels=1)
    return sd.make_stochastic_(net, sd.uniform(0.5)).cost(torch.zeros(2, 1, 8, 8)).share([0.0] * 6)
