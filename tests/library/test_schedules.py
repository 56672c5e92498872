"""Schedules against the formulas in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from reference import every_pattern, pattern_prob

import stochastic_depth as sd
from stochastic_depth.schedules import Schedule

# Survival of block l = 1..L, exactly: from the paper and from what PEERS.md found in timm and torchvision.
EXACT = {
    "linear_decay": lambda p, block, num_blocks: 1 - Fraction(block, num_blocks) * (1 - p),
    "uniform": lambda p, *_: p,
    "timm": lambda p, block, num_blocks: 1 - Fraction(block - 1, max(num_blocks - 1, 1)) * (1 - p),
    "convnext": lambda p, block, num_blocks: 1 - Fraction(block - 1, max(num_blocks - 1, 1)) * (1 - p),
    "efficientnet": lambda p, block, num_blocks: 1 - Fraction(block - 1, num_blocks) * (1 - p),
}


def assert_schedule(schedule: Schedule, num_blocks: int, exact: list[Fraction]) -> None:
    probs = schedule(num_blocks)
    assert all(type(prob) is float for prob in probs)
    assert probs == pytest.approx([float(prob) for prob in exact], abs=1e-15)
    assert all(0 < prob <= 1 for prob in probs)


@pytest.mark.parametrize("num_blocks", [1, 2, 9, 54, 600])
@pytest.mark.parametrize(
    "final", [Fraction(1, 100), Fraction(1, 5), Fraction(1, 2), Fraction(4, 5), Fraction(1)], ids=str
)
@pytest.mark.parametrize("name", EXACT)
def test_schedule_is_its_formula(name: str, final: Fraction, num_blocks: int) -> None:
    exact = [EXACT[name](final, block, num_blocks) for block in range(1, num_blocks + 1)]
    assert_schedule(sd.SCHEDULES[name](float(final)), num_blocks, exact)


def test_every_schedule_has_a_formula_here() -> None:
    assert set(sd.SCHEDULES) == set(EXACT)


def test_the_papers_numbers() -> None:
    probs = sd.linear_decay(0.5)(54)
    assert probs[0] == pytest.approx(0.990740740740, abs=1e-11)
    assert probs[-1] == 0.5
    assert sd.expected_depth(probs) == 40.25
    assert sd.expected_depth(sd.linear_decay(0.2)(54)) / 54 == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("num_blocks", [1, 3, 9, 18, 54, 75, 600])
def test_expected_depth_of_linear_decay_to_one_half(num_blocks: int) -> None:
    assert sd.expected_depth(sd.linear_decay(0.5)(num_blocks)) == pytest.approx((3 * num_blocks - 1) / 4, abs=1e-12)


def test_expected_depth_is_the_mean_over_all_subnetworks() -> None:
    probs = [0.9, 0.6, 0.31, 1.0]
    mean = sum(pattern_prob(gates, probs) * sum(gates) for gates in every_pattern(4))
    assert sd.expected_depth(probs) == pytest.approx(mean, abs=1e-15)


@pytest.mark.parametrize("name", sorted(EXACT))
@pytest.mark.parametrize(
    ("value", "error", "given"),
    [
        pytest.param(0, ValueError, "is 0.", id="zero"),
        pytest.param(0.0, ValueError, "is 0.", id="zero-float"),
        pytest.param(-0.2, ValueError, "is -0.2.", id="negative"),
        pytest.param(1.5, ValueError, "is 1.5.", id="above-one"),
        pytest.param(float("nan"), ValueError, "is nan.", id="nan"),
        pytest.param(True, TypeError, "is True.", id="bool"),
        pytest.param("0.5", TypeError, "is '0.5'.", id="string"),
        pytest.param(None, TypeError, "is None.", id="none"),
    ],
)
def test_bad_survival_prob(name: str, value: object, error: type[Exception], given: str) -> None:
    with pytest.raises(error) as caught:
        sd.SCHEDULES[name](value)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert "survival_prob must be " in message
    assert "(0, 1]" in message
    assert given in message
    assert error is TypeError or "a drop rate of 0.2 is a survival probability of 0.8" in message


@pytest.mark.parametrize(
    ("num_blocks", "error"),
    [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError), ("9", TypeError)],
    ids=["zero", "negative", "fraction", "bool", "string"],
)
@pytest.mark.parametrize("name", sorted(EXACT))
def test_bad_number_of_blocks(name: str, num_blocks: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^num_blocks must be [^\n]*is '?" + str(num_blocks).replace("-", r"\-")):
        sd.SCHEDULES[name](0.5)(num_blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [0.5, None, {0.5, 0.6}, {"a": 0.5}, "0.5"], ids=str)
def test_survival_probs_need_an_order(values: object) -> None:
    with pytest.raises(TypeError, match=r"^survival_probs must be a sequence of one number per block, but is [^\n]*$"):
        sd.expected_depth(values)  # type: ignore[arg-type]


def test_expected_depth_names_the_bad_entry() -> None:
    with pytest.raises(ValueError, match=r"^survival_probs\[1\] must be in \(0, 1\], but is 0\. It is the chance"):
        sd.expected_depth([0.5, 0.0])
