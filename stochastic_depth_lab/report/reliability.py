"""Table and figure of calibration: accuracy against confidence."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.report.figures import legend, save
from stochastic_depth_lab.report.table import NOTHING, aligned, csv_text
from stochastic_depth_lab.report.theme import MUTED, SERIES, figure_style


@dataclass(frozen=True)
class Bin:
    """Samples of similar confidence."""

    count: int
    confidence: float
    """Mean probability of the answer, in 0..1."""
    accuracy: float
    """Share of right answers."""


@dataclass(frozen=True)
class Reliability:
    """How good the probabilities of a prediction are."""

    name: str
    error: float
    """Wrong answers, in percent."""
    loss: float
    """Mean cross-entropy, in nats."""
    calibration_error: float
    """Mean distance of accuracy and confidence, in 0..1."""
    mistakes_found: float | None
    """Probability that a mistake is less confident than a right answer, in 0..1; None without mistakes."""
    bins: tuple[Bin, ...]


def reliability_text(measured: Sequence[Reliability]) -> str:
    """An aligned table.

    Example:
        >>> print(reliability_text([Reliability("one forward", 10.0, 0.5, 0.031, 0.75, ())]))
        prediction   error, %    loss  ECE, %  mistakes found
        one forward     10.00  0.5000    3.10           0.750
    """
    cells = [["prediction", "error, %", "loss", "ECE, %", "mistakes found"]]
    for each in measured:
        found = NOTHING if each.mistakes_found is None else f"{each.mistakes_found:.3f}"
        cells.append([each.name, f"{each.error:.2f}", f"{each.loss:.4f}", f"{100 * each.calibration_error:.2f}", found])
    return aligned(cells, left=1)


def write_reliability(measured: Sequence[Reliability], folder: Path) -> tuple[Path, ...]:
    """Write `reliability.csv`, `.png` and `.svg` into a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "reliability.csv"
    header = ["prediction", "error", "loss", "calibration_error", "mistakes_found", "count", "confidence", "accuracy"]
    rows = [[*astuple(each)[:5], *astuple(each_bin)] for each in measured for each_bin in each.bins]
    write_whole(table, csv_text(header, rows).encode())
    with figure_style():
        return (table, *save(reliability_figure(measured), folder, "reliability"))


def read_reliability(rows: Sequence[Mapping[str, str]]) -> list[Reliability]:
    """The predictions of a `reliability.csv`, from its rows.

    Raises:
        KeyError, ValueError: if a column is missing, or is no number.
    """
    measured: list[Reliability] = []
    for name in dict.fromkeys(row["prediction"] for row in rows):
        own = [row for row in rows if row["prediction"] == name]
        measured.append(
            Reliability(
                name=name,
                error=float(own[0]["error"]),
                loss=float(own[0]["loss"]),
                calibration_error=float(own[0]["calibration_error"]),
                mistakes_found=float(own[0]["mistakes_found"]) if own[0]["mistakes_found"] else None,
                bins=tuple(Bin(int(row["count"]), float(row["confidence"]), float(row["accuracy"])) for row in own),
            )
        )
    return measured


def reliability_figure(measured: Sequence[Reliability]) -> Figure:
    """Accuracy against confidence; inside `figure_style`."""
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
    drawn: list[tuple[Bin, ...]] = []
    for each in measured:
        if each.bins in drawn:  # the same probabilities, ranked by another doubt
            continue
        largest = max(b.count for b in each.bins)
        x, y = [b.confidence for b in each.bins], [b.accuracy for b in each.bins]
        color = SERIES[len(drawn)]
        label = f"{each.name}, ECE {100 * each.calibration_error:.2f} %"
        axes.plot(x, y, color=color, linewidth=1, label=label)
        axes.scatter(x, y, s=[4 + 60 * b.count / largest for b in each.bins], color=color)
        drawn.append(each.bins)
    axes.set_xlabel("confidence (larger dots: more images)")
    axes.set_ylabel("share of right answers")
    legend(figure, [(line, str(line.get_label())) for line in axes.get_lines()])
    return figure
