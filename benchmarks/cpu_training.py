"""A training step of the paper's ResNet-110 on a CPU: a plain loop, and the laboratory with all its optimizations.

    python benchmarks/cpu_training.py [--train FOLDER] [--seeds 2]

The plain loop: constant depth, fp32, torchvision's transforms image by image in a `DataLoader`. The laboratory's: the
whole batch augmented at once, channels last, a fused optimizer, optionally bf16, stochastic depth. A step here begins
with fetching its batch. With `--train`, each also trains for a few epochs on part of real CIFAR-10, in torchvision's
layout in FOLDER, to check that the faster step learns as much.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from input_pipeline import NORMALIZATION, augmented_at_once, augmented_one_by_one
from protocol import interleaved, ratio, write_table
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab import data
from stochastic_depth_lab.data import Split

# name: (the laboratory's pipeline and layout, bf16, stochastic depth)
VARIANTS = {
    "plain loop": (False, False, False),
    "plain loop again": (False, False, False),
    "laboratory, fp32, constant depth": (True, False, False),
    "laboratory, bf16, constant depth": (True, True, False),
    "laboratory, fp32, stochastic depth": (True, False, True),
    "laboratory, bf16, stochastic depth": (True, True, True),
}


class Trainer:
    """One variant: its network, optimizer and endless batches.

    Args:
        variant: see `VARIANTS`.
        split: the training images.
        layers: depth of the network.
        batch_size: images in a batch.
        seed: of weights and gates.
    """

    def __init__(self, variant: str, split: Split, layers: int, batch_size: int, seed: int) -> None:
        laboratory, self.bf16, stochastic = VARIANTS[variant]
        torch.manual_seed(seed)
        self.model: nn.Module = sd.models.cifar_resnet(layers)
        if laboratory:
            self.model = self.model.to(memory_format=torch.channels_last)
        if stochastic:
            sd.make_stochastic_(self.model, sd.linear_decay(0.5), seed=seed, draw="equal_cost")
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=laboratory or None
        )
        loader = None if laboratory else augmented_one_by_one(split, batch_size)

        def epoch(number: int) -> Iterable[tuple[Tensor, Tensor]]:
            return augmented_at_once(split, batch_size, number, seed) if loader is None else loader

        self.batches = itertools.chain.from_iterable(map(epoch, itertools.count(1)))

    def step(self) -> None:
        """Fetch a batch and train on it."""
        images, labels = next(self.batches)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def error(self, split: Split) -> float:
        """Test error in percent."""
        self.model.eval()
        wrong = 0
        for start in range(0, len(split), 500):
            images = NORMALIZATION(split.images[start : start + 500])
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                wrong += int((self.model(images).argmax(1) != split.labels[start : start + 500]).sum())
        return 100 * wrong / len(split)


def measure(make: Callable[[str], Trainer], rounds: int, layers: int, batch_size: int) -> None:
    """Write the table of steps."""
    times = interleaved({name: make(name).step for name in VARIANTS}, rounds=rounds, warm_up=3)
    rows = []
    for name, values in times.items():
        median, _ = ratio(values, times["plain loop"])
        rows.append([name, f"{statistics.median(values) * 1e3:.0f}", f"{median:.3f}", f"{1 / median:.2f}"])
    write_table(
        "cpu_training",
        f"A training step with its batch, ResNet-{layers}, batch {batch_size}, on a CPU",
        ["loop", "process time, ms (median)", "ratio to the plain loop (median)", "times as fast"],
        rows,
        f"n = {rounds} interleaved rounds. Stochastic depth: p_L = 0.5, equal cost.",
    )


def train(make: Callable[[str, int], Trainer], images: data.ImageData, steps: int, seeds: int, note: str) -> None:
    """Write the table of short runs."""
    rows = []
    for name in VARIANTS:
        if name.endswith("again"):
            continue
        errors: list[float] = []
        seconds: list[float] = []
        for seed in range(seeds):
            trainer = make(name, seed)
            begin = time.process_time()
            for _ in range(steps):
                trainer.step()
            seconds.append(time.process_time() - begin)
            errors.append(trainer.error(images.test))
            print(name, seed, f"{errors[-1]:.2f}", flush=True)
        rows.append([name, ", ".join(f"{error:.1f}" for error in errors), f"{statistics.mean(seconds):.0f}"])
    write_table(
        "cpu_training_runs",
        "Short runs on real CIFAR-10",
        ["loop", "test error, %, by seed", "process time of its steps, s"],
        rows,
        note,
    )


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--train", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--images", type=int, default=5000, help="training images of the short runs")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.train is None:
        torch.manual_seed(0)
        split = Split(torch.randint(256, (2048, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (2048,)))
        measure(
            lambda name: Trainer(name, split, args.layers, args.batch_size, 0),
            args.rounds,
            args.layers,
            args.batch_size,
        )
        return
    images = data.load("cifar10", data_root=args.train)
    split = Split(images.train.images[: args.images], images.train.labels[: args.images])
    steps = args.epochs * -(-args.images // args.batch_size)
    note = (
        f"ResNet-{args.layers}, the first {args.images} training images, {args.epochs} epochs of batches of "
        f"{args.batch_size}, learning rate 0.1 throughout; error on all test images."
    )
    train(lambda name, seed: Trainer(name, split, args.layers, args.batch_size, seed), images, steps, args.seeds, note)


if __name__ == "__main__":
    main()
