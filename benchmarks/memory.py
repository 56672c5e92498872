"""Memory of a training step: bytes that a forward keeps for its backward, counted, and the process's peak, measured.

    python benchmarks/memory.py

The paper's ResNet-110 and timm's ViT-Tiny, at constant depth, with timm's masks (ViT) and with dropped branches
skipped. The peak is the operating system's number, with each step in its own process, minus what the process used
before the step with model and images loaded.
"""

from __future__ import annotations

import torchvision_schemas  # noqa: F401

# isort: split
import argparse
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from protocol import write_table
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab.measure.kept_bytes import kept_bytes

VARIANTS = {
    "ResNet-110": ("constant depth", "linear 0.5, batch", "linear 0.5, sample", "uniform 0.5, batch"),
    "ViT-Tiny": ("constant depth", "timm, uniform 0.5", "uniform 0.5, batch", "uniform 0.5, sample"),
}


def create(network: str, variant: str, seed: int = 0) -> nn.Module:
    """A network in one of its variants. seed: of the gates."""
    torch.manual_seed(0)
    rate = 0.0 if variant == "constant depth" else 0.5
    if network == "ViT-Tiny":
        model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=rate, num_classes=10, img_size=96)
        for block in model.blocks if rate else ():
            block.drop_path1, block.drop_path2 = timm.layers.DropPath(rate), timm.layers.DropPath(rate)
    else:
        model = sd.models.cifar_resnet(110)
    if variant.endswith(("batch", "sample")):
        schedule = (
            None if network == "ViT-Tiny" else getattr(sd, "linear_decay" if "linear" in variant else "uniform")(0.5)
        )
        # Equal cost: each step has the mean number of open branches.
        sd.make_stochastic_(model, schedule, granularity=variant.rpartition(" ")[2], draw="equal_cost", seed=seed)
    return model


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The forward."""
    return F.cross_entropy(model(images), labels)


def data(network: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """A batch."""
    size = 96 if network == "ViT-Tiny" else 32
    return torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,))


def peak_of_step(network: str, variant: str, seed: int, batch_size: int) -> int:
    """Bytes that a step adds to the process at most. On Linux."""
    model, batch = create(network, variant, seed), data(network, batch_size)
    loss_of(model, *(tensor[:2] for tensor in batch)).backward()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = kilobytes("VmRSS")
    loss_of(model, *batch).backward()
    return (kilobytes("VmHWM") - before) * 1024


def kilobytes(name: str) -> int:
    """A number from Linux about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured_peak(network: str, variant: str, seed: int, batch_size: int) -> int:
    """The same in a separate process."""
    command = [sys.executable, __file__, "--batch-size", str(batch_size), "--peak", network, variant, str(seed)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--counted", type=int, default=5, help="steps whose kept bytes are counted")
    parser.add_argument("--peaks", type=int, default=5, help="processes whose peak is measured")
    parser.add_argument("--peak", nargs=3, metavar=("NETWORK", "VARIANT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        network, variant, seed = args.peak
        print(peak_of_step(network, variant, int(seed), args.batch_size))
        return
    rows = []
    for network, variants in VARIANTS.items():
        constant: tuple[float, float] | None = None
        for variant in variants:
            model, batch = create(network, variant), data(network, args.batch_size)
            kept = statistics.fmean(kept_bytes(functools.partial(loss_of, model, *batch)) for _ in range(args.counted))
            del model, batch
            peak = statistics.median(
                measured_peak(network, variant, seed, args.batch_size) for seed in range(args.peaks)
            )
            constant = constant or (kept, peak)
            rows.append(
                [network, variant, f"{kept / 2**20:.0f}", f"{kept / constant[0]:.3f}"]
                + [f"{peak / 2**20:.0f}", f"{peak / constant[1]:.3f}"]
            )
            print(" | ".join(rows[-1]), flush=True)
    write_table(
        "memory",
        f"Memory of a training step, batch {args.batch_size}, fp32",
        ["network", "variant", "kept, MiB", "ratio", "peak, MiB", "ratio"],
        rows,
        f"Kept for the backward: mean of {args.counted} steps. Peak: median of {args.peaks} processes. "
        "Equal cost, gates of another seed in each process.",
    )


if __name__ == "__main__":
    main()
