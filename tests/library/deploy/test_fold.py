"""`fold_` and `convert_rescale_`: outputs unchanged, to rounding, against networks written out by hand."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import plain_models
import pytest
import reference
import torch
from plain_models import (
    TIMM,
    TORCHVISION,
    TRANSFORMERS,
    DropPath,
    awake,
    first_tensor,
    same_classes,
    timm_model,
    torchvision_resnet,
    transformers_model,
    with_factors,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import stochastic_depth as sd


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"differs by {error:.1e} of the largest value"


# ---------------------------------------------------------------------------------------------- our networks


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [(reference.conv_net, reference.images), (reference.mlp, reference.vectors)],
    ids=["conv-bn", "linear"],
)
def test_a_folded_network_is_plain_and_gives_what_the_test_rule_gives(
    make: Callable[..., nn.Module], inputs: Callable[..., Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    net, x = make(dtype=dtype).eval(), inputs(5, dtype=dtype)
    survival_probs = [0.9, 0.35, 0.6, 0.5]
    expected = reference.evaluate(reference.copied(net), x, survival_probs, "eval")
    keys = list(net.state_dict())
    sd.make_stochastic_(net, survival_probs)
    sd.fold_(net)
    assert_near(net(x), expected, tolerance)
    reference.assert_plain(net, keys)
    fresh = make(seed=9, dtype=dtype).eval()
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(fresh(x), net(x))


def test_folding_holds_in_training_mode_too_where_batchnorm_takes_the_batch() -> None:
    net, x = reference.conv_net().train(), reference.images(6)
    survival_probs = [0.9, 0.35, 0.6, 0.5]
    expected = reference.forward(reference.copied(net), x, factors=survival_probs)
    sd.make_stochastic_(net, survival_probs)
    sd.fold_(net)
    assert net.training
    assert_near(net(x), expected, 1e-12)


@pytest.mark.parametrize("shortcut", ["pad", "projection_all"])
def test_the_papers_network_costs_what_constant_depth_costs(shortcut: str) -> None:
    net = awake(sd.models.cifar_resnet(14, shortcut=shortcut))
    plain, x = copy.deepcopy(net), plain_models.images(16)
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5))
    before = net(x)
    names = depth.names
    sd.fold_(net)
    assert_near(net(x), before, 1e-12)
    assert not torch.allclose(before, plain(x), rtol=1e-3)  # the factors matter here
    assert operators(net, x) == operators(plain, x)
    assert [name for name, module in net.named_modules() if type(module) is sd.Residual] == names


def operators(net: nn.Module, x: Tensor) -> list[str]:
    """The operators of a forward, each with shapes, strides, types and other arguments."""

    def described(value: object) -> object:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.stride(), value.dtype
        return value

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append(f"{func} {tree_map(described, (args, kwargs))}")
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Calls() as seen:
        net(x)
    return seen.calls


@pytest.mark.parametrize("rescale", ["train", "none"])
def test_without_a_factor_in_evaluation_no_weight_changes(rescale: str) -> None:
    net, x = reference.conv_net().eval(), reference.images(3)
    before, expected = reference.state_of(net), net(x)
    sd.make_stochastic_(net, sd.uniform(0.5), rescale=rescale)
    sd.fold_(net)
    reference.assert_same(reference.state_of(net), before)
    assert torch.equal(net(x), expected)
    reference.assert_plain(net)


def test_probabilities_that_were_changed_in_training_are_those_that_are_folded() -> None:
    net, x = reference.mlp().eval(), reference.vectors(3)
    plain = reference.copied(net)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    depth.set_survival_probs([1.0, 0.9, 0.8, 0.7])
    sd.fold_(net)
    assert_near(net(x), reference.evaluate(plain, x, [1.0, 0.9, 0.8, 0.7], "eval"), 1e-12)


# ---------------------------------------------------------------------------------------------- what cannot be folded


class Gated(nn.Module):
    """x * sigmoid(...): the gate must not see the factor that x has."""

    def __init__(self, *before: nn.Module, add: float = 0.0) -> None:
        super().__init__()
        self.before, self.fc, self.add = nn.Sequential(*before), nn.Linear(6, 6), add

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return x * torch.sigmoid(self.fc(y + self.add if self.add else y))


class TiedGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gate.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * torch.sigmoid(self.gate(y))


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * torch.sigmoid(y)


class TiedWeights(nn.Module):
    """The last map's weight is the first one's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(nn.functional.linear(x, self.f.weight.t()).relu())


