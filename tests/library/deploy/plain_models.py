"""Models of other libraries, small, in float64, and the plain version of their test-time rule.

This file does not use the library: a plain module multiplies a branch by p, in place of the drop path or as a hook on
the last module before the addition.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {**SMALL_VIT, "init_values": 0.1}, 32),
    "vit-without-layer-scale": ("vit_tiny_patch16_224", SMALL_VIT, 32),
    "parallel-vit": ("vit_small_patch16_18x2_224", {**SMALL_VIT, "depth": 2}, 32),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "num_classes": 5}, 32),
    "resnet": ("resnet26", {"num_classes": 5, "channels": (8, 16, 16, 16)}, 32),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5},
        32,
    ),
    "mobilenet": ("mobilenetv3_small_050", {"num_classes": 5}, 32),
    "mixer": ("mixer_s32_224", {"img_size": 64, "num_classes": 5}, 64),
    "cait": ("cait_xxs24_224", {**SMALL_VIT, "depth": 2, "num_heads": 2, "patch_size": 8}, 32),
    "nf-resnet": ("nf_resnet26", {"num_classes": 5}, 32),
}
TRANSFORMERS = {
    "Beit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
             "image_size": 32, "patch_size": 8, "use_mask_token": False},
    "ConvNext": {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 8, 16, 16], "image_size": 32},
    "Dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
}  # fmt: skip
# torchvision's ResNets have no drop paths: the last module of each branch, and the number of branches.
TORCHVISION = {"resnet18": "bn2", "resnet50": "bn3"}


class DropPath(nn.Module):
    """Of a model without a library: it changes nothing in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.p) / (1 - self.p)


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode, its gains, biases and statistics at random, without dropout."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape) or not parameter.any():
                parameter.uniform_(0.5, 1.5, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def timm_model(name: str) -> nn.Module:
    architecture, arguments, _ = TIMM[name]
    torch.manual_seed(0)
    return timm.create_model(architecture, drop_path_rate=0.3, **arguments)


def transformers_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(drop_path_rate=0.3, **TRANSFORMERS[family])
    config._attn_implementation = "eager"
    return getattr(transformers, f"{family}Model")(config)


def torchvision_resnet(name: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, num_classes=5)


def images(size: int = 32, num: int = 2) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


class Times(nn.Module):
    """In the place of a drop path: its k-th call multiplies by the k-th number."""

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = list(factors)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return x * self.factors[(self.num_calls - 1) % len(self.factors)]


def with_factors(model: nn.Module, names: Sequence[str], factors: Sequence[float], last: str = "") -> nn.Module:
    """A copy whose branches, by their names, are multiplied by plain factors."""
    model = copy.deepcopy(model)
    by_module: dict[str, list[float]] = {}
    for name, factor in zip(names, factors, strict=True):
        by_module.setdefault(name.partition("#")[0], []).append(factor)
    for path, those in by_module.items():
        if last:
            model.get_submodule(f"{path}.{last}").register_forward_hook(lambda _m, _x, y, f=those[0]: f * y)
        else:
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, Times(those))
    return model


def first_tensor(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def same_classes(one: nn.Module, other: nn.Module) -> bool:
    return [type(module) for module in one.modules()] == [type(module) for module in other.modules()]


Maker = Callable[[], nn.Module]
