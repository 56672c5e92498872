"""What `evaluate --subnetworks` and `--monte-carlo` left in a run folder, for its report."""

import csv
from collections.abc import Sequence
from pathlib import Path

from stochastic_depth_lab.report.figures import Drawing
from stochastic_depth_lab.report.reliability import read_reliability, reliability_figure
from stochastic_depth_lab.report.runs import ReportError, Run
from stochastic_depth_lab.report.subnetwork_curve import curve_figure, read_curve

FOLDER = "evaluation"


def evaluation_tables(runs: Sequence[Run]) -> list[Path]:
    """The tables in the run folder of a single run: several would not be told apart by their columns."""
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
                figure, title = curve_figure(read_curve(rows)), "Sub-networks"
                caption = (
                    "Test error of networks from which blocks were removed, and what is left of the whole network."
                )
            else:
                figure, title = reliability_figure(read_reliability(rows)), "Calibration"
                caption = (
                    "How often an answer is right, against how sure the network is. ECE: expected calibration error."
                )
        except (ValueError, KeyError, IndexError) as error:
            raise ReportError(f"{table} is damaged ({type(error).__name__}): evaluate writes it anew") from None
        drawings.append(Drawing(table.stem, table.stem, title, caption, figure))
    return tuple(drawings)
