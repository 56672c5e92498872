"""One gate per sample: the library runs the survivors only, and equals a mask over all samples."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import (
    assert_binomial,
    assert_close,
    buffers,
    conv_net,
    copied,
    counted_calls,
    gradients,
    images,
    loss_of,
    mlp,
    training_factors,
    vectors,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.gates import draw_counts, draw_order

SURVIVAL_PROBS = [0.9, 0.7, 0.5, 0.3]


def drawn_masks(survival_probs: list[float], num_samples: int, *, seed: int, counter: int) -> list[Tensor]:
    """The gates of a step, from the pure functions that promise them."""
    counts = draw_counts(survival_probs, num_samples, seed=seed, counter=counter)
    order = draw_order(len(survival_probs), num_samples, seed=seed, counter=counter)
    masks = torch.zeros(len(survival_probs), num_samples, dtype=torch.bool)
    for mask, row, count in zip(masks, order, counts, strict=True):
        mask[row[:count]] = True
    return list(masks)


def masked_forward(net: nn.Module, x: Tensor, masks: list[Tensor], factors: list[float]) -> Tensor:
    """What timm and torchvision do: every branch runs on all samples and is multiplied by a mask."""
    h = net.stem(x)
    for block, mask, factor in zip(net.blocks, masks, factors, strict=True):
        residual = block.residual
        shortcut = h if residual.shortcut is None else residual.shortcut(h)
        output = residual.branch(h)
        h = block.after(shortcut + factor * output * mask.to(output.dtype).view(-1, *[1] * (output.dim() - 1)))
    return net.head(h)


@pytest.mark.parametrize("num_samples", range(1, 65))
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_every_batch_size_equals_the_mask(kind: str, num_samples: int) -> None:
    """Without BatchNorm no sample depends on another: survivors alone give what a mask gives, gradients too."""
    plain = mlp() if kind == "mlp" else conv_net(batch_norm=False)
    x = (vectors if kind == "mlp" else images)(num_samples)
    net = copied(plain)
    rescale = ("eval", "train", "none")[num_samples % 3]
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample", rescale=rescale, seed=num_samples)
    factors = training_factors(SURVIVAL_PROBS, rescale)
    for step in range(2):
        masks = drawn_masks(SURVIVAL_PROBS, num_samples, seed=num_samples, counter=step)
        net.zero_grad()
        plain.zero_grad()
        with counted_calls(net) as calls:
            ours = net(x)
        assert calls == [[int(mask.sum())] if mask.any() else [] for mask in masks]
        assert depth.last_gates == [pytest.approx(mask.double().mean().item()) for mask in masks]
        theirs = masked_forward(plain, x, masks, factors)
        loss_of(ours).backward()
        loss_of(theirs).backward()
        assert_close({"output": ours.detach()}, {"output": theirs.detach()})
        assert_close(gradients(net), gradients(plain))


@pytest.mark.parametrize("num_samples", range(1, 65))
def test_every_batch_size_equals_the_survivors_with_batch_norm(num_samples: int) -> None:
    """With BatchNorm the statistics are those of the survivors."""
    plain, x = conv_net(), images(num_samples)
    net = copied(plain)
    sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample", seed=num_samples)
    for step in range(2):
        masks = drawn_masks(SURVIVAL_PROBS, num_samples, seed=num_samples, counter=step)
        net.zero_grad()
        plain.zero_grad()
        ours, theirs = net(x), reference.forward(plain, x, masks)
        loss_of(ours).backward()
        loss_of(theirs).backward()
        reference.fill_skipped_gradients(plain, masks, "zero")
        assert_close({"output": ours.detach()}, {"output": theirs.detach()})
        assert_close(gradients(net), gradients(plain), atol=1e-9)
        assert_close(buffers(net), buffers(plain))


@pytest.mark.parametrize("num_samples", [1, 2, 5, 64])
def test_each_sample_is_kept_with_its_probability(num_samples: int) -> None:
    """Checked from outside with exact binomial tests: the rows that a branch of ones changed."""

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    survival_probs = [0.8, 0.45]
    num_steps = 1500 if num_samples < 64 else 400
    kept = torch.zeros(2, num_samples, dtype=torch.int64)
    both = torch.zeros(num_samples, dtype=torch.int64)
    net = nn.Sequential(*[sd.Residual(One()) for _ in survival_probs])
    sd.make_stochastic_(net, survival_probs, granularity="sample")
    zeros = torch.zeros(num_samples, 1)
    for _ in range(num_steps):
        rows = []
        hook = net[0].register_forward_hook(lambda _m, _i, y, rows=rows: rows.append(y.clone()))
        output = net(zeros)
        hook.remove()
        first = rows[0][:, 0] > 0
        second = (output - rows[0])[:, 0] > 0
        kept += torch.stack([first, second])
        both += first & second
    for sample in range(min(num_samples, 8)):
        for branch, survival_prob in enumerate(survival_probs):
            assert_binomial(int(kept[branch, sample]), num_steps, survival_prob, f"branch {branch}, sample {sample}")
        assert_binomial(int(both[sample]), num_steps, 0.8 * 0.45, f"both, sample {sample}")


def test_the_factor_is_one_over_p_and_never_n_over_k() -> None:
    net = sd.Residual(nn.Identity())
    sd.make_stochastic_(net, [0.3], granularity="sample", rescale="train")
    x = torch.ones(5, 1, dtype=torch.float64)
    for _ in range(20):
        values = net(x).unique().tolist()
        assert values == [1.0, pytest.approx(1 + 1 / 0.3, abs=1e-12)]


# ---------------------------------------------------------------------------------------------- BatchNorm, one sample


class _Pooled(nn.Module):
    """A branch with BatchNorm on vectors inside, as in squeeze-and-excitation, while its input has an extent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm(x.mean((2, 3))).sigmoid()[:, :, None, None]