ENDS = {
    "used-twice": lambda: UsedTwice(),
    "weights-used-twice": lambda: TiedWeights(),
    "gelu": lambda: nn.Sequential(nn.Linear(6, 6), nn.GELU()),
    "gate-behind-a-norm": lambda: nn.Sequential(nn.Linear(6, 6), Gated(nn.LayerNorm(6))),
    "gate-behind-a-sum": lambda: nn.Sequential(nn.Linear(6, 6), Gated(add=0.5)),
    "gate-of-the-input": lambda: Gated(),
    "gate-of-the-same-weights": lambda: TiedGate(),
    "no-weights": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, elementwise_affine=False)),
    "parametrised": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "padding": lambda: nn.Sequential(nn.Linear(6, 5), nn.ConstantPad1d((0, 1), 1.0)),
    "a-branch-inside": lambda: sd.Residual(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_cannot_be_folded_keeps_its_factor_and_is_named(end: str) -> None:
    torch.manual_seed(0)
    residuals = [sd.Residual(nn.Linear(6, 6)), sd.Residual(ENDS[end]())]
    net = nn.Sequential(*residuals).double().eval()
    keys, x = list(net.state_dict()), torch.randn(4, 6, dtype=torch.float64)
    plain = copy.deepcopy(net)
    h = x + 0.7 * plain[0].branch(x)
    expected = h + 0.4 * plain[1].branch(h)
    sd.make_stochastic_(net, [0.7, 0.4], where=["0", "1"])
    with pytest.warns(UserWarning, match=r"probability 0\.4 of 1 cannot go into weights: .* stays as a scalar"):
        sd.fold_(net)
    assert_near(net(x), expected, 1e-12)
    assert type(net[0]) is sd.Residual
    assert list(net.state_dict()) == keys
    if end != "parametrised":  # PyTorch pickles no parametrised module
        assert_near(reloaded(copy.deepcopy(net))(x), expected, 1e-12)


def reloaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


FOLDABLE = {
    "gate": lambda: nn.Sequential(nn.Linear(6, 6), Gated()),
    "gate-behind-a-relu": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), Gated(nn.ReLU(), nn.Dropout(0.2))),
    "two-gates": lambda: nn.Sequential(nn.Linear(6, 6), Gated(), nn.ReLU(), Gated()),
    "relu-behind": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU()),
    "dropout-behind": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)),
    "sum-of-two": lambda: SumOfTwo(),
    "layer-scale": lambda: LayerScaled(),
    "in-place": lambda: ChangedInPlace(),
    "layer-norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)),
}


class SumOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class LayerScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Sequential(nn.Linear(6, 6), nn.GELU()), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mul_(self.gamma.view(1, -1))


class ChangedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y /= 2
        y -= self.b(x)
        y *= self.gain
        y @= torch.eye(6, dtype=x.dtype)
        return y


@pytest.mark.parametrize("end", FOLDABLE)
def test_ends_that_pass_a_factor_on_are_folded(end: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(sd.Residual(FOLDABLE[end]())).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x + 0.4 * net[0].branch(x)
    sd.make_stochastic_(net, [0.4])
    sd.fold_(net)
    assert type(net[0]) is sd.Residual
    assert_near(net(x), expected, 1e-12)


def test_weights_that_several_branches_share_are_left_alone() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    tied = nn.Linear(6, 6)
    tied.weight = shared.weight
    net = nn.Sequential(sd.Residual(shared), sd.Residual(shared), sd.Residual(tied)).double()
    x, weight = torch.randn(4, 6, dtype=torch.float64), shared.weight.detach().clone()
    h = x + 0.8 * shared(x)
    h = h + 0.6 * shared(h)
    expected = h + 0.4 * tied(h)
    sd.make_stochastic_(net, [0.8, 0.6, 0.4])
    with pytest.warns(UserWarning, match="shared with another part of the model") as warned:
        sd.fold_(net.eval())
    assert len(warned) == 3
    assert torch.equal(shared.weight, weight)
    assert_near(net(x), expected, 1e-12)


def test_a_block_that_is_used_twice_is_folded_once() -> None:
    torch.manual_seed(0)
    residual = sd.Residual(nn.Linear(6, 6))
    net = nn.Sequential(residual, nn.Tanh(), residual).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    h = torch.tanh(x + 0.4 * residual.branch(x))
    expected = h + 0.4 * residual.branch(h)
    sd.make_stochastic_(net, [0.4])
    sd.fold_(net)
    assert_near(net(x), expected, 1e-12)


def test_a_whole_layer_keeps_its_factor() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())).double().eval()
    net.append(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double().eval())
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    h = net[1](net[0](x))
    expected = h + 0.4 * (net[2](h) - h)
    sd.make_stochastic_(net, [0.4], layers=["2"])
    with pytest.warns(UserWarning, match="whole layer"):
        sd.fold_(net)
    assert_near(net(x), expected, 1e-12)
    assert isinstance(net[2], nn.TransformerEncoderLayer)


