"""Table and figure of calibration: how often an answer is right, against how sure the network is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from stochastic_depth_lab.atomic import write_whole
from stochastic_depth_lab.report.figures import save
from stochastic_depth_lab.report.table import csv_text
from stochastic_depth_lab.report.theme import MUTED, SERIES, figure_style


@dataclass(frozen=True)
class Bin:
    """Samples of similar confidence."""

    count: int
    confidence: float
    """Their mean probability of the answer, in 0..1."""
    accuracy: float
    """The share of right answers among them."""


@dataclass(frozen=True)
class Reliability:
    """What a prediction's probabilities are worth."""

    name: str
    error: float
    """Wrong answers, in percent."""
    loss: float
    """Mean cross-entropy, in nats."""
    calibration_error: float
    """Mean distance of accuracy and confidence, in 0..1."""
    mistakes_found: float | None
    """The chance that a mistake is less sure than a right answer, in 0..1; None without mistakes."""
    bins: tuple[Bin, ...]


def reliability_text(measured: Sequence[Reliability]) -> str:
    """A table in Markdown.

    Example:
        >>> print(reliability_text([Reliability("one forward", 10.0, 0.5, 0.031, None, ())]))
        | prediction | error, % | loss | ECE, % | mistakes found |
        |---|---|---|---|---|
        | one forward | 10.00 | 0.5000 | 3.10 | - |
    """
    lines = ["| prediction | error, % | loss | ECE, % | mistakes found |", "|---|---|---|---|---|"]
    for each in measured:
        found = "-" if each.mistakes_found is None else f"{each.mistakes_found:.3f}"
        lines.append(
            f"| {each.name} | {each.error:.2f} | {each.loss:.4f} | {100 * each.calibration_error:.2f} | {found} |"
        )
    return "\n".join(lines)


def write_reliability(measured: Sequence[Reliability], folder: Path) -> tuple[Path, ...]:
    """Write `reliability.csv`, `.png` and `.svg` into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "reliability.csv"
    rows = [
        [
            each.name,
            each.error,
            each.loss,
            each.calibration_error,
            each.mistakes_found,
            b.count,
            b.confidence,
            b.accuracy,
        ]
        for each in measured
        for b in each.bins
    ]
    header = ["prediction", "error", "loss", "calibration_error", "mistakes_found", "count", "confidence", "accuracy"]
    write_whole(table, csv_text(header, rows).encode())
    with figure_style():
        return (table, *save(_figure(measured), folder, "reliability"))


def _figure(measured: Sequence[Reliability]) -> Figure:
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
    drawn: list[tuple[Bin, ...]] = []
    for each in measured:
        if each.bins in drawn:  # the same probabilities, another doubt
            continue
        largest = max(b.count for b in each.bins)
        x, y = [b.confidence for b in each.bins], [b.accuracy for b in each.bins]
        colour = SERIES[len(drawn)]
        label = f"{each.name}, ECE {100 * each.calibration_error:.2f} %"
        axes.plot(x, y, color=colour, linewidth=1, label=label)
        axes.scatter(x, y, s=[4 + 60 * b.count / largest for b in each.bins], color=colour)
        drawn.append(each.bins)
    axes.set_xlabel("confidence (larger dots: more images)")
    axes.set_ylabel("share of right answers")
    axes.legend(fontsize=8)
    return figure
