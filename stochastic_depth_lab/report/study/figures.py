"""Figures over seeds and settings: the gap over training; error over survival, depth, rate, images and steps."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stochastic_depth_lab.report.figures import Drawing, legend
from stochastic_depth_lab.report.theme import INK, MUTED, SERIES

_LOOKS: dict[str, tuple[str, str, Literal["-", "--"], str]] = {
    "linear_decay": (SERIES[1], "o", "-", "linear decay"),
    "uniform": (SERIES[0], "s", "--", "uniform"),
}
_CONSTANT: tuple[str, Literal["-", "--"], str] = (SERIES[0], "--", "constant depth")
_STOCHASTIC: tuple[str, Literal["-", "--"], str] = (SERIES[1], "-", "stochastic depth")


@dataclass(frozen=True)
class Line:
    """A method with a curve for each seed: steps and test errors in percent."""

    label: str
    seeds: Mapping[int, tuple[Sequence[int], Sequence[float]]]
    stochastic: bool


@dataclass(frozen=True)
class Cell:
    """A pair at one length of training and number of images."""

    num_images: int
    num_steps: int
    differences: tuple[float, ...]
    """Test error of stochastic minus constant depth, in points, seed by seed."""
    train_loss: float
    """Training loss of constant depth in the last epoch, mean over the seeds."""
    passes: float
    """How often training shows each image."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.mean(self.differences)


def gap(lines: Sequence[Line]) -> Drawing:
    """Test error over training for every seed, with the paired difference beside it."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    entries: list[tuple[Line2D | Patch, str]] = []
    means: list[float] = []
    for line in lines:
        color, dashes, _ = _STOCHASTIC if line.stochastic else _CONSTANT
        for steps, errors in line.seeds.values():
            left.plot(steps, errors, color=color, linestyle=dashes, linewidth=0.8, alpha=0.6)
        steps = next(iter(line.seeds.values()))[0]
        mean = [statistics.mean(values) for values in zip(*(errors for _, errors in line.seeds.values()), strict=True)]
        left.plot(steps, mean, color=color, linestyle=dashes, linewidth=2.6)
        means.append(mean[-1])
        entries.append((Line2D([], [], color=color, linestyle=dashes, linewidth=2.6), f"{line.label}, mean"))
    # The errors of the first steps would flatten the rest of the curves.
    top = 3 * max(means)
    left.set_ylim(0, top)
    left.set_title(f"test error, % (above {top:.0f} not shown)")
    entries.append((Line2D([], [], color=MUTED, linewidth=0.8), "one seed"))
    ends: list[float] = []
    constant, stochastic = (next((x for x in lines if x.stochastic == kind), None) for kind in (False, True))
    if constant and stochastic:
        for number, (steps, errors) in stochastic.seeds.items():
            if number in constant.seeds:
                difference = [one - other for one, other in zip(errors, constant.seeds[number][1], strict=True)]
                right.plot(steps, difference, color=INK, linewidth=1)
                ends.append(difference[-1])
        right.axhline(0, color=MUTED, linestyle=":")
        right.set_ylim(-top, top)
        right.set_title("stochastic minus constant depth, points")
    for axes in (left, right):
        axes.set_xlabel("steps")
    legend(figure, entries)
    return Drawing(
        "gap",
        "epochs",
        "The gap over training",
        "Thin lines on the left and all lines on the right are single seeds. Below 0, stochastic depth is better. "
        f"At the end the differences are {', '.join(f'{end:+.1f}' for end in sorted(ends))} points.",
        figure,
    )


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
        color, marker, dashes, name = _LOOKS[schedule]
        probs = sorted(by_prob)
        means = [statistics.mean(by_prob[prob]) for prob in probs]
        stds = [_std(by_prob[prob]) for prob in probs]
        axes.errorbar(probs, means, stds, color=color, marker=marker, markersize=5, linestyle=dashes, capsize=3)
        _dots(axes, {prob: by_prob[prob] for prob in probs}, color)
        entries.append((Line2D([], [], color=color, marker=marker, markersize=5, linestyle=dashes), name))
    if constant_depth:
        mean, std = statistics.mean(constant_depth), _std(constant_depth)
        axes.axhline(mean, color=MUTED, linewidth=1.2, linestyle=":")
        if std:
            axes.axhspan(mean - std, mean + std, color=MUTED, alpha=0.2, linewidth=0)
        entries.append((Line2D([], [], color=MUTED, linewidth=1.2, linestyle=":"), "constant depth"))
    axes.set_title("test error, %")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("survival probability of the last block, p_L")
    legend(figure, entries)
    spread = any(len(seeds) > 1 for by_prob in errors.values() for seeds in by_prob.values()) or len(constant_depth) > 1
    return Drawing(
        "survival_curve",
        "runs",
        "Test error over survival probability",
        "Bars and band: standard deviation over seeds; small dots: the seeds." if spread else "One seed of each.",
        figure,
    )


def heat_map(errors: Mapping[tuple[int, float], Sequence[float]]) -> Drawing:
    """Test error over depth and p_L, as numbers on a color scale.

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
    axes.set_title("test error, %")
    return Drawing(
        "heat_map",
        "runs",
        "Test error over depth and survival probability",
        "Linear decay. Dark: low; bold: the lowest of its depth. Mean over the seeds.",
        figure,
    )


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _dots(axes: Axes, values: Mapping[float, Sequence[float]], color: str) -> None:
    """Draw every seed beside its mean."""
    pairs = [(place, value) for place, seeds in values.items() for value in seeds]
    axes.plot([x for x, _ in pairs], [y for _, y in pairs], ".", color=color, markersize=3, alpha=0.6)


