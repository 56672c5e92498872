"""Dropout, dropped filters and the penalty on filters, against their formulas."""

from dataclasses import replace

import pytest
import torch
from small_runs import Silent, float64, small, train

import stochastic_depth as sd
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.experiments.config import Regularizers
from stochastic_depth_lab.training.regularizers import add_dropout_, filter_penalty


def relu_outputs(settings: Regularizers, *, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a branch's second convolution, without and with the regularizer; all positive."""
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(8, 10)
    add_dropout_(net, settings)
    net.train(training)
    branch = net.groups[0][0].residual.branch
    inputs = torch.rand(64, 16, 8, 8) + 1
    seen = []
    branch.conv2.register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    branch.bn1.register_forward_hook(lambda _module, _given, _output: inputs.clone())
    branch(torch.zeros(64, 16, 8, 8))
    return inputs, seen[0]


def test_dropout_keeps_single_activations_and_the_mean():
    plain, dropped = relu_outputs(Regularizers(activation_survival_prob=0.8), training=True)
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.8, abs=4 * (0.16 / kept.numel()) ** 0.5)
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.8)
    assert not (kept.all((2, 3)) | ~kept.any((2, 3))).any()  # no channel as a whole


def test_dropped_filters_are_whole_channels_of_a_sample():
    plain, dropped = relu_outputs(Regularizers(filter_survival_prob=0.6), training=True)
    kept = dropped != 0
    channels = kept.any((2, 3))
    assert torch.equal(kept, channels[:, :, None, None].expand_as(kept))
    assert channels.double().mean().item() == pytest.approx(0.6, abs=4 * (0.24 / channels.numel()) ** 0.5)
    assert len({tuple(row) for row in channels.tolist()}) > 32  # each sample has its own
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.6)


def test_nothing_is_dropped_in_evaluation():
    plain, same = relu_outputs(Regularizers(0.5, 0.5), training=False)
    assert torch.equal(plain, same)


def test_the_penalty_is_its_formula_layer_by_layer():
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(8, 10).double()
    strength, expected = 0.3, 0.0
    for name, weight in net.named_parameters():
        if weight.ndim == 4:
            magnitudes = [sum(w * w for w in f.flatten().tolist()) ** 0.5 for f in weight]
            expected += strength * weight.square().sum().item() / (sum(m * m for m in magnitudes) + strength)
            total = weight.square().sum().item()
            gradient = 2 * weight.detach() * (strength / (total + strength)) ** 2
            net.zero_grad()
            filter_penalty(net, strength).backward()
            torch.testing.assert_close(weight.grad, gradient, msg=name)
    assert filter_penalty(net, strength).item() == pytest.approx(expected, rel=1e-12)


def test_the_penalty_moves_the_weights_and_not_the_loss_that_is_shown(tmp_path):
    """A single step from the same weights, in which the penalty's gradient is all that differs."""
    single, strength = small(None, epochs=1, batch_size=100, lr_schedule="step_text"), 5.0
    experiments = {"plain": single, "penalized": replace(single, regularizers=Regularizers(filter_penalty=strength))}
    rows, weights = {}, {}
    for name, experiment in experiments.items():
        observer = Silent()
        with float64():
            train(experiment, tmp_path / name, observer=observer)
        rows[name] = observer.rows[0]
        weights[name] = torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert rows["penalized"]["train_loss"] == rows["plain"]["train_loss"]
    torch.manual_seed(0)
    before = sd.models.cifar_resnet(14, 10, in_channels=1).double()
    filter_penalty(before, strength).backward()
    for name, parameter in before.named_parameters():
        # Nesterov's first step is 1 + momentum gradients long.
        moved = torch.zeros_like(parameter) if parameter.grad is None else -0.02 * 1.9 * parameter.grad
        torch.testing.assert_close(weights["penalized"][name] - weights["plain"][name], moved, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (Regularizers(activation_survival_prob=0.0), "activation_survival_prob must be in"),
        (Regularizers(filter_survival_prob=1.5), "filter_survival_prob must be in"),
        (Regularizers(filter_penalty=-1.0), "filter_penalty must be 0 or positive"),
    ],
)
def test_numbers_that_make_no_sense(settings, field):
    with pytest.raises(ValueError, match=field):
        check(replace(small(), regularizers=settings))
