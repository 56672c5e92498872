"""`recalibrate_batchnorm_` against statistics computed from all values at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

import stochastic_depth as sd

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
import ranks

P = [0.9, 0.35, 0.6, 0.5]


def pooled(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel of all values (N, C, H, W) together."""
    flat = values.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1)


def test_statistics_are_those_of_the_evaluated_network_walked_by_hand() -> None:
    net, x = reference.conv_net(), reference.images(7)
    plain = reference.copied(net)
    depth = sd.make_stochastic_(net, P)
    sd.recalibrate_batchnorm_(net, [x])

    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _m, args, name=name: expected.update({name: pooled(args[0])}))
    reference.forward(plain.train(), x, factors=P)  # in training mode BatchNorm normalizes by the batch
    assert len(expected) == 10
    for name, (mean, variance) in expected.items():
        layer = net.get_submodule(name)
        torch.testing.assert_close(layer.running_mean, mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(layer.running_var, variance, atol=1e-12, rtol=0)
        assert layer.num_batches_tracked == 1
    assert depth.state_dict()["counter"] == 0
    assert depth.last_gates is None


def test_batches_of_any_size_count_by_their_values() -> None:
    net, x = nn.Sequential(nn.BatchNorm2d(3)).double(), reference.images(7)
    net[0].running_mean.fill_(7.0)  # earlier statistics do not count
    sd.recalibrate_batchnorm_(net, [(x[:4], "labels"), [x[4:6], "labels"], x[6:]])
    mean, variance = pooled(x)
    torch.testing.assert_close(net[0].running_mean, mean, atol=1e-13, rtol=0)
    torch.testing.assert_close(net[0].running_var, variance, atol=1e-13, rtol=0)
    assert net[0].num_batches_tracked == 3


def test_nothing_but_the_statistics_changes() -> None:
    net = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    )
    net[1].eval()
    modes, weights = [module.training for module in net.modules()], reference.state_of(net[1])
    state = torch.get_rng_state()
    x = torch.randn(16, 3)
    torch.set_rng_state(state)
    sd.recalibrate_batchnorm_(net, [{"input": x}])
    assert torch.equal(torch.get_rng_state(), state)  # no dropout
    torch.testing.assert_close(net[2].running_mean, net[1](x).mean(0))
    assert [module.training for module in net.modules()] == modes
    reference.assert_same(reference.state_of(net[1]), weights)
    reference.assert_plain(net)


def test_a_layer_that_sees_nothing_keeps_its_statistics() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.unused.running_mean.fill_(3.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net = Unused()
    sd.recalibrate_batchnorm_(net, [torch.randn(8, 2)])
    assert net.unused.running_mean.tolist() == [3.0, 3.0]
    assert net.unused.num_batches_tracked == 0


def test_without_batchnorm_a_warning_says_so() -> None:
    net = reference.mlp()
    before = reference.state_of(net)
    with pytest.warns(UserWarning, match="no BatchNorm with running statistics"):
        sd.recalibrate_batchnorm_(net, [reference.vectors(3)])
    reference.assert_same(reference.state_of(net), before)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "is empty"),
        (torch.zeros(4, 3, 8, 8), TypeError, "not a tensor"),
        ([torch.zeros(4, 3, 8, 8), "images"], TypeError, "A batch must be a tensor"),
        ([torch.zeros(4, 3, 8, 8), torch.zeros(4, 5, 8, 8)], RuntimeError, "channels"),
    ],
    ids=["empty", "tensor", "string", "wrong-shape"],
)
def test_after_an_error_the_statistics_are_as_before(batches: Any, error: type[Exception], message: str) -> None:
    net = reference.conv_net(dtype=torch.float32)
    before = reference.state_of(net)
    with pytest.raises(error, match=message):
        sd.recalibrate_batchnorm_(net, batches)
    reference.assert_same(reference.state_of(net), before)
    assert net.training
    reference.assert_plain(net)


def _on_rank(rank: int) -> dict[str, Tensor]:
    net, x = reference.conv_net(), reference.images(8)
    sd.make_stochastic_(net, P)
    wrapped = nn.parallel.DistributedDataParallel(net)
    # Rank 1 has one batch only: nobody may wait within a batch.
    sd.recalibrate_batchnorm_(wrapped, [x[:3], x[3:6]] if rank == 0 else [x[6:]])
    return reference.state_of(net)


def test_ranks_with_different_data_get_the_statistics_of_all_of_them() -> None:
    first, second = ranks.run(_on_rank, 2)
    reference.assert_same(first, second)
    alone, x = reference.conv_net(), reference.images(8)
    sd.make_stochastic_(alone, P)
    sd.recalibrate_batchnorm_(alone, [x[:3], x[3:6], x[6:]])
    reference.assert_close(first, reference.state_of(alone), atol=1e-12)
