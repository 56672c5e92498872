"""Simulates the step time of the slowest of many ranks for each way of drawing gates, with the library's own draws.

    python benchmarks/stragglers.py

Assumptions: every rank computes at the same speed and without jitter, time is proportional to FLOPs, communication is
hidden, a step ends with the slowest rank. So the figure shows what gates alone do. Gates are those that the library
draws (`stochastic_depth.gates.draw_counts`), one per mini-batch, for 65,536 ranks; fewer ranks are parts of them.
Writes benchmarks/tables/stragglers.md and docs/stragglers.svg.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from protocol import write_table

import stochastic_depth as sd
from stochastic_depth.gates import Draw, draw_counts


@dataclass(frozen=True)
class Network:
    """What a step costs: of each branch, and of the rest, in units of the whole step at constant depth."""

    name: str
    survival_probs: Sequence[float]
    costs: Sequence[float]
    rest: float


def resnet_110() -> Network:
    """The paper's: 54 branches of equal FLOPs; counted by `depth.cost`, all but 0.1 % lies in the branches."""
    return Network("ResNet-110, p_L 0.5", sd.linear_decay(0.5)(54), [0.999 / 54] * 54, 0.001)


def vit_base() -> Network:
    """ViT-B/16 at 224 pixels, rate 0 to 0.5: an attention is 8 N d^2 + 4 N^2 d FLOPs, an MLP 16 N d^2 (forward)."""
    num_tokens, width = 197, 768
    attention, mlp = 8 * num_tokens * width**2 + 4 * num_tokens**2 * width, 16 * num_tokens * width**2
    patches = 2 * 196 * width * 768
    whole = 12 * (attention + mlp) + patches
    rates = [0.5 * block / 11 for block in range(12)]
    probs = [1 - rate for rate in rates for _ in range(2)]
    return Network("ViT-B/16, rate 0 to 0.5", probs, [attention / whole, mlp / whole] * 12, patches / whole)


def rank_times(network: Network, draw: Draw, num_ranks: int, counter: int) -> npt.NDArray[np.float64]:
    """(num_ranks,) time of a step on each rank with gates of its own, in units of constant depth."""
    costs = np.array(network.costs)
    times = np.empty(num_ranks)
    for rank in range(num_ranks):
        gates = draw_counts(
            network.survival_probs, 1, seed=0, counter=counter, draw=draw, costs=network.costs, rank=rank
        )
        times[rank] = network.rest + costs @ gates
    return times


def slowest(times: npt.NDArray[np.float64], num_ranks: int) -> float:
    """Mean over groups of that many ranks of the time of the slowest."""
    return float(times.reshape(-1, num_ranks).max(axis=1).mean())


def main() -> None:
    """Simulate, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--most", type=int, default=65536)
    options = parser.parse_args()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [2**power for power in range(1, int(math.log2(options.most)) + 1)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    rows: list[list[str]] = []
    for axis, network in zip(axes, (resnet_110(), vit_base()), strict=True):
        probs, costs = np.array(network.survival_probs), np.array(network.costs)
        mean = network.rest + float(probs @ costs)
        deviation = math.sqrt(float((probs * (1 - probs) * costs**2).sum()))
        draws: dict[Draw, npt.NDArray[np.float64]] = {
            draw: np.concatenate([rank_times(network, draw, options.most, step) for step in range(options.steps)])
            for draw in ("bernoulli", "equal_cost")
        }
        curves: dict[str, list[float]] = {
            "agreed (either draw)": [mean] * len(sizes),
            "decorrelated, bernoulli": [slowest(draws["bernoulli"], size) for size in sizes],
            "decorrelated, equal_cost": [slowest(draws["equal_cost"], size) for size in sizes],
        }
        for style, (name, values) in zip(("-", "--", "-."), curves.items(), strict=True):
            axis.plot(sizes, values, style, label=name)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="ranks", title=network.name)
        axis.set_xscale("log", base=2)
        for index, size in enumerate(sizes):
            if size in (2, 8, 64, 1024, 8192, 65536):
                formula = mean + deviation * math.sqrt(2 * math.log(size))
                union = float((1 - (1 - probs) ** size) @ costs) / float(costs.sum())
                cells = [f"{curve[index]:.3f}" for curve in curves.values()]
                traffic = [f"{float(probs @ costs) / float(costs.sum()):.3f}", f"{union:.3f}"]
                rows.append([network.name, f"{size:,}", *cells, f"{formula:.3f}", *traffic])
    axes[0].set_ylabel("step of the slowest rank,\nconstant depth = 1")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).parents[1] / "docs" / "stragglers.svg", metadata={"Date": None})
    write_table(
        "stragglers",
        "Step of the slowest rank, constant depth = 1; and the share of the branches' gradients that some rank has",
        ["network", "ranks", "agreed", "decorrelated bernoulli", "decorrelated equal_cost", "mean + sd sqrt(2 ln R)",
         "gradients, agreed", "gradients, decorrelated"],
        rows,
        f"A simulation, n = {options.steps} x {options.most} draws, in groups. Agreed: the mean over steps; a single "
        "step of bernoulli gates is longer or shorter on all ranks alike.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
