"""What a user would pick instead, beside it in one run: the same network, batch and rate, in every way of dropping.

    python benchmarks/peers.py [--networks ...] [--rates 0.1 0.2 0.5] [--batch-sizes 8 64 256]

Constant depth, torchvision's `StochasticDepth` (mode "batch" and "row"), timm's `DropPath`, a random subset of fixed
size as DINOv2 is described, and `make_stochastic_` in both granularities. Per way: FLOPs and bytes kept for the
backward, counted, means over the rounds; process and wall-clock time of forward and backward, median ratios.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import networks
import torch
import torch.nn.functional as F
import torchvision
from protocol import kept_bytes, ratio, shuffled_rounds, write_table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd


def ways(network: str, rate: float, seed: int) -> dict[str, nn.Module]:
    """The network at constant depth, and with every way of dropping at this rate."""
    made = {
        "constant depth": networks.create(network, 0.0),
        "constant depth again": networks.create(network, 0.0),
        "torchvision batch": networks.with_drop_paths(
            networks.create(network, rate), torchvision.ops.StochasticDepth(rate, "batch")
        ),
        "torchvision row": networks.with_drop_paths(
            networks.create(network, rate), torchvision.ops.StochasticDepth(rate, "row")
        ),
        "timm DropPath": networks.create(network, rate),
        "fixed subset (DINOv2)": networks.with_subsets(network, rate),
    }
    for granularity in ("batch", "sample"):
        model = made[f"make_stochastic_ {granularity}"] = networks.create(network, rate)
        sd.make_stochastic_(model, granularity=granularity, seed=seed)
    return {name: model for name, model in made.items() if model is not None}


def forward(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss."""
    return F.cross_entropy(model(images), labels)


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    forward(model, images, labels).backward()


def flops_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    """FLOPs that a step executes."""
    with FlopCounterMode(display=False) as counter:
        step(model, images, labels)
    return counter.get_total_flops()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(networks.NETWORKS))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the gates and the images")
    parser.add_argument("--name", default="peers", help="name of the table's file")
    parser.add_argument("--counted", type=int, default=20, help="steps whose FLOPs and bytes are counted")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for network in args.networks:
        for rate in args.rates:
            models = ways(network, rate, args.seed)
            torch.manual_seed(args.seed)
            few = torch.randn(8, 3, networks.IMAGE_SIZE, networks.IMAGE_SIZE), torch.randint(10, (8,))
            num_counted = {name: args.counted if "make" in name else 1 for name in models}
            flops = {
                name: statistics.fmean(flops_of(model, *few) for _ in range(num_counted[name]))
                for name, model in models.items()
            }
            kept = {
                name: statistics.fmean(
                    kept_bytes(functools.partial(forward, model, *few), model) for _ in range(num_counted[name])
                )
                for name, model in models.items()
            }
            for batch_size in args.batch_sizes:
                images = torch.randn(batch_size, 3, networks.IMAGE_SIZE, networks.IMAGE_SIZE)
                labels = torch.randint(10, (batch_size,))
                process: dict[str, list[float]] = {name: [] for name in models}
                wall: dict[str, list[float]] = {name: [] for name in models}
                for name in shuffled_rounds(models, rounds=args.rounds + 1):
                    begin = time.process_time(), time.perf_counter()
                    step(models[name], images, labels)
                    process[name].append(time.process_time() - begin[0])
                    wall[name].append(time.perf_counter() - begin[1])
                for name in models:
                    ratios = [ratio(times[name][1:], times["constant depth"][1:])[0] for times in (process, wall)]
                    counts = [count[name] / count["constant depth"] for count in (flops, kept)]
                    rows.append(
                        [network, f"{rate:g}", str(batch_size), name, *(f"{value:.3f}" for value in (*counts, *ratios))]
                    )
                    print(" | ".join(rows[-1]), flush=True)
    write_table(
        args.name,
        "Ways of dropping, uniform rate, as ratios to constant depth",
        ["network", "rate", "batch", "way", "FLOPs", "bytes kept", "process time", "wall-clock"],
        rows,
        f"{networks.IMAGE_SIZE} pixels, fp32, forward and backward; times: medians of n = {args.rounds} interleaved "
        f"rounds; FLOPs and bytes: means of {args.counted} steps of 8 images.",
    )


if __name__ == "__main__":
    main()
