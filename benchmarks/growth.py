"""Time and memory of a training step over depth and batch size: they grow with the branches that run.

    python benchmarks/growth.py

The paper's CIFAR networks of 20 to 1202 layers at constant depth and with p_L = 0.5, and one of them over batch sizes.
Process time of forward and backward, median of interleaved rounds; bytes that the forward keeps for the backward.
Writes a table and a figure.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from protocol import interleaved, write_table
from torch import nn

import stochastic_depth as sd
from stochastic_depth_lab.measure.kept_bytes import kept_bytes

matplotlib.use("agg")
import matplotlib.pyplot as plt

_NUM_COUNTED = 3
"""Steps whose kept bytes are counted: which branches run differs."""

Row = tuple[int, int, str, float, float, float]
"""Layers, batch, variant, branches that run, milliseconds, MiB."""


def forward(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss."""
    return F.cross_entropy(model(images), labels)


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    forward(model, images, labels).backward()


def measure(sizes: Sequence[tuple[int, int]], rounds: int) -> list[Row]:
    """Both variants for each (layers, batch)."""
    steps: dict[tuple[int, int, str], functools.partial[None]] = {}
    depths: dict[tuple[int, int, str], float] = {}
    memory: dict[tuple[int, int, str], float] = {}
    for layers, batch_size in sizes:
        images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
        for variant in ("constant depth", "stochastic depth"):
            torch.manual_seed(0)
            model = sd.models.cifar_resnet(layers).to(memory_format=torch.channels_last)
            key = layers, batch_size, variant
            depths[key] = (layers - 2) // 2
            if variant == "stochastic depth":
                depths[key] = sd.make_stochastic_(model, sd.linear_decay(0.5), draw="equal_cost").expected_depth
            steps[key] = functools.partial(step, model, images, labels)
            counted = [kept_bytes(functools.partial(forward, model, images, labels)) for _ in range(_NUM_COUNTED)]
            memory[key] = statistics.fmean(counted) / 2**20
    names = {" ".join(map(str, key)): key for key in steps}
    times = interleaved({name: steps[key] for name, key in names.items()}, rounds=rounds, warm_up=1)
    return [(*key, depths[key], statistics.median(times[name]) * 1e3, memory[key]) for name, key in names.items()]


def draw(over_depth: list[Row], over_batch: list[Row], path: Path) -> None:
    """Time and memory, over branches that run and over the batch."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    for column, (rows, x_of, x_label) in enumerate(
        ((over_depth, 3, "branches that run (mean)"), (over_batch, 1, "images in a batch"))
    ):
        for line, (y_of, y_label) in enumerate(((4, "time of a step, ms"), (5, "kept for the backward, MiB"))):
            for variant, marker in (("constant depth", "o"), ("stochastic depth", "s")):
                points = [(row[x_of], row[y_of]) for row in rows if row[2] == variant]
                axes[line][column].plot(*zip(*points, strict=True), marker=marker, label=variant)
            axes[line][column].set(xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, None))
    axes[0][0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, write the table and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 56, 110, 302, 602, 1202])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    over_depth = measure([(layers, args.batch_sizes[0]) for layers in args.layers], args.rounds)
    over_batch = measure([(args.layers[1], batch_size) for batch_size in args.batch_sizes], args.rounds)
    rows = [
        [str(layers), str(batch), variant, f"{depth:.1f}", f"{time:.0f}", f"{time / depth:.2f}", f"{memory:.0f}"]
        for layers, batch, variant, depth, time, memory in over_depth + over_batch
    ]
    write_table(
        "growth",
        "Time and memory of a training step over depth and batch, channels last, fp32",
        ["layers", "batch", "", "branches that run", "time, ms", "time per such branch, ms", "kept, MiB"],
        rows,
        f"Linear decay to 0.5, equal cost. Time: median of n = {args.rounds} interleaved rounds; kept: mean of "
        f"{_NUM_COUNTED} steps.",
    )
    draw(over_depth, over_batch, Path(__file__).parent / "tables" / "growth.svg")


if __name__ == "__main__":
    main()
