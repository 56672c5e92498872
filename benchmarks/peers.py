"""Compares all methods of dropping in one run, with the same network, batch and rate.

    python benchmarks/peers.py [--networks ...] [--rates 0.1 0.2 0.5] [--batch-sizes 8 64 256]

Constant depth, torchvision's `StochasticDepth` (mode "batch" and "row"), timm's `DropPath`, a random subset of fixed
size as described for DINOv2, and `make_stochastic_` in both granularities, with draws of equal cost, so a few steps
show the mean. Ratios to constant depth, one table each: FLOPs, bytes kept for the backward and peak of a step, counted;
process and wall-clock time of forward and backward.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import networks
import torch
import torch.nn.functional as F
import torchvision
from protocol import ratio, shuffled_rounds, write_table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from stochastic_depth_lab.measure.kept_bytes import kept_bytes

WAYS = (
    "constant depth",
    "again",
    "torchvision batch",
    "torchvision row",
    "timm DropPath",
    "fixed subset (DINOv2)",
    "ours, batch",
    "ours, sample",
)


def create(network: str, way: str, rate: float, seed: int) -> nn.Module | None:
    """The network with one method of dropping at this rate; None if the method does not support the network."""
    if way in ("constant depth", "again"):
        return networks.create(network, 0.0)
    if way.startswith("fixed subset"):
        return networks.with_subsets(network, rate)
    model = networks.create(network, rate)
    if way.startswith("torchvision"):
        return networks.with_drop_paths(model, torchvision.ops.StochasticDepth(rate, way.split()[1]))
    if way.startswith("ours"):
        depth = sd.make_stochastic_(model, granularity=way.split()[1], draw="equal_cost", seed=seed)
        depth.set_costs(depth.cost(torch.randn(2, 3, networks.IMAGE_SIZE, networks.IMAGE_SIZE)))
    return model


def forward(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss."""
    return F.cross_entropy(model(images), labels)


def step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    forward(model, images, labels).backward()


def flops(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """FLOPs that a step executes."""
    with FlopCounterMode(display=False) as counter:
        step(model, images, labels)
    return counter.get_total_flops()


def kept(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that a forward keeps for its backward."""
    return kept_bytes(functools.partial(forward, model, images, labels))


def peak(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Peak of the bytes that PyTorch allocates during a step, gradients included, above those allocated before."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, images, labels)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(num_bytes for _, num_bytes in sorted(changes, key=lambda change: change[0])))


COUNTS: dict[str, Callable[[nn.Module, Tensor, Tensor], int]] = {"flops": flops, "kept": kept, "peak": peak}


def count(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor], num_steps: int) -> dict[str, dict[str, float]]:
    """For each count, the ratios to constant depth by method; means if gates are drawn."""
    ratios: dict[str, dict[str, float]] = {}
    for what, measure in COUNTS.items():
        means = {
            way: statistics.fmean(measure(model, *batch) for _ in range(num_steps if way.startswith("ours") else 1))
            for way, model in models.items()
        }
        ratios[what] = {way: mean / means["constant depth"] for way, mean in means.items()}
    return ratios


def measure_times(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor], rounds: int) -> list[dict[str, float]]:
    """Ratios to constant depth by method, of process time and of wall-clock time: medians over interleaved rounds."""
    clocks = time.process_time, time.perf_counter
    times: list[dict[str, list[float]]] = [{way: [] for way in models} for _ in clocks]
    for way in shuffled_rounds(models, rounds=rounds + 1):
        begin = [clock() for clock in clocks]
        step(models[way], *batch)
        for clock, began, of_clock in zip(clocks, begin, times, strict=True):
            of_clock[way].append(clock() - began)
    # The first round warms up.
    return [{way: ratio(each[way][1:], each["constant depth"][1:])[0] for way in models} for each in times]


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(networks.NETWORKS))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the gates and the images")
    parser.add_argument("--name", default="peers", help="how the names of the tables' files begin")
    parser.add_argument("--counted-batch", type=int, default=32, help="images of a step that is counted")
    parser.add_argument("--counted", type=int, default=10, help="steps that are counted where they differ")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[list[str]]] = {what: [] for what in (*COUNTS, "process_time", "wall_clock")}
    for network, rate in itertools.product(args.networks, args.rates):
        made = {way: create(network, way, rate, args.seed) for way in WAYS}
        models = {way: model for way, model in made.items() if model is not None}

        def images(batch_size: int) -> tuple[Tensor, Tensor]:
            torch.manual_seed(args.seed)
            return torch.randn(batch_size, 3, networks.IMAGE_SIZE, networks.IMAGE_SIZE), torch.randint(
                10, (batch_size,)
            )

        results = [
            (what, args.counted_batch, ratios)
            for what, ratios in count(models, images(args.counted_batch), args.counted).items()
        ]
        for batch_size in args.batch_sizes:
            process, wall = measure_times(models, images(batch_size), args.rounds)
            results += [("process_time", batch_size, process), ("wall_clock", batch_size, wall)]
        for what, batch_size, ratios in results:
            cells = [f"{ratios[way]:.3f}" if way in ratios else "refused" for way in WAYS[1:]]
            rows[what].append([network, f"{rate:g}", str(batch_size), *cells])
            print(what, *rows[what][-1], sep=" | ", flush=True)
    counted = (
        f"{networks.IMAGE_SIZE} pixels, fp32, forward and backward; ours: equal cost, mean of {args.counted} steps."
    )
    timed = (
        f"{networks.IMAGE_SIZE} pixels, fp32, forward and backward; ours: equal cost; medians of n = {args.rounds} "
        "interleaved rounds."
    )
    for what, title, note in (
        ("flops", "FLOPs executed", counted),
        ("kept", "Bytes that a forward keeps for its backward", counted),
        ("peak", "Bytes that a step allocates at most, gradients too", counted),
        ("process_time", "Process time", timed),
        ("wall_clock", "Wall-clock time", timed),
    ):
        write_table(
            f"{args.name}_{what}",
            f"{title}, uniform rate, as ratios to constant depth",
            ["network", "rate", "batch", *WAYS[1:]],
            rows[what],
            note,
        )


if __name__ == "__main__":
    main()
