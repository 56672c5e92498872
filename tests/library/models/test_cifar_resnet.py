"""The paper's CIFAR networks against counting by hand and a forward written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd

SHORTCUTS = ["pad", "subsample", "projection", "projection_all"]
INITS = ["he", "authors"]


def num_parameters_by_hand(num_layers: int, num_classes: int, shortcut: str, init: str, in_channels: int = 3) -> int:
    """Convolutions, with biases in the authors' code; two numbers per channel of each BatchNorm; the linear layer."""
    bias = int(init == "authors")

    def conv(a: int, b: int, kernel: int) -> int:
        return a * b * kernel**2 + bias * b + 2 * b  # with its BatchNorm

    n = (num_layers - 2) // 6
    total, width = conv(in_channels, 16, 3), 16
    for out in (16, 32, 64):
        for _ in range(n):
            total += conv(width, out, 3) + conv(out, out, 3)
            if shortcut == "projection_all" or (shortcut == "projection" and width != out):
                total += conv(width, out, 1)
            width = out
    return total + 64 * num_classes + num_classes


def plain_forward(net: nn.Module, x: Tensor, shortcut: str) -> Tensor:
    """He et al. 2015, section 4.2, from the state dict's numbers alone, in training mode."""
    state = dict(net.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=weight.shape[-1] // 2)

    h = norm(conv(x, "conv"), "bn").relu()
    for group, width in enumerate((16, 32, 64)):
        for block in range(len(net.groups[group])):
            name = f"groups.{group}.{block}.residual"
            stride = 2 if group > 0 and block == 0 else 1
            f = norm(conv(h, f"{name}.branch.conv1", stride), f"{name}.branch.bn1").relu()
            f = norm(conv(f, f"{name}.branch.conv2"), f"{name}.branch.bn2")
            if shortcut == "projection_all" or (shortcut == "projection" and stride == 2):
                h = norm(conv(h, f"{name}.shortcut.conv", stride), f"{name}.shortcut.bn")
            elif stride == 2:
                if shortcut == "pad":
                    h = (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
                else:
                    h = h[:, :, ::2, ::2]
                h = torch.cat([h, torch.zeros_like(h)], dim=1)
            assert h.shape[1] == width
            h = (h + f).relu()
    return h.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("num_layers", "num_classes", "in_channels"), [(8, 10, 3), (20, 100, 1), (56, 10, 3)])
def test_number_of_parameters(num_layers: int, num_classes: int, in_channels: int, shortcut: str, init: str) -> None:
    net = sd.models.cifar_resnet(num_layers, num_classes, shortcut=shortcut, init=init, in_channels=in_channels)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == num_parameters_by_hand(num_layers, num_classes, shortcut, init, in_channels)


def test_the_papers_110_layers() -> None:
    net = sd.models.cifar_resnet()
    assert sum(parameter.numel() for parameter in net.parameters()) == 1_727_962
    assert num_parameters_by_hand(110, 10, "pad", "he") == 1_727_962
    assert sum(isinstance(module, sd.Residual) for module in net.modules()) == 54
    # Layers with weights on the path of the image: 6n + 1 convolutions and the linear one.
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == 110
    assert not any(module.bias is not None for module in convolutions)


@pytest.mark.parametrize("num_layers", [8, 14, 20, 32, 44, 56, 110, 152, 1202])
def test_number_of_blocks(num_layers: int) -> None:
    with torch.device("meta"):
        net = sd.models.cifar_resnet(num_layers)
    names = [name for name, module in net.named_modules() if isinstance(module, sd.Residual)]
    n = (num_layers - 2) // 6
    assert names == [f"groups.{group}.{block}.residual" for group in range(3) for block in range(n)]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_forward_and_gradients(shortcut: str, init: str) -> None:
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(14, 7, shortcut=shortcut, init=init).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    ours, theirs = net(x), plain_forward(net, x, shortcut)
    assert ours.shape == (3, 7)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)
    weights = torch.randn(3, 7, dtype=torch.float64)
    # A bias in front of BatchNorm has a gradient of zero, up to rounding.
    parameters = list(net.parameters())
    our_grads = torch.autograd.grad((ours * weights).sum(), parameters)
    their_grads = torch.autograd.grad((theirs * weights).sum(), parameters)
    for ours_, theirs_ in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("size", "sizes"), [(32, [32, 32, 16, 8]), (8, [8, 8, 4, 2])])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_shapes_of_the_groups(shortcut: str, size: int, sizes: list[int]) -> None:
    net = sd.models.cifar_resnet(14, shortcut=shortcut)
    shapes = []
    for module in (net.bn, *net.groups):
        module.register_forward_hook(lambda _m, _i, y: shapes.append(tuple(y.shape)))
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 10)
    assert shapes == [(2, width, s, s) for width, s in zip((16, 16, 32, 64), sizes, strict=True)]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_blocks_end_in_a_relu_and_shortcuts_without_parameters_have_none(shortcut: str) -> None:
    net = sd.models.cifar_resnet(20, shortcut=shortcut)
    for index, block in enumerate(block for group in net.groups for block in group):
        assert [type(module).__name__ for module in block.children()] == ["Residual", "ReLU"]
        transition = index in (3, 6)
        carry = block.residual.shortcut
        projection = shortcut == "projection_all" or (shortcut == "projection" and transition)
        assert (carry is None) == (not projection and not transition)
        assert bool(carry is not None and list(carry.parameters())) == projection


