"""depth.verify passes on correct models and names the branch if something is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import conv_flops, conv_net, images, linear_flops, linear_net, mlp, vectors
from torch import Tensor, nn

import stochastic_depth as sd

PROBS = [0.9, 0.7, 0.5, 0.3]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("rescale", ["eval", "train", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_passes_on_right_models(granularity: str, rescale: str, training: bool) -> None:
    for make, inputs in ((mlp, vectors), (conv_net, images), (linear_net, vectors)):
        net = make().train(training)
        proof = sd.make_stochastic_(net, PROBS, granularity=granularity, rescale=rescale).verify(inputs(3))
        assert proof.num_branches == 4


def test_flops_by_hand() -> None:
    proof = sd.make_stochastic_(mlp(), PROBS).verify(vectors(3))
    rest = (linear_flops(3, 5, 6) + linear_flops(3, 6, 3)) // 3
    assert proof.forward_flops_closed == rest
    assert proof.forward_flops_open == rest + 4 * (linear_flops(3, 6, 8) + linear_flops(3, 8, 6)) // 3
    proof = sd.make_stochastic_(conv_net(), PROBS).verify(images(2))
    rest = (conv_flops(2, 3, 4, 3, 8) + conv_flops(2, 4, 6, 1, 4) + linear_flops(2, 6, 4)) // 3
    assert proof.forward_flops_closed == rest
    assert "4 branches, each with its own gate: 4 run nothing when closed." in str(proof)
    assert f"{proof.forward_flops_closed / proof.forward_flops_open:.1%}" in str(proof)


class Root(nn.Module):
    """Three residuals and whatever a test does with them."""

    def __init__(self, run: Callable[[Root, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (sd.Residual(nn.Sequential(nn.Linear(5, 5), nn.Tanh())) for _ in range(3))
        self.run = run
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def random_branch(_net: Root, x: Tensor) -> Tensor:
    return _net.c(_net.b(_net.a(x))) + torch.rand_like(x)


def calls_inside(net: Root, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x))) + net.b.branch(x)


def own_draw(net: Root, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x) if x.sum() == 0 else x))


def only_in_training(net: Root, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x)) if net.training else net.a(x))


def first_time_only(net: Root, x: Tensor) -> Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return net.c(net.b(net.a(x)) if net.calls == 1 else net.a(x))


WRONG = {
    "unused": (lambda net, x: net.c(net.a(x)), r"^1 of 3 branches are never reached by this input: b\.$"),
    "not with this input": (own_draw, r"^1 of 3 branches are never reached by this input: a\.$"),
    "not in evaluation": (only_in_training, r"^1 of 3 branches are never reached by this input: b\.$"),
    "not when evaluated": (first_time_only, r"b\.$|differs from its own code under masks"),
    "called around the gate": (calls_inside, r"^1 of 3 branches are run although their gates are closed: b\.$"),
    "random evaluation": (random_branch, r"^Two evaluations of one input differ: "),
}


@pytest.mark.parametrize(("run", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_fails_where_something_is_wrong(run, message: str, granularity: str) -> None:
    net = Root(run)
    depth = sd.make_stochastic_(net, [0.5] * 3, granularity=granularity)
    with pytest.raises(RuntimeError, match=message):
        depth.verify(vectors(2))
    assert depth.state_dict()["counter"] == 0
    assert all(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules() if module is not net)


def test_a_branch_replaced_after_the_fact_is_still_gated() -> None:
    net = mlp()
    depth = sd.make_stochastic_(net, PROBS)
    net.blocks[1].residual.branch = nn.Identity()
    assert depth.verify(vectors(2)).num_branches == 4


def test_a_swapped_out_residual_is_found() -> None:
    """A user replaced a gated module by a plain one."""
    net = mlp()
    depth = sd.make_stochastic_(net, PROBS)
    net.blocks[1].residual = sd.Residual(net.blocks[1].residual.branch)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.residual"):
        depth.verify(vectors(2))


def test_a_shared_branch_raises_no_false_alarm() -> None:
    shared = nn.Linear(5, 5)
    net = nn.Sequential(sd.Residual(shared), nn.Tanh(), sd.Residual(shared)).double()
    assert sd.make_stochastic_(net, [0.5, 0.5]).verify(vectors(2)).num_branches == 2


def test_a_nested_branch_raises_no_false_alarm() -> None:
    net = nn.Sequential(sd.Residual(nn.Sequential(nn.Linear(5, 5), sd.Residual(nn.Linear(5, 5))))).double()
    assert sd.make_stochastic_(net, [0.5, 0.5]).verify(vectors(2)).num_branches == 2


def test_outputs_that_are_not_finite_are_no_false_alarm() -> None:
    """NaN differs from itself, and yet the two evaluations are the same."""
    net = mlp()
    depth = sd.make_stochastic_(net, PROBS)
    x = vectors(2)
    x[0, 0] = float("nan")
    assert depth.verify(x).num_branches == 4


def test_a_module_that_is_called_from_elsewhere_too_is_no_sign_of_an_open_gate() -> None:
    class Through(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    shared = nn.Linear(4, 4)
    net = nn.Sequential(sd.Residual(Through(shared)), Through(shared))
    assert sd.make_stochastic_(net, sd.uniform(0.5)).verify(torch.ones(2, 4)).num_branches == 1
