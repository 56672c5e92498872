"""Autograd does not store samples gathered from a batch that it stores anyway."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from reference import assert_close, gradients, vectors
from torch import Tensor, nn

import stochastic_depth as sd

GATES = [torch.tensor([True, False, True, True, False])]


class Looking(nn.Module):
    """A branch that remembers the samples that it was given without keeping them."""

    def __init__(self, before: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.before = before
        self.given: weakref.ref[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.given = weakref.ref(x)
        return self.linear(x if self.before is None else self.before(x))

    def is_kept(self) -> bool:
        return self.given is not None and self.given() is not None


class Net(nn.Module):
    """One gated sum, and where its input comes from."""

    def __init__(self, made_by: Callable[[Tensor], Tensor], branch: Looking) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 5)
        self.made_by = made_by
        self.residual = sd.Residual(branch)

    def forward(self, x: Tensor) -> Tensor:
        self.input = self.made_by(self.stem(x))
        return self.residual(self.input)


def net_of(made_by: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor] | None = None) -> Net:
    torch.manual_seed(0)
    return Net(made_by, Looking(before)).double()


def stochastic(net: Net) -> sd.Controller:
    return sd.make_stochastic_(net, [0.6], granularity="sample", rescale="none")


def reference_gradients(net: Net, x: Tensor) -> dict[str, Tensor]:
    """Those of the same network, its survivors taken by PyTorch's own operators."""
    plain = net_of(net.made_by, net.residual.branch.before)
    plain.load_state_dict(net.state_dict())
    batch = plain.made_by(plain.stem(x))
    rows = GATES[0].nonzero().flatten()
    batch.index_add(0, rows, plain.residual.branch(batch.index_select(0, rows))).square().sum().backward()
    return gradients(plain)


@pytest.mark.parametrize("made_by", [torch.relu, torch.sigmoid, lambda x: torch.relu_(x * 1)])
def test_samples_of_a_batch_that_is_kept_are_not_kept(made_by: Callable[[Tensor], Tensor]) -> None:
    net, x = net_of(made_by), vectors(5)
    depth = stochastic(net)
    with depth.gates(GATES):
        output = net(x)
    assert not net.residual.branch.is_kept()
    output.square().sum().backward()
    assert_close(gradients(net), reference_gradients(net, x))


@pytest.mark.parametrize("made_by", [lambda x: x + 1, lambda x: x * 2, nn.Identity()])
def test_samples_of_a_batch_that_is_not_kept_are_kept_instead(made_by: Callable[[Tensor], Tensor]) -> None:
    net, x = net_of(made_by), vectors(5)
    depth = stochastic(net)
    with depth.gates(GATES):
        output = net(x)
    assert net.residual.branch.is_kept()
    del output
    assert not net.residual.branch.is_kept()


def test_a_second_backward_goes_through_what_was_taken_again() -> None:
    """The gradient of a norm of gradients, as a gradient penalty takes it."""

    def penalty(output: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)[0].square().sum()

    net = net_of(torch.sigmoid)
    ours, theirs = (vectors(5).requires_grad_() for _ in range(2))
    depth = stochastic(net)
    with depth.gates(GATES):
        penalty(net(ours), ours).backward()
    of_ours = gradients(net)
    net.zero_grad()
    batch, rows = torch.sigmoid(net.stem(theirs)), GATES[0].nonzero().flatten()
    output = batch.index_add(0, rows, net.residual.branch(batch.index_select(0, rows)))
    penalty(output, theirs).backward()
    assert_close(of_ours, gradients(net))
    assert_close({"input": ours.grad}, {"input": theirs.grad})


@pytest.mark.parametrize("frozen", [False, True])
def test_a_branch_may_not_change_the_samples_in_place(frozen: bool) -> None:
    """The plain network's branch would change the shortcut too; here it could not."""
    net = net_of(torch.relu, lambda x: x.mul_(3))
    net.stem.requires_grad_(not frozen)
    with stochastic(net).gates(GATES), pytest.raises(RuntimeError, match="residual changes its input in place"):
        net(vectors(5))
    with sd.controller(net).gates([True]):
        net(vectors(5))  # all samples: as in the plain network


def test_a_batch_that_is_changed_before_the_backward_is_an_error() -> None:
    """As in the plain network, whose branch keeps the batch."""
    net, x = net_of(torch.relu), vectors(5)
    with stochastic(net).gates(GATES):
        output = net(x)
    with torch.no_grad():
        net.input.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place before its backward"):
        output.sum().backward()


def test_hooks_on_saved_tensors_see_the_samples() -> None:
    """Activation checkpointing, and tensors that wait for their backward on another device."""
    net, x = net_of(torch.relu), vectors(5)
    depth = stochastic(net)
    seen: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    with depth.gates(GATES), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x).square().sum().backward()
    assert (3, 5) in seen
    net.zero_grad()
    with depth.gates(GATES), torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        net(x).square().sum().backward()
    assert_close(gradients(net), reference_gradients(net, x))
