"""Table and figure of sub-networks: error against parameters, FLOPs and latency."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from stochastic_depth_lab.atomic import write_whole
from stochastic_depth_lab.report.figures import save
from stochastic_depth_lab.report.table import csv_text
from stochastic_depth_lab.report.theme import SERIES, figure_style


@dataclass(frozen=True)
class Point:
    """One sub-network of a run."""

    run: str
    """Name of the experiment."""
    num_blocks: int
    """Residual blocks that are left."""
    num_parameters: int
    flops: int
    """Of a forward of one image; a multiply-add counts as two."""
    latency_ms: float
    """Of a forward of one image."""
    error: float
    """Test error in percent, with the BatchNorm statistics of the whole network."""
    recalibrated_error: float
    """The same after BatchNorm statistics were taken anew."""
    finetuned_error: float | None = None
    """The same after it was trained on. None: it was not."""


def curve_text(points: Sequence[Point]) -> str:
    """A table in Markdown, one line per number of blocks, runs side by side.

    Example:
        >>> print(curve_text([Point("a", 2, 50, 500, 1.25, 12.5, 10.0), Point("a", 4, 100, 1000, 2.5, 5.0, 5.0)]))
        | blocks | parameters | FLOPs | ms, a | error, a | recalibrated, a |
        |---|---|---|---|---|---|
        | 4 | 100 % | 100 % | 2.50 | 5.00 | 5.00 |
        | 2 | 50 % | 50 % | 1.25 | 12.50 | 10.00 |
    """
    runs = list(dict.fromkeys(point.run for point in points))
    header = ["blocks", "parameters", "FLOPs"]
    errors = ["error", "recalibrated"] + ["fine-tuned"] * any(point.finetuned_error is not None for point in points)
    header += [f"{what}, {run}" for run in runs for what in ("ms", *errors)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    whole = max(points, key=lambda point: point.num_blocks)
    for num_blocks in sorted({point.num_blocks for point in points}, reverse=True):
        of_run = {point.run: point for point in points if point.num_blocks == num_blocks}
        # Runs that drop other blocks differ here: one number each, in the order of the columns.
        shares = [
            [f"{point.num_parameters / whole.num_parameters:.0%}" for point in of_run.values()],
            [f"{point.flops / whole.flops:.0%}" for point in of_run.values()],
        ]
        cells = [str(num_blocks), *(" / ".join(dict.fromkeys(each)).replace("%", " %") for each in shares)]
        for run in runs:
            point = of_run.get(run)
            values = (point.latency_ms, point.error, point.recalibrated_error, point.finetuned_error) if point else ()
            cells += [f"{value:.2f}" for value in values if value is not None] or [""] * (1 + len(errors))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_curve(points: Sequence[Point], folder: Path) -> tuple[Path, ...]:
    """Write `subnetworks.csv`, `.png` and `.svg` into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "subnetworks.csv"
    fields = list(Point.__dataclass_fields__)
    write_whole(table, csv_text(fields, [list(asdict(point).values()) for point in points]).encode())
    with figure_style():
        return (table, *save(_figure(points), folder, "subnetworks"))


def _figure(points: Sequence[Point]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    whole = max(points, key=lambda point: point.num_blocks)
    labels = ("parameters, share of the whole", "FLOPs, share of the whole", "latency of one image, ms")
    for number, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        for colour, run in zip(SERIES, dict.fromkeys(point.run for point in points), strict=False):
            own = sorted((point for point in points if point.run == run), key=lambda point: point.num_blocks)
            x = [
                (point.num_parameters / whole.num_parameters, point.flops / whole.flops, point.latency_ms)[number]
                for point in own
            ]
            for style, suffix, errors in (
                ("o:", "", [point.error for point in own]),
                ("o-", ", recalibrated", [point.recalibrated_error for point in own]),
                ("o--", ", fine-tuned", [point.finetuned_error for point in own]),
            ):
                if None not in errors:
                    axes.plot(x, errors, style, color=colour, markersize=3, label=f"{run}{suffix}")
        axes.set_xlabel(label)
    panels[0].set_ylabel("test error, %")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(fontsize=7)
    return figure