ONE_VALUE = {
    "vectors": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), (4,)),
    "one-pixel": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()), (4, 1, 1)),
    "one-step": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Tanh()), (4, 1)),
}
POOLED = pytest.param(
    _Pooled,
    (4, 2, 2),
    id="pooled-inside",
)


@pytest.mark.parametrize("num_samples", [2, 3, 8])
@pytest.mark.parametrize(
    ("make", "shape"), [pytest.param(*case, id=name) for name, case in ONE_VALUE.items()] + [POOLED]
)
@pytest.mark.parametrize("how", ["forced", "drawn"])
def test_one_survivor_where_batch_norm_would_see_one_value(make, shape, num_samples: int, how: str) -> None:
    """Enlarged by a sample of weight 0: statistics of the two, but only the survivor's row changes."""
    torch.manual_seed(0)
    plain = sd.Residual(make()).double()
    net = copied(plain)
    depth = sd.make_stochastic_(net, [1 / num_samples], granularity="sample", rescale="train")
    x = torch.randn(num_samples, *shape, dtype=torch.float64)
    if how == "forced":
        with depth.gates([torch.arange(num_samples) == 1]):
            ours = net(x)
    else:
        ours = net(x)
    changed = [index for index in range(num_samples) if not torch.equal(ours[index], x[index])]
    assert len(changed) == 1
    (survivor,) = changed
    loss_of(ours).backward()
    matches = 0
    for other in range(num_samples):
        if other == survivor:
            continue
        theirs_net = copied(plain)
        pair = theirs_net.branch(torch.stack([x[survivor], x[other]]))
        rows = list(x)
        rows[survivor] = x[survivor] + num_samples * pair[0]
        theirs = torch.stack(rows)
        if torch.allclose(ours, theirs, atol=1e-12):
            matches += 1
            loss_of(theirs).backward()
            assert_close(gradients(net), gradients(theirs_net))
            assert_close(buffers(net), buffers(theirs_net))
    assert matches >= 1


