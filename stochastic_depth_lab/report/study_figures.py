"""Figures over settings, one point per setting: test error over survival probability, and over depth too."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stochastic_depth_lab.report.figures import Drawing, legend
from stochastic_depth_lab.report.theme import MUTED, SERIES

_LOOKS: dict[str, tuple[str, str, Literal["-", "--"], str]] = {
    "linear_decay": (SERIES[1], "o", "-", "linear decay"),
    "uniform": (SERIES[0], "s", "--", "uniform"),
}


def survival_curve(errors: Mapping[str, Mapping[float, Sequence[float]]], constant_depth: Sequence[float]) -> Drawing:
    """Test error over p_L, a line for each schedule.

    Args:
        errors: test errors in percent of the seeds, by schedule and p_L.
        constant_depth: those of constant depth.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    entries: list[tuple[Line2D | Patch, str]] = []
    for schedule, by_prob in errors.items():
        colour, marker, dashes, name = _LOOKS[schedule]
        probs = sorted(by_prob)
        means = [statistics.mean(by_prob[prob]) for prob in probs]
        stds = [_std(by_prob[prob]) for prob in probs]
        axes.errorbar(probs, means, stds, color=colour, marker=marker, markersize=5, linestyle=dashes, capsize=3)
        entries.append((Line2D([], [], color=colour, marker=marker, markersize=5, linestyle=dashes), name))
    if constant_depth:
        mean, std = statistics.mean(constant_depth), _std(constant_depth)
        axes.axhline(mean, color=MUTED, linewidth=1.2, linestyle=":")
        if std:
            axes.axhspan(mean - std, mean + std, color=MUTED, alpha=0.2, linewidth=0)
        entries.append((Line2D([], [], color=MUTED, linewidth=1.2, linestyle=":"), "constant depth"))
    axes.set_title("test error at the lowest validation error, %")
    axes.set_xlabel("survival probability of the last block, p_L")
    legend(figure, entries)
    spread = any(len(seeds) > 1 for by_prob in errors.values() for seeds in by_prob.values()) or len(constant_depth) > 1
    return Drawing(
        "survival_curve",
        "runs",
        "Test error over survival probability",
        "Bars and band: standard deviation over seeds, where there are several." if spread else "One seed of each.",
        figure,
    )


def heat_map(errors: Mapping[tuple[int, float], Sequence[float]]) -> Drawing:
    """Test error over depth and p_L, as numbers on a colour scale.

    Args:
        errors: test errors in percent of the seeds, by number of layers and p_L; constant depth is p_L = 1.
    """
    layers, probs = sorted({depth for depth, _ in errors}), sorted({prob for _, prob in errors})
    means = [[statistics.mean(errors.get((depth, prob), [float("nan")])) for prob in probs] for depth in layers]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(layers)), layout="constrained")
    axes = figure.subplots()
    known = [mean for line in means for mean in line if mean == mean]
    lowest, highest = min(known), max(known)
    axes.pcolormesh(means, cmap="viridis", edgecolors="white", linewidth=1)
    for row, line in enumerate(means):
        best = min(mean for mean in line if mean == mean)
        for column, mean in enumerate(line):
            if mean == mean:  # not a gap
                dark = (mean - lowest) < 0.6 * (highest - lowest)
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{mean:.2f}",
                    ha="center",
                    va="center",
                    color="#ffffff" if dark else "#000000",
                    fontweight="bold" if mean == best else "normal",
                )
    axes.set_xticks([i + 0.5 for i in range(len(probs))], [f"{prob:g}" if prob < 1 else "constant" for prob in probs])
    axes.set_yticks([i + 0.5 for i in range(len(layers))], [str(depth) for depth in layers])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("survival probability of the last block, p_L")
    axes.set_ylabel("layers")
    axes.set_title("test error at the lowest validation error, %")
    return Drawing(
        "heat_map",
        "runs",
        "Test error over depth and survival probability",
        "Linear decay. Dark is low; bold: the lowest of its depth. Mean over the seeds.",
        figure,
    )


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
