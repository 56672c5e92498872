"""The cost of a gate alone: microseconds of a block whose branch does almost nothing, forward and backward.

    python benchmarks/overhead.py [--blocks 600]

There are as many blocks as in the 1202-layer network; a block is one `Residual`. The result is the time of a step
divided by their number, the minimum over the rounds, so that other work on the machine counts little. A closed block
cannot cost less than a module that copies its input, which protects the shortcut from code that changes the sum in
place; this module is measured too. Gates are forced, because draws are random: the numbers include one
`depth.gates` per step and no draw.
"""

from __future__ import annotations

import argparse
import functools

import torch
from protocol import interleaved, write_table
from torch import nn

import stochastic_depth as sd


class Gain(nn.Module):
    """A minimal branch: one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (N, ...)."""
        return x * self.gain


class Copy(nn.Module):
    """A copy of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (N, ...)."""
        return x.clone()


def forward(net: nn.Module, x: torch.Tensor) -> None:
    """Forward, with gradients enabled."""
    net(x)


def step(net: nn.Module, parameters: list[nn.Parameter], x: torch.Tensor) -> None:
    """Forward and backward."""
    for parameter in parameters:
        parameter.grad = None
    net(x).sum().backward()


def forced(depth: sd.Controller, gates: list[bool], run: functools.partial[None]) -> None:
    """The same with forced gates."""
    with depth.gates(gates):
        run()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.ones(4, 1, requires_grad=True)
    steps: dict[str, functools.partial[None]] = {}

    def add(name: str, net: nn.Module, depth: sd.Controller | None = None, gate: bool = True) -> None:
        runs = {"forward": functools.partial(forward, net, x)}
        runs["step"] = functools.partial(step, net, list(net.parameters()), x)
        for kind, run in runs.items():
            gated = run if depth is None else functools.partial(forced, depth, [gate] * args.blocks, run)
            steps[f"{name}/{kind}"] = gated

    def blocks() -> nn.Sequential:
        return nn.Sequential(*(sd.Residual(Gain()) for _ in range(args.blocks)))

    add("nn.Identity", nn.Sequential(*(nn.Identity() for _ in range(args.blocks))))
    add("a copy", nn.Sequential(*(Copy() for _ in range(args.blocks))))
    add("plain", blocks())
    for skipped_grad in ("none", "zero"):
        for name, gate in (("open", True), ("closed", False)):
            net = blocks()
            depth = sd.make_stochastic_(net, sd.uniform(0.5), skipped_grad=skipped_grad)
            add(f"gates {name}, skipped_grad={skipped_grad!r}", net, depth, gate)
    times = interleaved(steps, rounds=args.rounds, warm_up=5)
    least = {name: min(values) / args.blocks * 1e6 for name, values in times.items()}
    names = dict.fromkeys(name.partition("/")[0] for name in steps)
    rows = [[name, f"{least[f'{name}/forward']:.1f}", f"{least[f'{name}/step']:.1f}"] for name in names]
    write_table(
        "overhead",
        "Time of one block whose branch multiplies four numbers by one parameter",
        ["block", "forward, µs", "forward and backward, µs"],
        rows,
        f"Process time; {args.blocks} blocks, least of n = {args.rounds} interleaved rounds.",
    )


if __name__ == "__main__":
    main()
