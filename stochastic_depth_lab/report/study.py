"""A table or figure of the paper with ours beside it: several seeds of each run, mean and standard deviation."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stochastic_depth_lab.atomic import write_whole
from stochastic_depth_lab.config import Experiment, Published, Study
from stochastic_depth_lab.report.figures import Drawing, curves, epochs_csv, gradient, save
from stochastic_depth_lab.report.page import html_page, link_to_page
from stochastic_depth_lab.report.runs import ReportError, Run, read_run
from stochastic_depth_lab.report.study_figures import heat_map, survival_curve
from stochastic_depth_lab.report.table import NOTHING, csv_text, sortable_table, time_share
from stochastic_depth_lab.report.theme import figure_style


@dataclass(frozen=True)
class Seeds:
    """The runs of one experiment that differ in nothing but the seed: a row of the table."""

    experiment: Experiment
    published: Published | None
    runs: tuple[Run, ...]
    time_shares: tuple[float, ...]
    """Training time per epoch as a share of constant depth's, of the runs that have something to be compared with."""

    @property
    def test_errors(self) -> tuple[float, ...]:
        """In percent, at the lowest validation error."""
        return tuple(run.test_error for run in self.runs)


@dataclass(frozen=True)
class StudyReport:
    """What `write_study` wrote."""

    page: Path
    text: str
    """The table."""


def write_study(study: Study, folders: Sequence[tuple[Experiment, Path]], out: Path) -> StudyReport:
    """Write `NAME.html`, which leads to a page of each run, and under `NAME/` its figures and data.

    Args:
        study: what is shown.
        folders: every experiment, one for each seed, in the order of the table, with its run folder. A run that is
            missing or unfinished is left out, and the page says so.
        out: where to write.

    Raises:
        ReportError: if there is no finished run at all.
    """
    seeds, remarks = _read(study, folders)
    runs = [run for row in seeds for run in row.runs]
    if not runs:
        raise ReportError(f"{study.name}: none of its {len(folders)} runs is finished, there is nothing to show")
    inner = out / study.name
    with figure_style():
        figures = [figure for name in study.figures for figure in _DRAWINGS[name]([row for row in seeds if row.runs])]
        for figure in figures:
            save(figure.figure, inner / "figures", figure.name)
        (inner / "data").mkdir(exist_ok=True, parents=True)
        write_whole(inner / "data" / "runs.csv", _runs_csv(seeds).encode())
        write_whole(inner / "data" / "epochs.csv", epochs_csv(runs).encode())
        page = out / f"{study.name}.html"
        lead = f"{study.claim} {_said(seeds)}".strip()
        links = [{f"seed {run.config['seed']}": link_to_page(run.folder, out) for run in row.runs} for row in seeds]
        table = sortable_table(_cells(seeds), links)
        files = f"{study.name}/"
        write_whole(page, html_page(study.title, lead, table, remarks, figures, runs, files).encode())
    return StudyReport(page, "\n".join([study.title, "", _text(seeds), *remarks]))


def _read(study: Study, folders: Sequence[tuple[Experiment, Path]]) -> tuple[list[Seeds], list[str]]:
    found: dict[str, tuple[Experiment, list[Run]]] = {}
    remarks: list[str] = []
    for experiment, folder in folders:
        _, runs = found.setdefault(experiment.name, (experiment, []))
        if (folder / "result.json").exists():
            runs.append(read_run(folder))
        else:
            ending = "failed, see its failed.json" if (folder / "failed.json").exists() else "is not finished"
            remarks.append(f"{experiment.name}, seed {experiment.seed}: {ending}")
    everything = [run for _, runs in found.values() for run in runs]
    seeds = [
        Seeds(
            experiment,
            study.published(name),
            tuple(runs),
            tuple(share for run in runs if (share := time_share(run, everything)) is not None),
        )
        for name, (experiment, runs) in found.items()
    ]
    if any(row.published and row.experiment.published is None for row in seeds):
        remarks.insert(0, "The paper's numbers are those of the full networks and recipes, ours of the small forms.")
    if any(len(row.time_shares) for row in seeds):
        remarks.append("Times are wall-clock: they compare only where the machine had nothing else to do.")
    return seeds, remarks


def _said(seeds: Sequence[Seeds]) -> str:
    counts = {len(row.runs) for row in seeds if row.runs}
    if counts == {1}:
        return "Ours: one seed of each."
    number = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Ours: mean and standard deviation over {number} seeds of each."


