"""What a gate costs by itself: microseconds of a block whose branch does next to nothing, forward and backward.

    python benchmarks/overhead.py [--blocks 600]

As many blocks as the 1202-layer network has. A block is one `Residual`; the time of a step divided by their number,
least of the rounds, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import functools

import torch
from protocol import interleaved, write_table
from torch import nn

import stochastic_depth as sd


class Gain(nn.Module):
    """The least of a branch: one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (N, ...)."""
        return x * self.gain


def step(net: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    net.zero_grad()
    net(x).sum().backward()


def forced(depth: sd.Controller, gates: list[bool], run: functools.partial[None]) -> None:
    """The same with forced gates."""
    with depth.gates(gates):
        run()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.ones(4, 1, requires_grad=True)

    def blocks() -> nn.Sequential:
        return nn.Sequential(*(sd.Residual(Gain()) for _ in range(args.blocks)))

    identities = nn.Sequential(*(nn.Identity() for _ in range(args.blocks)))
    steps = {"no blocks": functools.partial(step, identities, x), "plain": functools.partial(step, blocks(), x)}
    for skipped_grad in ("none", "zero"):
        net = blocks()
        depth = sd.make_stochastic_(net, sd.uniform(0.5), skipped_grad=skipped_grad)
        run = functools.partial(step, net, x)
        for name, gate in (("open", True), ("closed", False)):
            gates = [gate] * args.blocks
            steps[f"gates {name}, skipped_grad={skipped_grad!r}"] = functools.partial(forced, depth, gates, run)
        steps[f"half of them drawn, skipped_grad={skipped_grad!r}"] = run
    times = interleaved(steps, rounds=args.rounds, warm_up=5)
    least = {name: min(values) / args.blocks * 1e6 for name, values in times.items()}
    rows = [[name, f"{value:.1f}"] for name, value in least.items()]
    write_table(
        "overhead",
        "Time of one block whose branch multiplies four numbers by one parameter",
        ["block", "process time, µs"],
        rows,
        f"{args.blocks} blocks, forward, backward and zero_grad, least of n = {args.rounds} interleaved rounds. "
        "'No blocks' are as many nn.Identity.",
    )


if __name__ == "__main__":
    main()