def test_a_batch_of_one_fails_as_the_plain_network_does() -> None:
    plain = sd.Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    net = copied(plain)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample")
    x = torch.randn(1, 4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        plain(x)
    with depth.gates([True]), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        net(x)
    with depth.gates([False]):
        assert torch.equal(net(x), x)


def test_one_survivor_is_alone_where_batch_norm_is_in_evaluation_mode() -> None:
    """A frozen BatchNorm normalizes by its buffers: no second sample is paid for."""
    net = sd.Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    depth = sd.make_stochastic_(net, [0.5], granularity="sample")
    net.branch[1].eval()
    with depth.gates([torch.tensor([True, False, False])]), counted_calls(net) as calls:
        net(torch.randn(3, 4))
    assert calls == [[1]]


class _Mean(nn.Module):
    """(N, L, C) to (N, 1, C), which the sum spreads over L."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1, keepdim=True))


def test_a_branch_that_is_spread_over_the_shortcut() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(sd.Residual(_Mean())).double()
    net = copied(plain)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample", rescale="train")
    x, gate = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([True, False, True, True])
    with depth.gates([gate]):
        output = net(x)
    expected = x + 2 * plain[0].branch(x) * gate.view(-1, 1, 1)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert_close(gradients(net), gradients(plain))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_shortcut_that_is_smaller_than_the_sum_is_refused(granularity: str) -> None:
    net = nn.Sequential(sd.Residual(nn.Identity(), shortcut=_Mean()))
    depth = sd.make_stochastic_(net, [0.5], granularity=granularity)
    gates = [True] if granularity == "batch" else [torch.tensor([True, False])]
    match = r"The branch 0 gives \([12], 5, 3\) to a shortcut of \(2, 1, 3\).*expand the shortcut first"
    with depth.gates(gates), pytest.raises(ValueError, match=match):
        net(torch.ones(2, 5, 3))


def test_an_empty_batch() -> None:
    plain = mlp()
    net = copied(plain)
    sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    assert net(vectors(0)).shape == plain(vectors(0)).shape == (0, 3)


def test_a_forced_gate_of_the_wrong_length_leaves_the_model_usable() -> None:
    net, x = mlp(), vectors(3)
    depth = sd.make_stochastic_(net, SURVIVAL_PROBS, granularity="sample")
    gates = [True, torch.tensor([True, False]), True, True]
    expected = r"^The gate of 'blocks\.1\.residual' has 2 entries, but the batch has 3 samples\.$"
    with depth.gates(gates), pytest.raises(ValueError, match=expected):
        net(x)
    assert depth.state_dict()["counter"] == 0
    net(x)
    assert depth.state_dict()["counter"] == 1


def test_forced_masks_are_copied() -> None:
    net, x = mlp(1), vectors(3)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample")
    mask = torch.tensor([True, False, False])
    with depth.gates([mask]):
        before = net(x)
        mask.fill_(True)
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_sum_of_two_precisions_has_the_plain_sums(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 3).to(dtypes[1])

    net = sd.Residual(Cast())
    x = torch.ones(4, 2, dtype=dtypes[0], requires_grad=True)
    plain = net(x)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample")
    with depth.gates([torch.tensor([True, False, True, True])]):
        ours = net(x)
    assert ours.dtype == plain.dtype == torch.float32
    assert ours[:, 0].tolist() == [4, 1, 4, 4]
    ours.sum().backward()
    assert x.grad.dtype == dtypes[0]
    assert x.grad[:, 0].tolist() == [4, 1, 4, 4]


@pytest.mark.parametrize("training", [True, False])
def test_forced_gates_of_branches_inside_branches(*, training: bool) -> None:
    layers = [nn.Linear(4, 4).double() for _ in range(4)]
    middle = sd.Residual(nn.Sequential(layers[1], sd.Residual(layers[2]), sd.Residual(layers[3])))
    net = sd.Residual(nn.Sequential(layers[0], middle)).train(training)
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample", rescale="none")
    assert depth.names == ["", "branch.1", "branch.1.branch.1", "branch.1.branch.2"]
    x = vectors(6).double()[:, :4]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        gates = torch.rand(4, 6, generator=generator) < 0.6
        a, b, c, d = gates[..., None].double()
        h = layers[0](x)
        y = layers[1](h)
        y = y + c * layers[2](y)
        y = y + d * layers[3](y)
        expected = x + a * (h + b * y)
        with depth.gates(list(gates)):
            actual = net(x)
        both = [
            {"output": output}
            | {
                str(i): torch.autograd.grad(output.sum(), layer.weight, retain_graph=True)[0]
                for i, layer in enumerate(layers)
            }
            for output in (actual, expected)
        ]
        assert_close(*both)
    with pytest.raises(ValueError, match="has 6 entries, but the batch has 5 samples"), depth.gates(list(gates)):
        net(x[:5])


class TokenConv(nn.Module):
    """A convolution and BatchNorm on tokens (N, 12, C), as in CvT; with `norm_first`, only BatchNorm."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.conv = nn.Identity() if norm_first else nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.query, self.f = nn.BatchNorm2d(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def normalized(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        images = self.normalized(self.conv(x.transpose(1, 2).reshape(x.shape[0], 8, 4, 3)))
        tokens = images.flatten(2).transpose(1, 2)
        return self.f(nn.functional.scaled_dot_product_attention(self.query(x), tokens, tokens))


class TokenConvByHand(TokenConv):
    def normalized(self, x: Tensor) -> Tensor:
        mean, variance = self.norm.running_mean, self.norm.running_var
        if self.norm.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (variance.view(shape) + self.norm.eps).sqrt()
        return x * self.norm.weight.view(shape) + self.norm.bias.view(shape)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("as_layer", [False, True])
def test_gradients_of_a_single_survivor_that_passes_batch_norm(
    *, norm_first: bool, frozen: bool, as_layer: bool
) -> None:
    torch.manual_seed(0)
    branch, plain = TokenConv(norm_first=norm_first).double(), TokenConvByHand(norm_first=norm_first).double()
    plain.load_state_dict(branch.state_dict())
    net = nn.Sequential(branch) if as_layer else sd.Residual(branch)
    depth = sd.make_stochastic_(net, [0.5], granularity="sample", rescale="none", layers=["0"] if as_layer else None)
    branch.norm.train(not frozen)
    plain.norm.train(not frozen)
    x, weights = torch.randn(4, 12, 8, dtype=torch.float64), torch.randn(4, 12, 8, dtype=torch.float64)
    with depth.gates([torch.tensor([False, False, True, False])]):
        (net(x) * weights).sum().backward()
    (plain(x[2:3]) * weights[2:3]).sum().backward()
    assert_close(gradients(branch), gradients(plain))


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("outside", [False, True])
def test_a_single_survivor_in_a_checkpoint_is_recomputed_once(*, outside: bool) -> None:
    torch.manual_seed(0)
    branch, plain = TokenConv(norm_first=False).double(), TokenConvByHand(norm_first=False).double()
    plain.load_state_dict(branch.state_dict())
    net = Recomputed(sd.Residual(branch)) if outside else sd.Residual(Recomputed(branch))
    depth = sd.make_stochastic_(net, [0.5], granularity="sample", rescale="none")
    x, weights = torch.randn(4, 12, 8, dtype=torch.float64), torch.randn(4, 12, 8, dtype=torch.float64)
    calls: list[int] = []
    branch.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    with depth.gates([torch.tensor([False, False, True, False])]):
        loss = (net(x) * weights).sum()
    assert calls == [1]
    loss.backward()
    assert calls == [1, 1]
    (plain(x[2:3]) * weights[2:3]).sum().backward()
    assert_close(gradients(branch), gradients(plain))