def _two_lines(errors: Mapping[bool, Mapping[float, Sequence[float]]], ticks: Sequence[float]) -> tuple[Figure, Axes]:
    """Lines for constant and stochastic depth on a logarithmic axis."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    entries: list[tuple[Line2D | Patch, str]] = []
    for stochastic, by_place in errors.items():
        color, dashes, name = _STOCHASTIC if stochastic else _CONSTANT
        places = sorted(by_place)
        means, stds = [statistics.mean(by_place[x]) for x in places], [_std(by_place[x]) for x in places]
        axes.errorbar(places, means, stds, color=color, marker="o", markersize=5, linestyle=dashes, capsize=3)
        _dots(axes, by_place, color)
        entries.append((Line2D([], [], color=color, marker="o", markersize=5, linestyle=dashes), name))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    legend(figure, entries)
    return figure, axes


def depth_curve(errors: Mapping[bool, Mapping[int, Sequence[float]]]) -> Drawing:
    """Test error over the number of layers.

    Args:
        errors: test errors in percent of the seeds, by whether depth is stochastic and by number of layers.
    """
    layers = sorted({number for by_depth in errors.values() for number in by_depth})
    figure, axes = _two_lines({kind: dict(by_depth.items()) for kind, by_depth in errors.items()}, layers)
    axes.set_title("test error, %")
    axes.set_xlabel("layers")
    return Drawing(
        "depth_curve",
        "runs",
        "Test error over depth",
        "Bars: standard deviation over seeds; small dots: the seeds.",
        figure,
    )


def rates(errors: Mapping[bool, Mapping[float, Sequence[float]]]) -> Drawing:
    """Validation error over the learning rate.

    Args:
        errors: validation errors in percent of the seeds, by whether depth is stochastic and by rate.
    """
    figure, axes = _two_lines(errors, sorted({rate for by_rate in errors.values() for rate in by_rate}))
    axes.set_title("validation error after the last step, %")
    axes.set_xlabel("learning rate")
    return Drawing(
        "rates",
        "runs",
        "Validation error over the learning rate",
        "Bars: standard deviation over seeds; small dots: the seeds. The lowest mean of each line is chosen.",
        figure,
    )


def crossing(dataset: str, cells: Sequence[Cell]) -> Drawing:
    """Gain of stochastic depth over steps and training images, and the line where it breaks even."""
    steps, images = sorted({cell.num_steps for cell in cells}), sorted({cell.num_images for cell in cells})
    means = {(cell.num_images, cell.num_steps): cell.mean for cell in cells}
    grid = [[means.get((count, number), math.nan) for number in steps] for count in images]
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(images)), layout="constrained")
    axes = figure.subplots()
    extreme = max(1.0, *(abs(value) for value in means.values()))
    axes.pcolormesh(
        grid, cmap="RdBu_r", norm=TwoSlopeNorm(0, -extreme, extreme), edgecolors="white", linewidth=1, rasterized=False
    )
    for (row, line), column in itertools.product(enumerate(grid), range(len(steps))):
        if not math.isnan(line[column]):
            strong = abs(line[column]) > 0.6 * extreme
            axes.text(
                column + 0.5,
                row + 0.4,
                f"{line[column]:+.1f}".replace("-", "\N{MINUS SIGN}"),
                ha="center",
                va="top",  # the line of break-even is above it
                color="#ffffff" if strong else "#000000",
            )
    broken_even = [
        (column + 0.5 + before / (before - after), row + 0.5)
        for row, line in enumerate(grid)
        for column, (before, after) in enumerate(itertools.pairwise(line))
        if before > 0 >= after
    ]
    if broken_even:
        axes.plot(*zip(*broken_even, strict=True), color="#000000", marker="D", markersize=4, linewidth=2)
    axes.set_xticks([i + 0.5 for i in range(len(steps))], [f"{number:,}" for number in steps])
    axes.set_yticks([i + 0.5 for i in range(len(images))], [f"{count:,}" for count in images])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("steps")
    axes.set_ylabel("training images")
    axes.set_title(f"{dataset}: test error of stochastic minus constant depth, points")
    return Drawing(
        f"crossing-{dataset}",
        "runs",
        f"When stochastic depth helps: {dataset}",
        "Blue: stochastic depth is better. Black line: break-even, interpolated between two numbers of steps. Mean "
        "over the seeds.",
        figure,
    )
