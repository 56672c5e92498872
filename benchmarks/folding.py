"""Error of folding, and the time of a forward of the folded network relative to constant depth.

python benchmarks/folding.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from models import awake, timm_model, torchvision_model
from protocol import interleaved, ratio, write_table
from torch import Tensor, nn

import stochastic_depth as sd

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-110 for CIFAR": (lambda: sd.models.cifar_resnet(110), 32),
    "timm vit_tiny_patch16_224": (lambda: timm_model("vit_tiny_patch16_224"), 224),
    "timm convnext_atto": (lambda: timm_model("convnext_atto"), 224),
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), 224),
}


def folding_error(make: Callable[[], nn.Module], x: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of an output before and after folding, relative to the largest output."""
    model = awake(make()).to(dtype)
    sd.make_stochastic_(model, sd.linear_decay(0.5))
    with torch.no_grad():
        before = model(x.to(dtype))
        sd.fold_(model)
        return float((model(x.to(dtype)) - before).abs().max() / before.abs().max())


def main() -> None:
    """Measure all models and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for name, (make, size) in MODELS.items():
        x = torch.randn(options.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
        errors = [folding_error(make, x[:2], dtype) for dtype in (torch.float32, torch.float64)]
        constant = awake(make())
        folded, stochastic = copy.deepcopy(constant), copy.deepcopy(constant)
        for model in (folded, stochastic):
            sd.make_stochastic_(model, sd.linear_decay(0.5))
        sd.fold_(folded)
        networks = {"constant": constant, "again": copy.deepcopy(constant), "folded": folded, "stochastic": stochastic}

        def step(network: nn.Module, x: Tensor = x) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    network(x)

            return run

        times = interleaved(
            {each: step(network) for each, network in networks.items()}, rounds=options.rounds, warm_up=2
        )
        ratios = [ratio(times[each], times["constant"])[0] for each in ("again", "folded", "stochastic")]
        rows.append([name, *(f"{error:.1e}" for error in errors), *(f"{each:.3f}" for each in ratios)])
        print(rows[-1], flush=True)
    write_table(
        "folding",
        f"Folding, linear decay to 0.5, batch {options.batch_size}",
        ["model", "error, fp32", "error, float64", "constant again", "folded", "not folded"],
        rows,
        "Error: largest difference of an output, relative to the largest; times: median ratio of the process time of a "
        f"forward to constant depth, n = {options.rounds} interleaved rounds. Random weights.",
    )


if __name__ == "__main__":
    main()
