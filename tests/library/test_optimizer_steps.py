"""Ten steps of SGD with Nesterov momentum and weight decay, beside the plain method and its SGD written out."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import (
    PlainSGD,
    assert_close,
    conv_net,
    copied,
    counted_calls,
    images,
    loss_of,
    mlp,
    state_of,
    training_factors,
    vectors,
)
from test_sample_granularity import drawn_masks

import stochastic_depth as sd

SURVIVAL_PROBS = [0.9, 0.6, 0.5, 0.3]
HYPERPARAMETERS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("rescale", ["eval", "train"])
@pytest.mark.parametrize("skipped_grad", ["zero", "none"])
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_ten_steps(kind: str, granularity: str, rescale: str, skipped_grad: str, foreach: bool) -> None:
    """Weights, momenta and BatchNorm statistics; the skipped decay and coast ("zero") or freeze ("none")."""
    make, inputs = (mlp, vectors) if kind == "mlp" else (conv_net, images)
    plain = make()
    net = copied(plain)
    sd.make_stochastic_(
        net, SURVIVAL_PROBS, granularity=granularity, rescale=rescale, skipped_grad=skipped_grad, seed=2
    )
    ours = torch.optim.SGD(net.parameters(), nesterov=True, foreach=foreach, **HYPERPARAMETERS)
    theirs = PlainSGD(plain, **HYPERPARAMETERS)
    factors = training_factors(SURVIVAL_PROBS, rescale)
    num_skipped = 0
    for step in range(10):
        num_samples = 1 + 3 * (step % 2)  # of one sample, so that gates close for all of them, and of four
        x = inputs(num_samples, seed=step)
        ours.zero_grad()
        with counted_calls(net) as calls:
            loss_of(net(x)).backward()
        ours.step()
        if granularity == "batch":
            gates = [bool(sizes) for sizes in calls]
        else:
            gates = drawn_masks(SURVIVAL_PROBS, num_samples, seed=2, counter=step)
        loss_of(reference.forward(plain, x, gates, factors)).backward()
        reference.fill_skipped_gradients(plain, gates, skipped_grad)
        num_skipped += sum(not sizes for sizes in calls)
        theirs.step()
        assert_close(state_of(net), state_of(plain), atol=1e-9)
    assert num_skipped >= 5
    momenta = {str(i): ours.state[p].get("momentum_buffer") for i, p in enumerate(net.parameters())}
    assert_close(momenta, {str(i): theirs.velocity.get(i) for i in range(len(theirs.parameters))}, atol=1e-9)


def test_a_skipped_branch_coasts_with_zero_and_freezes_with_none() -> None:
    """The difference the option is about: momentum and decay act on a branch that did not run, or they do not."""
    moved = {}
    for skipped_grad in ("zero", "none"):
        net = mlp()
        depth = sd.make_stochastic_(net, SURVIVAL_PROBS, skipped_grad=skipped_grad)
        optimizer = torch.optim.SGD(net.parameters(), nesterov=True, **HYPERPARAMETERS)
        for gate in (True, False):
            optimizer.zero_grad()
            with depth.gates([gate] * 4):
                loss_of(net(vectors(3))).backward()
            before = net.blocks[0].residual.branch[0].weight.detach().clone()
            optimizer.step()
        moved[skipped_grad] = (net.blocks[0].residual.branch[0].weight.detach() - before).abs().max().item()
    assert moved["none"] == 0
    assert moved["zero"] > 1e-4


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_with_certain_survival_training_is_that_of_the_plain_network_bit_for_bit(granularity: str) -> None:
    plain = conv_net(dtype=torch.float32)
    net = copied(plain)
    sd.make_stochastic_(net, sd.uniform(1.0), granularity=granularity)
    for trained in (net, plain):
        optimizer = torch.optim.SGD(trained.parameters(), nesterov=True, **HYPERPARAMETERS)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(trained(images(6, seed=step, dtype=torch.float32))).backward()
            optimizer.step()
    reference.assert_same(state_of(net), state_of(plain))
