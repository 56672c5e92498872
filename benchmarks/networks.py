"""The networks that are compared: one with BatchNorm, a transformer and a ConvNeXt, small enough for a processor."""

from __future__ import annotations

import torchvision_schemas  # noqa: F401

# isort: split
import copy
from collections.abc import Callable

import timm
import torch
from torch import nn

IMAGE_SIZE = 64
NETWORKS = {
    "ResNet-26 (BatchNorm)": ("resnet26", {}),
    "ViT-Tiny": ("vit_tiny_patch16_224", {"img_size": IMAGE_SIZE, "patch_size": 8}),
    "ConvNeXt-Atto": ("convnext_atto", {}),
}


def create(network: str, rate: float) -> nn.Module:
    """A network with timm's drop paths, the same rate in every block."""
    name, options = NETWORKS[network]
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.5 if rate else 0.0, num_classes=10, **options)
    if rate:
        for module in list(model.modules()):
            for path in ("drop_path", "drop_path1", "drop_path2"):
                if isinstance(getattr(module, path, None), (nn.Identity, timm.layers.DropPath)) or (
                    path in module.__dict__ and module.__dict__[path] is None
                ):
                    setattr(module, path, timm.layers.DropPath(rate))
    return model


def with_drop_paths(model: nn.Module, made: nn.Module) -> nn.Module:
    """The model with copies of `made` in place of its drop paths."""
    for name, module in list(model.named_modules()):
        if isinstance(module, timm.layers.DropPath):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.deepcopy(made))
    return model


class SubsetBlock(nn.Module):
    """A block whose residual branches run on a random subset of floor(b * (1 - rate)) samples, scaled by b over that.

    This follows the description of DINOv2; it was written for this comparison.
    """

    def __init__(self, block: nn.Module, rate: float) -> None:
        super().__init__()
        self.block, self.rate = block, rate

    def _add(self, x: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        num_samples = len(x)
        num_kept = max(int(num_samples * (1 - self.rate)), 1)
        kept = torch.randperm(num_samples, device=x.device)[:num_kept]
        residual = branch(x[kept])
        return x.index_add(0, kept, residual.to(x.dtype), alpha=num_samples / num_kept)

    def forward(self, x: torch.Tensor, **_options: object) -> torch.Tensor:
        """(N, ...) to (N, ...)."""
        block = self.block
        if isinstance(block, ConvNeXtBlock):
            return self._add(x, block.branch)
        x = self._add(x, lambda x: block.attn(block.norm1(x)))
        return self._add(x, lambda x: block.mlp(block.norm2(x)))


class ConvNeXtBlock(nn.Module):
    """The residual branch of a ConvNeXt block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        block = self.block
        x = block.conv_dw(x)
        x = block.mlp(block.norm(x)) if block.use_conv_mlp else block.mlp(block.norm(x.permute(0, 2, 3, 1)))
        x = x if block.use_conv_mlp else x.permute(0, 3, 1, 2)
        return x if block.gamma is None else x * block.gamma.reshape(1, -1, 1, 1)


def with_subsets(network: str, rate: float) -> nn.Module | None:
    """A network whose blocks run on subsets; None with BatchNorm, which this method does not support."""
    model = create(network, 0.0)
    if network == "ViT-Tiny":
        model.blocks = nn.Sequential(*(SubsetBlock(block, rate) for block in model.blocks))
    elif network == "ConvNeXt-Atto":
        for stage in model.stages:
            stage.blocks = nn.Sequential(*(SubsetBlock(ConvNeXtBlock(block), rate) for block in stage.blocks))
    else:
        return None
    return model
