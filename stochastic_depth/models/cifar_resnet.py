"""The residual networks for CIFAR and SVHN (He et al. 2015, section 4.2; Huang et al. 2016), of 6n + 2 layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.residual import Residual

Shortcut = Literal["pad", "subsample", "projection", "projection_all"]
Init = Literal["he", "authors"]

_WIDTHS = (16, 32, 64)


def cifar_resnet(
    num_layers: int = 110,
    num_classes: int = 10,
    *,
    shortcut: Shortcut = "pad",
    init: Init = "he",
    in_channels: int = 3,
) -> CifarResNet:
    """The plain CIFAR / SVHN residual network of the paper, with 6n + 2 layers.

    A 3x3 convolution to 16 channels, then three groups of n blocks with 16, 32 and 64 filters, each later group at
    half the resolution, global average pooling and a linear layer. A block is conv3x3-BN-ReLU-conv3x3-BN, added to its
    shortcut, then ReLU. 110 layers have 54 blocks and 1.7 million parameters.

    Args:
        num_layers: 6n + 2 for a whole number n of at least 1: 20, 32, 44, 56, 110, 152, 1202.
        num_classes: number of classes.
        shortcut: how the two transitions halve the image and double its channels.
            "pad": 2x2 average pooling, then channels of zeros (the paper's text, the authors' code since 2017).
            "subsample": every second pixel, then channels of zeros (He et al.'s option A, the authors' code before).
            "projection": a 1x1 convolution of stride 2 and BatchNorm (option B).
            "projection_all": a 1x1 convolution and BatchNorm in every block (option C).
        init: "he": convolutions without biases, drawn from N(0, sqrt(2 / fan_in)); BatchNorm gains of 1 (He et al.).
            "authors": the authors' Lua code: convolutions with biases, which start at 0; BatchNorm gains from U(0, 1).
        in_channels: channels of the images.

    Returns:
        A network from images (N, in_channels, H, W), with H and W multiples of 4, to logits (N, num_classes).

    Raises:
        ValueError: if an argument is not one of the allowed values.
        TypeError: if num_layers is not a whole number.

    Example:
        >>> cifar_resnet(20)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        raise TypeError(f"num_layers must be a whole number, 6n + 2, but is {num_layers!r}.")
    if num_layers < 8 or (num_layers - 2) % 6:
        below = max(8, num_layers - (num_layers - 2) % 6)
        raise ValueError(
            f"num_layers must be 6n + 2 (8, 14, 20, ..., 110, ...), but is {num_layers}. "
            f"The nearest are {below} and {below + 6}; {num_layers} blocks would be {2 * num_layers + 2} layers."
        )
    for name, value, allowed in (("shortcut", shortcut, get_args(Shortcut)), ("init", init, get_args(Init))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but is {value!r}.")
    for name, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, but is {count}.")
    return CifarResNet((num_layers - 2) // 6, num_classes, shortcut=shortcut, init=init, in_channels=in_channels)


class CifarResNet(nn.Module):
    """See `cifar_resnet`, which checks the arguments.

    Args:
        blocks_per_group: n, blocks in each of the three groups.
        num_classes: number of classes.
        shortcut: kind of the shortcuts.
        init: kind of the initialization.
        in_channels: channels of the images.
    """

    def __init__(
        self, blocks_per_group: int, num_classes: int, *, shortcut: Shortcut, init: Init, in_channels: int
    ) -> None:
        super().__init__()
        bias = init == "authors"
        self.conv = _conv3x3(in_channels, _WIDTHS[0], bias=bias)
        self.bn = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU()
        groups: list[nn.Module] = []
        in_width = _WIDTHS[0]
        for width in _WIDTHS:
            blocks: list[nn.Module] = []
            for _ in range(blocks_per_group):
                blocks.append(_block(in_width, width, shortcut=shortcut, bias=bias))
                in_width = width
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_WIDTHS[-1], num_classes)
        _initialize(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.relu(self.bn(self.conv(images)))
        x = self.pool(self.groups(x))
        return self.fc(x.flatten(1))


class _Branch(nn.Module):
    """The residual branch conv3x3-BN-ReLU-conv3x3-BN.

    Not a Sequential: PyTorch 2.13 silently ignores `Sequential.compile()`.
    """

    def __init__(self, in_width: int, width: int, *, stride: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_width, width, stride=stride, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = _conv3x3(width, width, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class _PadShortcut(nn.Module):
    """Halves the resolution without parameters and appends channels of zeros after the existing ones.

    Args:
        new_channels: how many channels of zeros to append.
        average: average over 2x2 pixels; else take every second pixel.
    """

    def __init__(self, new_channels: int, *, average: bool) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2) if self.average else x[:, :, ::2, ::2]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


def _block(in_width: int, width: int, *, shortcut: Shortcut, bias: bool) -> nn.Sequential:
    stride = 1 if in_width == width else 2
    branch = _Branch(in_width, width, stride=stride, bias=bias)
    carry: nn.Module | None = None
    if shortcut == "projection_all" or (shortcut == "projection" and stride == 2):
        carry = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv=nn.Conv2d(in_width, width, 1, stride=stride, bias=bias), bn=nn.BatchNorm2d(width)
            )
        )
    elif stride == 2:
        carry = _PadShortcut(width - in_width, average=shortcut == "pad")
    return nn.Sequential(OrderedDict[str, nn.Module](residual=Residual(branch, carry), relu=nn.ReLU()))


def _conv3x3(in_width: int, width: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=bias)


@torch.no_grad()
def _initialize(model: nn.Module, init: Init) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            module.weight.normal_(0, math.sqrt(2 / fan_in))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d) and init == "authors":
            module.weight.uniform_(0, 1)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            module.weight.uniform_(-bound, bound)
            module.bias.uniform_(-bound, bound)
