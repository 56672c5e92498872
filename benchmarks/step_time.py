"""Process time of a training step of the paper's CIFAR network, relative to constant depth.

The expected share of the FLOPs is not the expected share of the time: blocks of the first group, which are dropped
least, take more time per FLOP than later ones. So the script also measures what share of the time each group takes
(by steps with the group's gates closed) and prints the share of the time that perfect skipping would leave.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics

import torch
import torch.nn.functional as F
from protocol import interleaved, ratio, write_table
from torch import nn

import stochastic_depth as sd


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One step of the paper's optimizer."""
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


def forced_step(depth: sd.Controller, gates: list[bool], step: functools.partial[None]) -> None:
    """The same with forced gates."""
    with depth.gates(gates):
        step()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--final-survival-prob", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the gates, the weights and the images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--name", default="step_time", help="name of the table's file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format

    plain = sd.models.cifar_resnet(args.layers).to(memory_format=memory_format)
    images = torch.randn(args.batch_size, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.randint(10, (args.batch_size,))
    schedule = sd.linear_decay(args.final_survival_prob)

    def stochastic(schedule: sd.Schedule, **options: str) -> tuple[functools.partial[None], sd.Controller]:
        net = copy.deepcopy(plain)
        return step_of(net), sd.make_stochastic_(net, schedule, seed=args.seed, **options)  # pyright: ignore

    def step_of(net: nn.Module) -> functools.partial[None]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
        return functools.partial(train_step, net, optimizer, images, labels)

    # Equal cost: every step runs 40 or 41 of the 54 blocks, so that few rounds show the mean.
    batch, depth = stochastic(schedule, draw="equal_cost")
    sample, _ = stochastic(schedule, granularity="sample")
    all_open, _ = stochastic(sd.uniform(1.0))
    forced, forced_depth = stochastic(schedule)
    groups = [[f"groups.{group}." in name for name in forced_depth.names] for group in range(3)]
    steps = {
        "constant depth": step_of(copy.deepcopy(plain)),
        "constant depth again": step_of(copy.deepcopy(plain)),
        "all gates open": all_open,
        "batch granularity": batch,
        "sample granularity": sample,
    }
    for number, group in enumerate(groups):
        steps[f"group {number} closed"] = functools.partial(
            forced_step, forced_depth, [not closed for closed in group], forced
        )
    # The convolution library prepares a kernel for each new number of samples.
    for _ in range(3 * args.warm_up):
        sample()
    times = interleaved(steps, rounds=args.rounds, warm_up=args.warm_up)
    reference = times["constant depth"]

    expected = 1.0
    for number, group in enumerate(groups):
        closed_share = statistics.mean(1 - p for p, here in zip(depth.survival_probs, group, strict=True) if here)
        expected -= closed_share * (1 - ratio(times[f"group {number} closed"], reference)[0])
    rows = []
    for name, values in times.items():
        median, mean = ratio(values, reference)
        rows.append([name, f"{statistics.median(values) * 1e3:.0f}", f"{median:.3f}", f"{mean:.3f}"])
    write_table(
        args.name,
        f"Training step, ResNet-{args.layers}, batch {args.batch_size}, p_L = {args.final_survival_prob}, fp32"
        + (", channels last" if args.channels_last else ""),
        ["step", "process time, ms (median)", "ratio to constant depth (median)", "ratio of means"],
        rows,
        f"Expected share of the FLOPs {depth.cost(images).flops_share:.3f}; of the time, with perfect skipping, "
        f"{expected:.3f}. n = {args.rounds} interleaved rounds.",
    )


if __name__ == "__main__":
    main()
