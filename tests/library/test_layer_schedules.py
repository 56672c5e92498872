"""Schedules for whole layers, over depth and over time, against the papers' formulas."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import stochastic_depth as sd


@pytest.mark.parametrize("num_layers", [1, 2, 6, 32])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.9])
def test_layerskip_is_its_formula(num_layers: int, rate: float) -> None:
    """p_{l,t} = S(t) D(l) p_max with D(l) = exp(l ln 2 / (L - 1)) - 1 and S(t) = exp(t ln 2 / (T - 1)) - 1."""
    num_steps = 5
    for name, strength in {
        "constant": lambda _: 1.0,
        "linear": lambda t: t / (num_steps - 1),
        "exponential": lambda t: math.exp(t * math.log(2) / (num_steps - 1)) - 1,
    }.items():
        schedule = sd.layerskip(rate, over_time=name)
        assert schedule.rescale == "none"
        for t in range(num_steps):
            rates = [
                strength(t) * (math.exp(layer * math.log(2) / (num_layers - 1)) - 1) * rate if num_layers > 1 else 0.0
                for layer in range(num_layers)
            ]
            expected = [1 - r for r in rates]
            assert schedule.at(t / (num_steps - 1), num_layers) == pytest.approx(expected, abs=1e-14)
        assert schedule(num_layers) == schedule.at(0.0, num_layers)


def test_layerdrop_is_uniform_without_scaling() -> None:
    assert sd.layerdrop(0.25)(3) == [0.75] * 3
    assert sd.layerdrop(0.25).rescale == "none"
    assert sd.layerdrop(0.25).over_time is None


@pytest.mark.parametrize("num_layers", [1, 4, 12])
def test_progressive_layer_dropping_is_its_algorithm(num_layers: int) -> None:
    """Zhang and He 2020, algorithm 1, with gamma = 100 / T: p starts at 1 and falls by (1 - theta_t) / L per layer."""
    theta, num_steps = 0.5, 1000
    schedule = sd.progressive_layer_dropping(theta)
    assert schedule.rescale == "train"
    for t in (0, 1, 7, 100, 1000):
        theta_t = (1 - theta) * math.exp(-100 / num_steps * t) + theta
        p, expected = 1.0, []
        for _ in range(num_layers):
            expected.append(p)
            p -= (1 - theta_t) / num_layers
        assert schedule.at(t / num_steps, num_layers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("make", [sd.layerskip, sd.layerdrop], ids=["layerskip", "layerdrop"])
@pytest.mark.parametrize(
    ("rate", "error"),
    [(1, ValueError), (-0.1, ValueError), (float("nan"), ValueError), (True, TypeError), ("a", TypeError)],
)
def test_bad_drop_rates(make, rate: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"drop_rate must be [^\n]*\[0, 1\)[^\n]*but is") as caught:
        make(rate)
    assert error is TypeError or "a survival probability of 0.8 is a drop rate of 0.2" in str(caught.value)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one of 'constant', 'linear', 'exponential', but is 'cosine'"):
        sd.layerskip(0.2, over_time="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma must be a positive number, but is 0"):
        sd.progressive_layer_dropping(gamma=0)
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], but is 3\. It is the share of the training"):
        sd.layerskip(0.2).at(3, 4)
    with pytest.raises(TypeError, match="progress must be a number"):
        sd.layerskip(0.2).at("half", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"over_time\(0\.5\) must be in \[0, 1\], but is 2"):
        sd.LayerSchedule(sd.uniform(0.5), lambda _: 2.0).at(0.5, 4)
    with pytest.raises(ValueError, match="rescale must be one of 'eval', 'train', 'none', but is 'training'"):
        sd.LayerSchedule(sd.uniform(0.5), rescale="training")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"over_depth must be a schedule, such as linear_decay\(0\.5\), but is 0\.5"):
        sd.LayerSchedule(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"over_time must be a function of the progress, or None, but is 0\.5"):
        sd.LayerSchedule(sd.uniform(0.5), over_time=0.5)  # type: ignore[arg-type]


def layered() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))


def test_the_controller_follows_the_schedule_over_time() -> None:
    model = layered()
    schedule = sd.layerskip(0.5, over_time="exponential")
    depth = sd.make_stochastic_(model, schedule, layers=["?"])
    assert depth.survival_probs == [1.0] * 4
    assert f"set_progress lowers the expected depth to {sum(schedule.at(1.0, 4)):.2f} at full strength" in str(depth)
    assert "rescale 'none'" in str(depth)
    for progress in (0.25, 1.0, 0.5):
        depth.set_progress(progress)
        assert depth.survival_probs == schedule.at(progress, 4)
    # A resumed run has the state of the moment, and moves on by the progress alone.
    resumed = layered()
    other = sd.make_stochastic_(resumed, schedule, layers=["?"])
    other.load_state_dict(depth.state_dict())
    assert other.survival_probs == depth.survival_probs
    other.set_progress(1.0)
    assert other.survival_probs == schedule.at(1.0, 4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        sd.controller(copied).set_progress(1.0)
        assert sd.controller(copied).survival_probs == schedule.at(1.0, 4)
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\]"):
        depth.set_progress(1.5)
    assert depth.survival_probs == schedule.at(0.5, 4)


def test_progress_without_a_part_over_time() -> None:
    for schedule in (sd.uniform(0.5), sd.layerskip(0.5)):
        depth = sd.make_stochastic_(layered(), schedule, layers=["?"])
        with pytest.raises(ValueError, match=r"^The schedule does not change over time\. [^\n]*set_survival_probs\.$"):
            depth.set_progress(0.5)


def test_the_authors_scaling_is_the_default_and_can_be_overridden() -> None:
    x = torch.ones(2, 3)
    for schedule, rescale, factor in (
        (sd.layerdrop(0.5), None, 1.0),
        (sd.progressive_layer_dropping(0.5, gamma=1e9), None, 1.0),  # 1/p in training, hence 1 in evaluation
        (sd.layerdrop(0.5), "eval", 0.5),
    ):
        model = nn.Sequential(nn.Linear(3, 3))
        depth = sd.make_stochastic_(model, schedule, layers=["0"], rescale=rescale)
        plain = copy.deepcopy(model)
        sd.restore_(plain)
        torch.testing.assert_close(model.eval()(x), x + factor * (plain(x) - x))
        assert f"rescale {(rescale or schedule.rescale)!r}" in str(depth)
