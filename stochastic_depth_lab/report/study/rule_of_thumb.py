"""When stochastic depth helps: what tells the settings in which it does from those in which it does not."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from stochastic_depth_lab.report.figures import Drawing, legend
from stochastic_depth_lab.report.study.figures import Cell
from stochastic_depth_lab.report.theme import INK, MUTED, SERIES


@dataclass(frozen=True)
class Sign:
    """A positive quantity that may tell whether stochastic depth helps.

    Attributes:
        name: what it is.
        of: the quantity, in a setting.
        low: whether low values speak for stochastic depth; otherwise, high ones.
        settings: the settings for which it speaks, with `{}` for the bound.
    """

    name: str
    of: Callable[[Cell], float]
    low: bool
    settings: str

    def speaks_for(self, cell: Cell, bound: float) -> bool:
        """Whether stochastic depth should help in a setting."""
        return (self.of(cell) < bound) == self.low


LOSS = Sign(
    "final training loss of constant depth",
    lambda cell: cell.train_loss,
    low=True,
    settings="the training loss of constant depth ends below {:.2g}",
)
PASSES = Sign(
    "number of passes over the training images",
    lambda cell: cell.passes,
    low=False,
    settings="training passes more than {:.2g} times over its images",
)


def bound_of(sign: Sign, cells: Sequence[Cell]) -> float | None:
    """The value of a sign that best separates the settings in which stochastic depth is better from the others.

    It is the geometric mean of two neighboring values, chosen so that the fewest settings are on the wrong side; the
    lowest of equally good ones. None if no value separates them better than none at all.
    """

    def num_wrong(bound: float) -> int:
        return sum(sign.speaks_for(cell, bound) != (cell.mean < 0) for cell in cells)

    bounds = [math.sqrt(a * b) for a, b in itertools.pairwise(sorted({sign.of(cell) for cell in cells}))]
    best = min(bounds, key=num_wrong, default=None)
    trivial = min(num_wrong(0), num_wrong(math.inf))
    return None if best is None or num_wrong(best) >= trivial else best


def sentences(dataset: str, cells: Sequence[Cell]) -> list[str]:
    """How well each sign separates the settings of a data set."""
    found: list[str] = []
    for sign in (LOSS, PASSES):
        bound = bound_of(sign, cells)
        if bound is None:
            found.append(
                f"{dataset}: stochastic depth has the lower mean error in {sum(cell.mean < 0 for cell in cells)} of "
                f"{len(cells)} settings. No {sign.name} separates these from the others."
            )
            continue
        for_it, others = ([cell for cell in cells if sign.speaks_for(cell, bound) == side] for side in (True, False))
        found.append(
            f"{dataset}: stochastic depth has the lower mean error in {sum(cell.mean < 0 for cell in for_it)} of "
            f"{len(for_it)} settings in which {sign.settings.format(bound)}, and in "
            f"{sum(cell.mean < 0 for cell in others)} of {len(others)} others."
        )
    return found


def _short(value: float, _position: int) -> str:
    return f"{value:g}"


def rule_of_thumb(dataset: str, cells: Sequence[Cell]) -> Drawing:
    """The gain over each sign."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    entries: list[tuple[Line2D | Patch, str]] = []
    for axes, sign in zip(figure.subplots(1, 2, sharey=True), (LOSS, PASSES), strict=True):
        for number, count in enumerate(sorted({cell.num_images for cell in cells})):
            own = sorted((cell for cell in cells if cell.num_images == count), key=sign.of)
            look: dict[str, Any] = {
                "color": SERIES[number % len(SERIES)],
                "marker": "osD^vP"[number % 6],
                "markersize": 5,
                "linewidth": 0.8,
            }
            axes.plot([sign.of(cell) for cell in own], [cell.mean for cell in own], **look)
            if sign is LOSS:
                entries.append((Line2D([], [], **look), f"{count:,} images"))
        axes.axhline(0, color=MUTED, linestyle=":")
        if (bound := bound_of(sign, cells)) is not None:
            axes.axvline(bound, color=INK, linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlabel(sign.name)
    figure.axes[0].set_title(f"{dataset}: test error")
    figure.axes[0].set_ylabel("stochastic minus constant depth, points")
    legend(figure, entries)
    return Drawing(
        f"rule-of-thumb-{dataset}",
        "runs",
        f"The rule of thumb: {dataset}",
        "Below the dotted line, stochastic depth is better. Dashed, if there is one: the value that best separates "
        "gain from loss. Lines connect runs with the same number of images. Mean over the seeds.",
        figure,
    )
