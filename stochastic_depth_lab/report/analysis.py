"""What a network learnt, block by block: text and figure of what `stochastic-depth evaluate --analyse` found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stochastic_depth_lab.report.figures import Drawing, whole_numbers
from stochastic_depth_lab.report.reliability import Bin, Reliability
from stochastic_depth_lab.report.runs import ReportError, Run, labels
from stochastic_depth_lab.report.table import csv_text
from stochastic_depth_lab.report.theme import MUTED, SERIES

FILE_NAME = "analysis.json"


@dataclass(frozen=True)
class Analysis:
    """What was found on some test images, by the test-time rule."""

    names: tuple[str, ...]
    """Of the residual blocks."""
    branch_shares: tuple[float, ...]
    """Per block: mean |branch| / mean |shortcut|, as they enter the sum."""
    lesion_errors: tuple[float, ...]
    """Per block: error in percent when it alone is closed."""
    reliability: Reliability
    """Of the whole network."""
    num_images: int


def read_analysis(folder: Path) -> Analysis | None:
    """What was found of a run, or None if nobody has looked.

    Raises:
        ReportError: if the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        fields: Mapping[str, Any] = json.loads(path.read_bytes())
        measured: dict[str, Any] = {**fields["reliability"]}
        measured["bins"] = tuple(Bin(**each) for each in measured["bins"])
        return Analysis(
            names=tuple(fields["names"]),
            branch_shares=tuple(map(float, fields["branch_shares"])),
            lesion_errors=tuple(map(float, fields["lesion_errors"])),
            reliability=Reliability(**measured),
            num_images=int(fields["num_images"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is damaged ({type(error).__name__}): evaluate --analyse writes it anew") from None


def analysis_text(analysis: Analysis) -> str:
    """A line per block, the network's own below."""
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
    """A figure for each run that was analysed; inside `figure_style`."""
    return tuple(
        Drawing(
            f"learnt-{number}",
            "analysis",
            f"What the blocks learnt: {label}",
            f"On {analysis.num_images:,} test images. What each branch adds to its shortcut, as it enters the sum; the "
            "error when that block alone is closed at test time; how often the answer is right, against how sure the "
            "network is.",
            _figure(analysis),
        )
        for number, (label, analysis) in enumerate(_analysed(runs), start=1)
    )


def analysis_csv(runs: Sequence[Run]) -> str:
    """One line per run and block of the runs that were analysed."""
    return csv_text(
        ["run", "block", "name", "branch_share", "lesion_error", "test_error", "calibration_error"],
        [
            [label, number, name, share, error, analysis.reliability.error, analysis.reliability.calibration_error]
            for label, analysis in _analysed(runs)
            for number, (name, share, error) in enumerate(
                zip(analysis.names, analysis.branch_shares, analysis.lesion_errors, strict=True), start=1
            )
        ],
    )


def _analysed(runs: Sequence[Run]) -> list[tuple[str, Analysis]]:
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