def test_a_residual_that_is_a_whole_layer_is_scaled_as_a_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(sd.Residual(nn.Linear(6, 6), nn.Linear(6, 6))).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x + 0.4 * (net[0](x) - x)
    sd.make_stochastic_(net, [0.4], layers=["0"])
    with pytest.warns(UserWarning, match="whole layer"):
        sd.fold_(net)
    assert_near(net(x), expected, 1e-12)
    assert_near(reloaded(copy.deepcopy(net))(x), expected, 1e-12)


class TwoSums(nn.Module):
    """Two residual sums with drop paths; the second branch ends in `end`."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.a, self.drop_path1 = nn.Linear(6, 6), DropPath(0.2)
        self.b, self.drop_path2 = nn.Sequential(nn.Linear(6, 6), end), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.a(x))
        return x + self.drop_path2(self.b(x))


@pytest.mark.parametrize("keep", [[0, 1], [1]], ids=["all", "one"])
@pytest.mark.parametrize("end", [nn.Identity, nn.GELU], ids=["into-weights", "scalars"])
def test_a_layer_with_drop_paths_has_the_factor_in_each_of_its_sums(end: type[nn.Module], keep: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(TwoSums(end()), TwoSums(end())).double().eval()
    keys, x = list(net.state_dict()), torch.randn(4, 6, dtype=torch.float64)
    expected, plain = x, copy.deepcopy(net)
    for index in keep:
        expected = expected + 0.5 * plain[index].a(expected)
        expected = expected + 0.5 * plain[index].b(expected)
    sd.make_stochastic_(net, sd.uniform(0.5), layers=["*"])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        small = sd.subnetwork(net, keep)
        sd.fold_(net)
    assert_near(small(x), expected, 1e-12)
    if end is nn.Identity:
        assert not warned
        assert same_classes(net, plain)
    else:
        assert len(warned) == len(keep) + 2
        assert "it ends in a call of gelu. It stays as a scalar" in str(warned[0].message)
    if len(keep) == 2:
        assert_near(net(x), expected, 1e-12)
    assert list(net.state_dict()) == keys


def test_a_layer_with_drop_paths_is_converted_in_each_of_its_sums() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(TwoSums(nn.Identity())).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    sd.make_stochastic_(net, [0.5], layers=["*"])
    before = net(x)
    sd.convert_rescale_(net, "train")
    assert "rescale 'train'" in str(sd.controller(net))
    assert_near(net(x), before, 1e-12)


class OneSum(nn.Module):
    def __init__(self, branch: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.branch, self.drop_path = branch, drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


def test_blocks_that_share_a_drop_path_keep_their_own_factors() -> None:
    torch.manual_seed(0)
    shared = DropPath(0.2)
    branches = [nn.Linear(6, 6), *(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(2))]
    net = nn.Sequential(*(OneSum(branch, shared) for branch in branches)).double().eval()
    keys, x = list(net.state_dict()), torch.randn(4, 6, dtype=torch.float64)
    expected, plain = x, copy.deepcopy(net)
    for p, block in zip([0.9, 0.6, 0.3], plain, strict=True):
        expected = expected + p * block.branch(expected)
    sd.make_stochastic_(net, [0.9, 0.6, 0.3])
    with pytest.warns(UserWarning, match="stays as a scalar") as warned:
        sd.fold_(net)
    assert len(warned) == 2
    assert_near(net(x), expected, 1e-12)
    assert list(net.state_dict()) == keys


class ThreeSums(nn.Module):
    """The second drop path is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.once, self.twice = DropPath(0.2), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.once(torch.tanh(self.a(x)))
        x = x + self.twice(torch.tanh(self.b(x)))
        return x + self.twice(torch.tanh(self.c(x)))