def test_pad_averages_and_appends_zeros_after_the_existing_channels() -> None:
    x = torch.arange(2 * 16 * 4 * 4, dtype=torch.float32).view(2, 16, 4, 4)
    for shortcut in ("pad", "subsample"):
        carry = sd.models.cifar_resnet(8, shortcut=shortcut).groups[1][0].residual.shortcut
        y = carry(x)
        assert y.shape == (2, 32, 2, 2)
        assert torch.equal(y[:, 16:], torch.zeros(2, 16, 2, 2))
        corner = x[:, :, :2, :2].mean((2, 3)) if shortcut == "pad" else x[:, :, 0, 0]
        torch.testing.assert_close(y[:, :16, 0, 0], corner)


# ---------------------------------------------------------------------------------------------- initialization


def assert_normal(weight: Tensor, std: float) -> None:
    """Mean and standard deviation within five standard errors, and nothing cut off."""
    num = weight.numel()
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(num)
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * num)
    kurtosis = ((weight / std) ** 4).mean().item()
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / num)


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    num, width = values.numel(), high - low
    assert low <= values.min()
    assert values.max() <= high
    assert abs(values.mean().item() - (low + high) / 2) < 5 * width / math.sqrt(12 * num)
    assert abs(values.std().item() / (width / math.sqrt(12)) - 1) < 5 / math.sqrt(num)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shortcut", ["pad", "projection_all"])
def test_initialization(init: str, shortcut: str) -> None:
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(56, 100, shortcut=shortcut, init=init)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            assert_normal(module.weight, math.sqrt(2 / fan_in))
            assert (module.bias is not None) == (init == "authors")
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert not module.bias.any()
            assert init == "authors" or bool((module.weight == 1).all())
        elif isinstance(module, nn.Linear):
            assert_uniform(module.weight, -1 / 8, 1 / 8)
            assert_uniform(module.bias, -1 / 8, 1 / 8)
    if init == "authors":
        gains = [module.weight for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        assert_uniform(torch.cat(gains), 0, 1)


def test_initialization_follows_the_global_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in sd.models.cifar_resnet(8).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param(
            {"num_layers": 54}, ValueError, ["6n + 2", "is 54", "50 and 56", "54 blocks", "110 layers"], id="54"
        ),
        pytest.param({"num_layers": 111}, ValueError, ["6n + 2", "is 111", "110 and 116"], id="111"),
        pytest.param({"num_layers": 2}, ValueError, ["6n + 2", "is 2", "8"], id="2"),
        pytest.param({"num_layers": 0}, ValueError, ["6n + 2", "is 0", "8"], id="0"),
        pytest.param({"num_layers": -4}, ValueError, ["6n + 2", "is -4", "8"], id="negative"),
        pytest.param({"num_layers": 20, "shortcut": "A"}, ValueError, ["'pad', 'subsample'", "'A'"], id="shortcut"),
        pytest.param({"num_layers": 20, "init": "xavier"}, ValueError, ["'he', 'authors'", "'xavier'"], id="init"),
        pytest.param({"num_layers": 20, "num_classes": 0}, ValueError, ["num_classes", "is 0"], id="classes"),
        pytest.param({"num_layers": 20, "in_channels": 0}, ValueError, ["in_channels", "is 0"], id="channels"),
        pytest.param(
            {"num_layers": 20.0},
            TypeError,
            ["num_layers", "whole number", "20.0"],
            id="float",
        ),
        pytest.param(
            {"num_layers": "110"},
            TypeError,
            ["num_layers", "whole number", "'110'"],
            id="string",
        ),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        sd.models.cifar_resnet(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
