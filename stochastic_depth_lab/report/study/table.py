"""The table of a study: as text of a given width, as cells for the page, and as CSV of all runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stochastic_depth_lab.experiments.config import Study
from stochastic_depth_lab.report.study.rows import Seeds, short_titles
from stochastic_depth_lab.report.table import NOTHING, fitted, records_csv


@dataclass(frozen=True)
class _Column:
    """A column of the table. `short` is its head in two lines of plain text."""

    name: str
    short: tuple[str, str]
    form: Callable[[Seeds], str]


_COLUMNS = (
    _Column(
        "paper, test error, %",
        ("paper", "%"),
        lambda row: f"{row.published.test_error:.2f}" if row.published else NOTHING,
    ),
    _Column("ours, test error, %", ("test error", "%"), lambda row: _mean_std(row.test_errors, ".2f")),
    _Column(
        "the same at the lowest validation error, %",
        ("at best", "val., %"),
        lambda row: f"{statistics.mean(run.test_error for run in row.runs):.2f}" if row.few else NOTHING,
    ),
    _Column("seeds", ("", "n"), lambda row: str(len(row.runs))),
    _Column(
        "paper, training time (h:m:s)",
        ("paper", "h:m:s"),
        lambda row: _duration(3600 * row.published.train_h) if row.published and row.published.train_h else NOTHING,
    ),
    _Column(
        "process time of training, s",
        ("process", "time, s"),
        lambda row: f"{statistics.mean(row.measured(run, 'process_s') for run in row.runs):,.1f}",
    ),
    _Column(
        "share of constant depth's time",
        ("share", "of time"),
        lambda row: f"{statistics.mean(row.time_shares):.3f}" if row.time_shares else NOTHING,
    ),
    _Column(
        "share of the training FLOPs",
        ("", "FLOPs"),
        lambda row: f"{statistics.mean(r.realized_cost for r in row.runs):.3f}",
    ),
    _Column(
        "expected depth / realized depth, blocks",
        ("depth, exp.", "/ realized"),
        lambda row: f"{row.runs[0].expected_depth:.2f} / {statistics.mean(run.realized_depth for run in row.runs):.2f}",
    ),
)


_VALIDATION = _Column(
    "validation error, %",
    ("validation", "error, %"),
    lambda row: _mean_std([run.epochs[-1].validation_error for run in row.runs], ".2f"),
)


_GRADIENT = _Column(
    "mean gradient of the first convolution after the rate drops",
    ("late", "gradient"),
    lambda row: _mean_std([run.late_gradient for run in row.runs], ".5f"),
)


_LOSS = _Column(
    "training loss of the last epoch",
    ("training", "loss"),
    lambda row: f"{statistics.mean(run.epochs[-1].train_loss for run in row.runs):.4f}",
)


def _columns(study: Study) -> list[_Column]:
    columns = list(_COLUMNS)
    if "rates" in study.figures:
        columns.insert(1, _VALIDATION)
    if "gradient" in study.figures:
        columns = [*columns[:3], _GRADIENT, *columns[3:]]
    if {"curves", "crossing", "depth_curve"} & {*study.figures} and "gap" not in study.figures:
        columns = [*columns[:3], _LOSS, *columns[3:]]
    if "gap" in study.figures:  # the demo's table must fit into 80 columns
        columns = [column for column in columns if column.name != "share of constant depth's time"]
    return columns


def cells_of(
    study: Study,
    rows: Sequence[Seeds],
    others: Mapping[str, tuple[float, ...]],
    head: Callable[[_Column], str],
    title: Callable[[Seeds], str] = lambda row: row.experiment.title,
) -> list[list[str]]:
    """Head and rows, without empty columns."""
    columns = _columns(study)
    body = [[title(row), *(column.form(row) for column in columns)] for row in rows]
    for name, errors in others.items():
        known = {"ours, test error, %": _mean_std(errors, ".2f"), "seeds": str(len(errors))}
        body.append([name, *(known.get(column.name, NOTHING) for column in columns)])
    table = [["run", *(head(column) for column in columns)], *body]
    kept = [i for i in range(len(table[0])) if any(row[i] != NOTHING for row in body)]
    return [[row[i] for i in kept] for row in table]


def table_text(study: Study, rows: Sequence[Seeds], others: Mapping[str, tuple[float, ...]], width: int) -> str:
    """The table as text."""
    short = short_titles(rows)
    above, *_ = cells_of(study, rows, others, lambda column: column.short[0], lambda row: short[row.experiment.name])
    cells = cells_of(study, rows, others, lambda column: column.short[1], lambda row: short[row.experiment.name])
    return fitted([["", *above[1:]], ["", *cells[0][1:]], *cells[1:]], width, least=width // 2)


def runs_csv(rows: Sequence[Seeds], others: Mapping[str, tuple[float, ...]]) -> str:
    """One line per run, numbers at full precision."""
    records: list[dict[str, object]] = [
        {
            "experiment": row.experiment.name,
            "seed": run.config["seed"],
            "dataset": row.experiment.data.dataset,
            "images_per_class": row.experiment.data.images_per_class,
            "num_layers": row.experiment.model.num_layers,
            "schedule": row.experiment.depth and row.experiment.depth.schedule,
            "final_survival_prob": row.experiment.depth and row.experiment.depth.final_survival_prob,
            "learning_rate": row.experiment.recipe.learning_rate,
            "num_steps": run.num_steps,
            "test_error": row.measured(run, "test_error"),
            "test_error_at_best_validation": run.test_error,
            "validation_error": run.epochs[-1].validation_error if row.few else run.validation_error,
            "train_loss": run.epochs[-1].train_loss,
            "published_test_error": row.published and row.published.test_error,
            "train_s": run.train_s,
            "process_s": run.process_s,
            "expected_cost": run.expected_cost,
            "realized_cost": run.realized_cost,
            "expected_depth": run.expected_depth,
            "realized_depth": run.realized_depth,
            "first_conv_grad": run.first_conv_grad,
            "late_gradient": run.late_gradient,
        }
        for row in rows
        for run in row.runs
    ]
    records.extend({"experiment": name, "test_error": error} for name, errors in others.items() for error in errors)
    return records_csv(records)


def _mean_std(values: Sequence[float], form: str) -> str:
    if not values:
        return NOTHING
    mean = format(statistics.mean(values), form)
    return f"{mean} \N{PLUS-MINUS SIGN} {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