def test_a_block_keeps_the_factors_of_all_of_its_branches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(ThreeSums()).double().eval()
    plain, x = copy.deepcopy(net)[0], torch.randn(4, 6, dtype=torch.float64)
    expected = x + 0.9 * torch.tanh(plain.a(x))
    expected = expected + 0.6 * torch.tanh(plain.b(expected))
    expected = expected + 0.3 * torch.tanh(plain.c(expected))
    sd.make_stochastic_(net, [0.9, 0.6, 0.3])
    with pytest.warns(UserWarning, match="stays as a scalar") as warned:
        sd.fold_(net)
    assert len(warned) == 3
    assert_near(net(x), expected, 1e-12)


# ---------------------------------------------------------------------------------------------- other libraries' models


def check_foreign(make: Callable[[], nn.Module], x: Tensor, last: str = "") -> nn.Module:
    model = awake(make())
    twin = copy.deepcopy(model)
    depth = sd.make_stochastic_(model, sd.linear_decay(0.4))
    names, survival_probs = depth.names, depth.survival_probs
    with torch.no_grad():
        expected = first_tensor(with_factors(twin, names, survival_probs, last)(x))
        plain = first_tensor(twin(x))
        sd.fold_(model)
        assert_near(first_tensor(model(x)), expected, 1e-12)
        assert not torch.allclose(plain, expected, rtol=1e-4, atol=1e-6)
        assert same_classes(model, twin)
        # It costs what constant depth costs: the same operators on the same shapes, in the same order.
        assert operators(model, x) == operators(twin, x)
        fresh = make().double().eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(first_tensor(fresh(x)), first_tensor(model(x)))
    reference.assert_plain(model)
    return model


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_load_the_folded_weights(name: str) -> None:
    check_foreign(lambda: timm_model(name), plain_models.images(TIMM[name][2]))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_resnets_load_the_folded_weights(name: str) -> None:
    check_foreign(lambda: torchvision_resnet(name), plain_models.images(32), TORCHVISION[name])


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_models_load_the_folded_weights(family: str) -> None:
    check_foreign(lambda: transformers_model(family), plain_models.images())


TRAINED = {
    "timm": lambda: plain_models.timm.create_model("resnet26", num_classes=10, channels=(8, 16, 16, 32)),
    "torchvision": lambda: plain_models.torchvision.models.resnet18(num_classes=10),
}


