"""Which models work from end to end: stochastic depth, fold or cut to 60 %, ONNX, onnxruntime.

Every model is made stochastic with linear decay to 0.5. The ONNX file of the folded network, and that of the
subnetwork that keeps 60 % of the FLOPs, is run by onnxruntime in batches of several sizes and compared with PyTorch.

python benchmarks/exports.py
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from models import awake, timm_model, torchvision_model
from protocol import write_table
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab.after.export import run_onnx, write_onnx

OURS = [("cifar_resnet, 20 layers", 20, "pad"), ("cifar_resnet, 110 layers", 110, "pad"),
        ("cifar_resnet, 20 layers, subsample", 20, "subsample"),
        ("cifar_resnet, 20 layers, projection", 20, "projection")]  # fmt: skip
_VIT: dict[str, Any] = {"img_size": 64, "depth": 4}
# Shallower than published, with small images: the test covers every kind of block, not the size.
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _VIT, "deit3_small_patch16_224": _VIT, "cait_xxs24_224": _VIT,
    "convnext_atto": {"depths": (1, 1, 2, 1)}, "convnextv2_atto": {"depths": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (3, 6)},
    "poolformer_s12": {}, "pvt_v2_b0": {"depths": (1, 1, 2, 1)}, "resnet26": {},
    "seresnet50": {"layers": (1, 2, 1, 1)}, "regnety_002": {}, "mobilenetv3_small_100": {}, "efficientnet_b0": {},
}  # fmt: skip
TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {}, "resnet50": {}, "mobilenet_v2": {}, "regnet_y_400mf": {}, "vit_b_32": {"image_size": 64},
}  # fmt: skip
SIZE = 64
NUM_IMAGES = 8


def models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Makers of all models, with the size of their images."""
    found: dict[str, tuple[Callable[[], nn.Module], int]] = {}
    for name, num_layers, shortcut in OURS:
        found[name] = (lambda n=num_layers, s=shortcut: sd.models.cifar_resnet(n, shortcut=s), 32)
    for name, arguments in TIMM.items():
        found[f"timm {name}"] = (lambda n=name, a=arguments: timm_model(n, num_classes=10, **a), SIZE)
    for name, arguments in TORCHVISION.items():
        found[f"torchvision {name}"] = (lambda n=name, a=arguments: torchvision_model(n, num_classes=10, **a), SIZE)
    return found


def compared(network: nn.Module, x: Tensor, expected: Tensor) -> str:
    """How far onnxruntime is from PyTorch, relative to the largest output; or why there is no file."""
    try:
        given = run_onnx(write_onnx(network, x[:2], {}), x)
    except ValueError as error:
        return str(error).replace("|", "/")[:160]
    return f"{float((given - expected).abs().max() / expected.abs().max()):.1e}"


@torch.no_grad()
def tried(make: Callable[[], nn.Module], size: int) -> list[str]:
    """Branches; scalars that stayed; the folded network's difference; the subnetwork's parameters and difference."""
    x = torch.randn(NUM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = awake(make())
    depth = sd.make_stochastic_(model, sd.linear_decay(0.5))
    expected = model(x)
    folded = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        sd.fold_(folded)
    row = [str(len(depth.names)), str(len(kept)), compared(folded, x, expected)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = sd.subnetwork(model, cost=0.6, inputs=x[:1])
    except ValueError as error:
        return [*row, "-", str(error)[:160]]
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    return [*row, f"{share:.0%}".replace("%", " %"), compared(small, x, small(x))]


def main() -> None:
    """Try all models and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of the names of the models to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for name, (make, size) in models().items():
        if options.only in name:
            try:
                row = [name, *tried(make, size)]
            except Exception as error:  # a failed model is a row of the table
                row = [name, "", "", f"{type(error).__name__}: {error}".splitlines()[0][:160], "", ""]
            rows.append(row)
            print(row, flush=True)
    header = ["model", "branches", "scalars kept", "ONNX, folded", "parameters at 60 % FLOPs", "ONNX, subnetwork"]
    write_table(
        "exports",
        "Stochastic depth, folded or cut, through ONNX and onnxruntime",
        header,
        rows,
        f"Largest difference of an output to PyTorch's before folding (of the subnetwork: to its own in PyTorch), "
        f"relative to the largest, on {NUM_IMAGES} random images in batches of several sizes; random weights; models "
        "of timm and torchvision are partly shallower than published.",
    )


if __name__ == "__main__":
    main()
