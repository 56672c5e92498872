"""The count of what a forward keeps, against counts by hand."""

from __future__ import annotations

import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth_lab.measure.kept_bytes import kept_bytes

FLOAT = 4


def test_only_what_the_backward_needs_counts() -> None:
    """The linear map keeps its input, the ReLU its result, the sum of squares the ReLU's result; the loss is there."""
    x, linear = torch.randn(7, 5), nn.Linear(5, 3)
    assert kept_bytes(lambda: linear(x).relu().pow(2).sum()) == FLOAT * (7 * 3 + 1)
    assert kept_bytes(lambda: linear(x * 2).relu().pow(2).sum()) == FLOAT * (7 * 3 + 7 * 5 + 1)
    with torch.no_grad():
        assert kept_bytes(lambda: linear(x).relu().pow(2).sum()) == FLOAT


def test_parameters_and_what_was_there_before_do_not_count() -> None:
    parameter = nn.Parameter(torch.randn(1000))
    assert kept_bytes(lambda: (parameter * parameter).sum()) == FLOAT
    with torch.no_grad():
        assert kept_bytes(lambda: parameter.mul_(1)) == 0


def test_a_stochastic_network_keeps_what_its_survivors_need() -> None:
    """Of four samples that pass a ReLU and a linear branch two survive: those alone go through the branch's ReLU."""
    net = nn.Sequential(
        nn.Linear(5, 5), nn.ReLU(), sd.Residual(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)))
    )
    x = torch.randn(4, 5)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample", rescale="none")
    with depth.gates([torch.tensor([True, False, True, False])]):
        kept = kept_bytes(lambda: net(x))
    indices = 8 * 4  # the order of the samples, one whole number each
    after_first_relu, in_the_branch, output = 4 * 5, 2 * 6, 4 * 5
    assert kept == FLOAT * (after_first_relu + in_the_branch + output) + indices