@pytest.mark.parametrize("library", TRAINED)
def test_a_network_trained_with_stochastic_depth_ends_as_a_fresh_model_of_its_library(library: str) -> None:
    make = TRAINED[library]
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None].expand(-1, 3, -1, -1)[:320] / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=4)
    labels = torch.from_numpy(digits.target)[:320]
    torch.manual_seed(0)
    model = make()
    depth = sd.make_stochastic_(model, sd.linear_decay(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    losses, num_closed = [], 0
    for step in range(16):
        batch = slice(32 * (step % 8), 32 * (step % 8) + 32)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        num_closed += depth.last_gates.count(0)
    assert num_closed > 0
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # it learns
    held_out = images[256:]
    with torch.no_grad():
        trained = model.eval()(held_out)
        sd.fold_(model)
        fresh = make().eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert_near(fresh(held_out), trained, 1e-6)
        assert operators(fresh, held_out) == operators(model, held_out)


GATED = {
    "squeeze-excite": ("seresnet50", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 5}),
    "channel-attention": ("ecaresnet26t", {"channels": (8, 8, 16, 16), "num_classes": 5}),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_behind_the_last_weights_does_not_see_the_factor(name: str) -> None:
    architecture, arguments = GATED[name]
    check_foreign(
        lambda: plain_models.timm.create_model(architecture, drop_path_rate=0.3, **arguments), plain_models.images(32)
    )


def test_what_timm_computes_in_place_keeps_its_factor_in_the_place_of_the_drop_path() -> None:
    model = awake(plain_models.timm.create_model("mvitv2_tiny", drop_path_rate=0.3, img_size=64, num_classes=5))
    twin, x = copy.deepcopy(model), plain_models.images(64)
    depth = sd.make_stochastic_(model, sd.uniform(0.5))
    expected = with_factors(twin, depth.names, depth.survival_probs)(x)
    with pytest.warns(UserWarning, match="MultiScaleAttention cannot be recorded.* stays as a scalar"):
        sd.fold_(model)
    assert_near(model(x), expected, 1e-12)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_the_models_own_rates_need_no_folding() -> None:
    model = awake(timm_model("vit"))
    before, x = reference.state_of(model), plain_models.images()
    expected = model(x)
    sd.make_stochastic_(model)
    sd.fold_(model)
    reference.assert_same(reference.state_of(model), before)
    assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------------------------------- convert_rescale_


@pytest.mark.parametrize(
    ("make", "x"),
    [(reference.conv_net, reference.images(4)), (lambda: awake(timm_model("vit")), plain_models.images())],
    ids=["ours", "timm"],
)
def test_converted_weights_give_the_same_in_evaluation_and_in_training(
    make: Callable[[], nn.Module], x: Tensor
) -> None:
    net = make().eval()
    depth = sd.make_stochastic_(net, sd.linear_decay(0.4), rescale="eval")
    before, weights = net(x), reference.state_of(net)
    gates = [index % 3 > 0 for index in range(len(depth.names))]
    with depth.gates(gates):
        trained = net(x)
    sd.convert_rescale_(net, "train")
    assert "rescale 'train'" in str(depth)
    assert_near(net(x), before, 1e-12)
    with depth.gates(gates):
        assert_near(net(x), trained, 1e-12)
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed
    sd.convert_rescale_(net, "eval")
    reference.assert_close(reference.state_of(net), weights, atol=1e-12)
    assert_near(net(x), before, 1e-12)


def test_converted_weights_are_p_times_the_papers() -> None:
    net = nn.Sequential(sd.Residual(nn.Linear(3, 3)))
    weight, bias = net[0].branch.weight.detach().clone(), net[0].branch.bias.detach().clone()
    sd.make_stochastic_(net, [0.5])
    sd.convert_rescale_(net, "train")
    assert torch.equal(net[0].branch.weight, 0.5 * weight)
    assert torch.equal(net[0].branch.bias, 0.5 * bias)
    sd.convert_rescale_(net, "train")  # it is so already
    assert torch.equal(net[0].branch.weight, 0.5 * weight)


def test_a_branch_that_cannot_be_converted_stays_and_nothing_changes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(sd.Residual(nn.Linear(6, 6)), sd.Residual(ENDS["gelu"]())).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    depth = sd.make_stochastic_(net, [0.7, 0.4])
    before = net(x)
    with pytest.warns(UserWarning, match="1 stays in the convention 'eval'"):
        sd.convert_rescale_(net, "train")
    assert "rescale 'train or eval'" in str(depth)
    assert_near(net(x), before, 1e-12)


# ---------------------------------------------------------------------------------------------- bad input


def test_folding_a_plain_model_warns() -> None:
    net = reference.mlp()
    before = reference.state_of(net)
    with pytest.warns(UserWarning, match="not stochastic: there is nothing to fold"):
        sd.fold_(net)
    reference.assert_same(reference.state_of(net), before)


def test_conversion_refuses_what_has_no_factor() -> None:
    net = reference.mlp()
    with pytest.raises(ValueError, match="not stochastic"):
        sd.convert_rescale_(net, "train")
    sd.make_stochastic_(net, sd.uniform(0.5), rescale="none")
    with pytest.raises(ValueError, match="4 branches have rescale 'none'"):
        sd.convert_rescale_(net, "train")
    with pytest.raises(ValueError, match="must be 'eval' or 'train', but is 'none'"):
        sd.convert_rescale_(net, "none")


def test_no_warning_is_given_where_all_is_well() -> None:
    net = reference.conv_net()
    sd.make_stochastic_(net, sd.linear_decay(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.fold_(net)


def test_a_part_of_a_stochastic_model_is_not_folded_in_silence() -> None:
    net = nn.Sequential(sd.Residual(nn.Linear(3, 3)), nn.Linear(3, 3))
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(ValueError, match="This Sequential is a part of a stochastic model"):
        sd.fold_(nn.Sequential(*net))
