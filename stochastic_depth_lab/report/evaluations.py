"""Reads the output of `evaluate` for the report: an analysis of the blocks, subnetworks, and calibration."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from stochastic_depth_lab.errors import ReportError
from stochastic_depth_lab.files import from_json
from stochastic_depth_lab.report.figures import Drawing, whole_numbers
from stochastic_depth_lab.report.reliability import Reliability, read_reliability, reliability_figure
from stochastic_depth_lab.report.runs import Run, labels
from stochastic_depth_lab.report.subnetwork_curve import curve_figure, read_curve
from stochastic_depth_lab.report.table import csv_text
from stochastic_depth_lab.report.theme import MUTED, SERIES

ANALYSIS = "analysis.json"
FOLDER = "evaluation"


@dataclass(frozen=True)
class Analysis:
    """Measurements of the blocks on some test images, by the test-time rule."""

    names: tuple[str, ...]
    """Names of the residual blocks."""
    branch_shares: tuple[float, ...]
    """Per block: mean |branch| / mean |shortcut|, as they enter the sum."""
    lesion_errors: tuple[float, ...]
    """Per block: error in percent when it alone is closed."""
    reliability: Reliability
    """Of the whole network."""
    num_images: int


def read_analysis(folder: Path) -> Analysis | None:
    """The analysis of a run, or None if there is none.

    Raises:
        ReportError: if the file is damaged.
    """
    path = folder / ANALYSIS
    if not path.exists():
        return None
    try:
        return from_json(Analysis, path.read_bytes())
    except ValueError as error:
        raise ReportError(f"{path} is damaged ({error}): evaluate --analyze writes it again") from None


def analysis_text(analysis: Analysis) -> str:
    """A line per block, and one for the whole network."""
    width = max(len("block"), *map(len, analysis.names))
    lines = [f"{'block':<{width}}  |branch|/|shortcut|  error when closed, %"]
    lines += [
        f"{name:<{width}}  {share:>19.3f}  {error:>20.2f}"
        for name, share, error in zip(analysis.names, analysis.branch_shares, analysis.lesion_errors, strict=True)
    ]
    whole = analysis.reliability
    lines.append(
        f"whole network: error {whole.error:.2f} %, expected calibration error {100 * whole.calibration_error:.2f} %, "
        f"on {analysis.num_images:,} test images"
    )
    return "\n".join(lines)


def analysis_drawings(runs: Sequence[Run]) -> tuple[Drawing, ...]:
    """A figure for each analyzed run; inside `figure_style`."""
    return tuple(
        Drawing(
            f"blocks-{number}",
            "analysis",
            f"What the blocks do: {label}",
            f"On {analysis.num_images:,} test images: the size of each branch relative to its shortcut; the error with "
            "only that block closed at test time; accuracy against confidence.",
            _figure(analysis),
        )
        for number, (label, analysis) in enumerate(_analyzed(runs), start=1)
    )


def analysis_csv(runs: Sequence[Run]) -> str:
    """One line per block of each analyzed run."""
    return csv_text(
        ["run", "block", "name", "branch_share", "lesion_error", "test_error", "calibration_error"],
        [
            [label, number, name, share, error, analysis.reliability.error, analysis.reliability.calibration_error]
            for label, analysis in _analyzed(runs)
            for number, (name, share, error) in enumerate(
                zip(analysis.names, analysis.branch_shares, analysis.lesion_errors, strict=True), start=1
            )
        ],
    )


def evaluation_tables(runs: Sequence[Run]) -> list[Path]:
    """The tables of a single run; those of several runs would look the same."""
    if len(runs) != 1:
        return []
    tables = [runs[0].folder / FOLDER / f"{name}.csv" for name in ("subnetworks", "reliability")]
    return [table for table in tables if table.exists()]


def evaluation_drawings(runs: Sequence[Run]) -> tuple[Drawing, ...]:
    """A figure for each table; inside `figure_style`.

    Raises:
        ReportError: if a table is damaged.
    """
    drawings: list[Drawing] = []
    for table in evaluation_tables(runs):
        try:
            with table.open(newline="") as file:
                rows = list(csv.DictReader(file))
            if table.stem == "subnetworks":
                figure, title = curve_figure(read_curve(rows)), "Subnetworks"
                caption = "Test error of networks from which blocks were removed, over their relative size."
            else:
                figure, title = reliability_figure(read_reliability(rows)), "Calibration"
                caption = "Accuracy against confidence. ECE: expected calibration error."
        except (ValueError, KeyError, IndexError) as error:
            raise ReportError(f"{table} is damaged ({type(error).__name__}): evaluate writes it again") from None
        drawings.append(Drawing(table.stem, table.stem, title, caption, figure))
    return tuple(drawings)


def _analyzed(runs: Sequence[Run]) -> list[tuple[str, Analysis]]:
    named = zip(labels(runs), runs, strict=True)
    return [(label, analysis) for label, run in named if (analysis := read_analysis(run.folder))]


def _figure(analysis: Analysis) -> Figure:
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    ((left, right), (below, counts)) = figure.subplots(2, 2)
    blocks = range(1, len(analysis.names) + 1)
    dots = {"marker": "o", "markersize": 4 if len(blocks) <= 60 else 2}
    left.plot(blocks, analysis.branch_shares, color=SERIES[1], **dots)
    left.set_ylim(bottom=0)
    left.set_title("mean |branch| / mean |shortcut|")
    right.axhline(analysis.reliability.error, color=MUTED, linewidth=1.2, linestyle="--")
    right.plot(blocks, analysis.lesion_errors, color=SERIES[0], linestyle="", **dots)
    right.set_title("error with this block closed, % (dashed: all open)")
    for axes in (left, right):
        axes.xaxis.set_major_locator(whole_numbers())
        axes.set_xlabel("block, from the input")
    below.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle="--")
    bins = analysis.reliability.bins
    below.plot([b.confidence for b in bins], [b.accuracy for b in bins], color=SERIES[2], marker="o", markersize=4)
    below.set_xlim(0, 1)
    below.set_ylim(0, 1)
    below.set_xlabel("confidence")
    below.set_title(f"accuracy; calibration error {100 * analysis.reliability.calibration_error:.2f} %")
    counts.bar([b.confidence for b in bins], [b.count for b in bins], width=0.05, color=SERIES[2])
    counts.set_xlim(0, 1)
    counts.set_xlabel("confidence")
    counts.set_title(f"images, of {analysis.num_images:,}")
    return figure
