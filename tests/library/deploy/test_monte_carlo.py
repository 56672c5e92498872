"""`monte_carlo` against subnetworks enumerated by hand."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import nn

import stochastic_depth as sd

P = [0.9, 0.35, 0.6, 0.5]


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    return -(probabilities * probabilities.log()).sum(1)


def test_all_four_numbers_are_those_of_the_networks_that_were_drawn() -> None:
    net, x = reference.conv_net().eval(), reference.images(5)
    plain = reference.copied(net)
    sd.make_stochastic_(net, P)
    prediction = sd.monte_carlo(net, x, num_samples=6)
    patterns = drawn(net, x, 6)
    assert len(set(patterns)) > 1
    predicted = torch.stack([reference.forward(plain, x, gates=gates).softmax(1) for gates in patterns])
    mean = predicted.mean(0)
    torch.testing.assert_close(prediction.mean, mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(prediction.variance, predicted.var(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(prediction.entropy, entropy(mean), atol=1e-12, rtol=0)
    information = entropy(mean) - torch.stack([entropy(each) for each in predicted]).mean(0)
    torch.testing.assert_close(prediction.mutual_information, information, atol=1e-12, rtol=0)
    assert (information > 1e-4).all()


def drawn(net: nn.Module, x: torch.Tensor, num_samples: int) -> list[tuple[bool, ...]]:
    """The subnetworks of `monte_carlo`, observed from outside: the branches that each forward calls."""
    patterns: list[list[bool]] = []
    begin = net.register_forward_pre_hook(lambda _m, _x: patterns.append([False] * len(P)))
    hooks = [
        residual.branch.register_forward_pre_hook(lambda _m, _x, i=index: patterns[-1].__setitem__(i, True))
        for index, residual in enumerate(reference.residuals_of(net))
    ]
    sd.monte_carlo(net, x, num_samples=num_samples)
    for hook in (begin, *hooks):
        hook.remove()
    return [tuple(pattern) for pattern in patterns]


def test_the_mean_of_many_comes_close_to_all_subnetworks_weighted_by_their_probability() -> None:
    net, x = reference.linear_net(), reference.vectors(3)
    plain = reference.copied(net)
    patterns = reference.every_pattern(4)
    weights = torch.tensor([reference.pattern_prob(gates, P) for gates in patterns]).double()
    outputs = torch.stack([reference.forward(plain, x, gates=gates) for gates in patterns])
    exact_mean = torch.einsum("s,s...->...", weights, outputs)
    exact_variance = torch.einsum("s,s...->...", weights, (outputs - exact_mean).square())
    sd.make_stochastic_(net, P)
    prediction = sd.monte_carlo(net, x, num_samples=2000, outputs="values")
    standard_error = (exact_variance / 2000).sqrt()
    assert ((prediction.mean - exact_mean).abs() < 4.5 * standard_error).all()
    torch.testing.assert_close(prediction.variance, exact_variance, rtol=0.2, atol=0)
    assert prediction.entropy is None
    assert prediction.mutual_information is None


@pytest.mark.parametrize("rescale", ["train", "eval"])
def test_an_open_branch_counts_as_in_training(rescale: str) -> None:
    net, x = reference.mlp(), reference.vectors(3)
    plain = reference.copied(net)
    sd.make_stochastic_(net, P, rescale=rescale)
    patterns = drawn(net, x, 4)
    factors = reference.training_factors(P, rescale)
    outputs = torch.stack([reference.forward(plain, x, gates=gates, factors=factors) for gates in patterns])
    mean = sd.monte_carlo(net, x, 4, outputs="values").mean
    torch.testing.assert_close(mean, outputs.mean(0), atol=1e-12, rtol=0)


def test_nothing_of_the_model_changes_and_a_seed_repeats_the_draw() -> None:
    net, x = reference.conv_net().train(), reference.images(4)
    net.blocks[0].eval()
    depth = sd.make_stochastic_(net, P, granularity="sample")
    state, modes = reference.state_of(net), [module.training for module in net.modules()]
    first = sd.monte_carlo(net, x, 4)
    assert depth.state_dict()["counter"] == 0
    assert [module.training for module in net.modules()] == modes
    reference.assert_same(reference.state_of(net), state)
    assert torch.equal(first.mean, sd.monte_carlo(net, x, 4).mean)
    assert not torch.equal(first.mean, sd.monte_carlo(net, x, 4, seed=1).mean)
    # All inputs meet the same subnetworks: how they are batched does not matter.
    torch.testing.assert_close(sd.monte_carlo(net, x[:2], 4).mean, first.mean[:2], atol=1e-13, rtol=0)


def test_where_nothing_is_dropped_all_networks_agree() -> None:
    net, x = reference.conv_net(), reference.images(4)
    sd.make_stochastic_(net, sd.uniform(1.0))
    prediction = sd.monte_carlo(net, x, 3)
    assert prediction.variance.max() < 1e-30
    assert prediction.mutual_information.max() < 1e-14
    probabilities = sd.monte_carlo(nn.Sequential(net, nn.Softmax(1)), x, 3, outputs="probabilities")
    torch.testing.assert_close(probabilities.mean, prediction.mean, atol=1e-13, rtol=0)


def test_wrong_input_is_refused() -> None:
    net, x = reference.mlp(), reference.vectors(2)
    with pytest.raises(ValueError, match="not stochastic"):
        sd.monte_carlo(net, x)
    sd.make_stochastic_(net, P)
    with pytest.raises(ValueError, match="at least 2, but is 1"):
        sd.monte_carlo(net, x, 1)
    with pytest.raises(ValueError, match="outputs must be one of"):
        sd.monte_carlo(net, x, outputs="classes")

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.net(x),)

    with pytest.raises(TypeError, match="must be a tensor, or have the attribute logits"):
        sd.monte_carlo(Tuple(), x)
