"""Table and figure of subnetworks: error against parameters, FLOPs and latency."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.report.figures import legend, save
from stochastic_depth_lab.report.runs import printable
from stochastic_depth_lab.report.table import aligned, csv_text
from stochastic_depth_lab.report.theme import SERIES, figure_style


@dataclass(frozen=True)
class Point:
    """One subnetwork of a run."""

    run: str
    """Name of the experiment."""
    num_blocks: int
    """Number of remaining residual blocks."""
    num_parameters: int
    flops: int
    """Of a forward pass of one image; a multiply-add counts as two."""
    latency_ms: float
    """Of a forward pass of one image."""
    error: float
    """Test error in percent, with the BatchNorm statistics of the whole network."""
    recalibrated_error: float
    """The same with its own BatchNorm statistics."""
    finetuned_error: float | None = None
    """The same after fine-tuning. None: not fine-tuned."""


def curve_text(points: Sequence[Point]) -> str:
    """An aligned table for each run, one line per number of blocks; errors in percent.

    Example:
        >>> print(curve_text([Point("a", 2, 50, 500, 1.25, 12.5, 10.0), Point("a", 4, 100, 1000, 2.5, 5.0, 5.0)]))
        a
        blocks  parameters  FLOPs    ms  error  recalibrated
             4       100 %  100 %  2.50   5.00          5.00
             2        50 %   50 %  1.25  12.50         10.00
    """
    errors = ["error", "recalibrated"] + ["fine-tuned"] * any(point.finetuned_error is not None for point in points)
    whole = max(points, key=lambda point: point.num_blocks)
    tables: list[str] = []
    for run in dict.fromkeys(point.run for point in points):
        cells = [["blocks", "parameters", "FLOPs", "ms", *errors]]
        for point in sorted((point for point in points if point.run == run), key=lambda point: -point.num_blocks):
            shares = point.num_parameters / whole.num_parameters, point.flops / whole.flops
            values = (point.latency_ms, point.error, point.recalibrated_error, point.finetuned_error)
            numbers = ["" if value is None else f"{value:.2f}" for value in values][: 1 + len(errors)]
            cells.append([str(point.num_blocks), *(f"{100 * share:.0f} %" for share in shares), *numbers])
        tables.append(f"{printable(run)}\n{aligned(cells)}")
    return "\n\n".join(tables)


def write_curve(points: Sequence[Point], folder: Path) -> tuple[Path, ...]:
    """Write `subnetworks.csv`, `.png` and `.svg` into a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "subnetworks.csv"
    fields = list(Point.__dataclass_fields__)
    write_whole(table, csv_text(fields, [list(asdict(point).values()) for point in points]).encode())
    with figure_style():
        return (table, *save(curve_figure(points), folder, "subnetworks"))


def read_curve(rows: Sequence[Mapping[str, str]]) -> list[Point]:
    """The points of a `subnetworks.csv`, from its rows.

    Raises:
        KeyError, ValueError: if a column is missing, or is no number.
    """
    return [
        Point(
            run=row["run"],
            num_blocks=int(row["num_blocks"]),
            num_parameters=int(row["num_parameters"]),
            flops=int(row["flops"]),
            latency_ms=float(row["latency_ms"]),
            error=float(row["error"]),
            recalibrated_error=float(row["recalibrated_error"]),
            finetuned_error=float(row["finetuned_error"]) if row["finetuned_error"] else None,
        )
        for row in rows
    ]


def curve_figure(points: Sequence[Point]) -> Figure:
    """Error against parameters, FLOPs and latency; inside `figure_style`."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    whole = max(points, key=lambda point: point.num_blocks)
    labels = ("parameters, share of the whole", "FLOPs, share of the whole", "latency of one image, ms")
    for number, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        for color, run in zip(SERIES, dict.fromkeys(point.run for point in points), strict=False):
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
                    axes.plot(x, errors, style, color=color, markersize=3, label=f"{run}{suffix}")
        axes.set_xlabel(label)
    panels[0].set_ylabel("test error, %")
    panels[0].set_ylim(bottom=0)
    legend(figure, [(handle, str(handle.get_label())) for handle in panels[-1].get_lines()])
    return figure
