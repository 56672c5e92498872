"""Training steps of models whose inputs have new sizes in each step: graphs, and texts without padding.

    python benchmarks/new_sizes.py [--rounds 30]

Code that reads no sizes is recorded once for all sizes. The last row is of a block that reads one, and is recorded
again in each step.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator

import torch
from protocol import interleaved, ratio, write_table
from torch import Tensor, nn

import stochastic_depth as sd

DEPTH = 8


class Messages(nn.Module):
    """A layer of a graph network of width 128, for about 400 nodes and 1,700 edges."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.mlp = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """(nodes, 128) and two ends of each edge to (nodes, 128)."""
        h = self.norm(x)
        messages = self.mlp(torch.cat([h[start], h[end]], -1))
        return x + torch.zeros_like(x).index_add(0, end, messages)


class AskingMessages(Messages):
    """The same, with the messages scaled by the number of nodes."""

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """(nodes, 128) and two ends of each edge to (nodes, 128)."""
        h = self.norm(x)
        messages = self.mlp(torch.cat([h[start], h[end]], -1)) * (400 / x.shape[0])
        return x + torch.zeros_like(x).index_add(0, end, messages)


class Layer(nn.Module):
    """A transformer layer of width 128, for 16 texts of 20 to 120 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(128), nn.LayerNorm(128)
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))

    def forward(self, x: Tensor) -> Tensor:
        """(texts, tokens, 128) to the same."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Several layers with the same further arguments."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(DEPTH))

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        """All layers, one after another."""
        for layer in self.layers:
            x = layer(x, *args)
        return x


def graphs() -> Iterator[tuple[Tensor, ...]]:
    """Random graphs."""
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        nodes = int(torch.randint(350, 450, (), generator=generator))
        edges = int(torch.randint(1500, 2000, (), generator=generator))
        yield torch.randn(nodes, 128, generator=generator), *torch.randint(nodes, (2, edges), generator=generator)


def texts() -> Iterator[tuple[Tensor, ...]]:
    """Random texts."""
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        yield (torch.randn(16, int(torch.randint(20, 120, (), generator=generator)), 128, generator=generator),)


def step(net: nn.Module, inputs: Iterator[tuple[Tensor, ...]]) -> None:
    """Forward and backward."""
    net.zero_grad()
    net(*next(inputs)).sum().backward()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for name, layer, inputs in (
        ("graph network", Messages, graphs),
        ("transformer, texts without padding", Layer, texts),
        ("graph network that asks for its number of nodes", AskingMessages, graphs),
    ):
        plain = Stack(layer)
        steps = {"plain": functools.partial(step, plain, inputs())}
        for granularity in ("batch",) if layer is not Layer else ("batch", "sample"):
            net = copy.deepcopy(plain)
            sd.make_stochastic_(net, sd.uniform(0.5), granularity=granularity)
            steps[granularity] = functools.partial(step, net, inputs())
        times = interleaved(steps, rounds=args.rounds, warm_up=5)
        for granularity in list(steps)[1:]:
            median, of_means = ratio(times[granularity], times["plain"])
            milliseconds = [f"{1000 * statistics.mean(times[each]):.0f}" for each in ("plain", granularity)]
            rows.append([name, granularity, *milliseconds, f"{of_means:.2f}", f"{median:.2f}"])
    write_table(
        "new_sizes",
        "Training steps with new sizes in each step, survival probability 0.5",
        ["model", "granularity", "plain, ms", "stochastic, ms", "ratio of means", "median ratio"],
        rows,
        f"Process time; n = {args.rounds} interleaved rounds, each step with new sizes, the same for both.",
    )


if __name__ == "__main__":
    main()