_COLUMNS: tuple[tuple[str, Callable[[Seeds], str]], ...] = (
    ("run", lambda row: row.experiment.title),
    ("paper, test error, %", lambda row: f"{row.published.test_error:.2f}" if row.published else NOTHING),
    ("ours, test error, %", lambda row: _mean_std(row.test_errors, ".2f")),
    ("seeds", lambda row: str(len(row.runs))),
    (
        "paper, training time (h:m:s)",
        lambda row: _duration(3600 * row.published.train_h) if row.published and row.published.train_h else NOTHING,
    ),
    (
        "ours, training time (h:m:s)",
        lambda row: _duration(statistics.mean(run.train_s for run in row.runs)) if row.runs else NOTHING,
    ),
    ("share of constant depth's time", lambda row: _mean_std(row.time_shares, ".3f")),
    ("expected share", lambda row: f"{row.runs[0].expected_cost:.3f}" if row.runs else NOTHING),
)


def _cells(seeds: Sequence[Seeds]) -> list[list[str]]:
    """Head and rows; a column that says nothing is left out."""
    table = [[name for name, _ in _COLUMNS], *([form(row) for _, form in _COLUMNS] for row in seeds)]
    kept = [i for i in range(len(_COLUMNS)) if any(row[i] != NOTHING for row in table[1:])]
    return [[row[i] for i in kept] for row in table]


def _text(seeds: Sequence[Seeds]) -> str:
    cells = _cells(seeds)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    )


def _runs_csv(seeds: Sequence[Seeds]) -> str:
    """One line per run, numbers at full precision."""
    return csv_text(
        ["experiment", "seed", "schedule", "final_survival_prob", "num_layers", "test_error", "validation_error",
         "published_test_error", "train_s", "expected_cost", "realised_cost", "first_conv_grad"],
        [
            [
                row.experiment.name,
                run.config["seed"],
                row.experiment.depth and row.experiment.depth.schedule,
                row.experiment.depth and row.experiment.depth.final_survival_prob,
                row.experiment.model.num_layers,
                run.test_error,
                run.validation_error,
                row.published and row.published.test_error,
                run.train_s,
                run.expected_cost,
                run.realised_cost,
                run.first_conv_grad,
            ]
            for row in seeds
            for run in row.runs
        ],
    )  # fmt: skip


def _curves(seeds: Sequence[Seeds]) -> list[Drawing]:
    return _for_each_network(curves, seeds)


def _gradient(seeds: Sequence[Seeds]) -> list[Drawing]:
    return _for_each_network(gradient, seeds)


def _for_each_network(draw: Callable[[Sequence[Run], Sequence[str]], Drawing], seeds: Sequence[Seeds]) -> list[Drawing]:
    """A figure for the rows of each network and data set, which can be compared."""
    groups: dict[tuple[str, int], list[Seeds]] = {}
    for row in seeds:
        groups.setdefault((row.experiment.data.dataset, row.experiment.model.num_layers), []).append(row)
    drawings: list[Drawing] = []
    for (dataset, num_layers), rows in groups.items():
        names = [row.experiment.name for row in rows for _ in row.runs]
        drawing = draw([run for row in rows for run in row.runs], names)
        if len(groups) > 1:
            drawing = replace(
                drawing,
                name=f"{drawing.name}-{dataset}-{num_layers}",
                title=f"{drawing.title}: {dataset}, {num_layers} layers",
            )
        drawings.append(drawing)
    return drawings


def _survival_curve(seeds: Sequence[Seeds]) -> list[Drawing]:
    errors: dict[str, dict[float, Sequence[float]]] = {}
    for row in seeds:
        if depth := row.experiment.depth:
            errors.setdefault(depth.schedule, {})[depth.final_survival_prob] = row.test_errors
    constant_depth = [error for row in seeds if row.experiment.depth is None for error in row.test_errors]
    return [survival_curve(errors, constant_depth)]


def _heat_map(seeds: Sequence[Seeds]) -> list[Drawing]:
    return [
        heat_map(
            {
                (
                    row.experiment.model.num_layers,
                    row.experiment.depth.final_survival_prob if row.experiment.depth else 1.0,
                ): row.test_errors
                for row in seeds
            }
        )
    ]


_DRAWINGS: dict[str, Callable[[Sequence[Seeds]], list[Drawing]]] = {
    "curves": _curves,
    "gradient": _gradient,
    "survival_curve": _survival_curve,
    "heat_map": _heat_map,
}


def _mean_std(values: Sequence[float], form: str) -> str:
    if not values:
        return NOTHING
    mean = format(statistics.mean(values), form)
    return f"{mean} \N{PLUS-MINUS SIGN} {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
