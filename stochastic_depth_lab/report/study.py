"""A table or figure of the paper beside ours: several seeds of each run, and a verdict on each claim."""

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from stochastic_depth_lab.errors import ReportError
from stochastic_depth_lab.experiments.config import Comparison, Experiment, Published, Study
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.report.figures import Drawing, curves, epochs_csv, gradient, save
from stochastic_depth_lab.report.page import html_page, link_to_page
from stochastic_depth_lab.report.runs import Run, read_run
from stochastic_depth_lab.report.study_figures import (
    Cell,
    Line,
    crossing,
    depth_curve,
    gap,
    heat_map,
    rates,
    split_by_loss,
    survival_curve,
    threshold,
)
from stochastic_depth_lab.report.table import NOTHING, constant_depth_of, fitted, records_csv, sortable_table
from stochastic_depth_lab.report.theme import figure_style
from stochastic_depth_lab.report.verdicts import RULE, Judged, Paired, judge


@dataclass(frozen=True)
class Seeds:
    """The runs of one experiment, which differ only in the seed: a row of the table."""

    experiment: Experiment
    published: Published | None
    runs: tuple[Run, ...]
    time_shares: tuple[float, ...]
    """Training time per step relative to constant depth, of the runs that have a constant-depth run."""

    @property
    def few(self) -> bool:
        """Whether it trains on few images: then its error is that after the last step, and no epoch is chosen."""
        return self.experiment.data.images_per_class is not None

    @property
    def test_errors(self) -> tuple[float, ...]:
        """In percent: after the last step with few images, else at the lowest validation error."""
        return tuple(self.measured(run, "test_error") for run in self.runs)

    def measured(self, run: Run, measure: str) -> float:
        """A quantity that claims compare, see `Comparison`."""
        match measure:
            case "test_error":
                return run.epochs[-1].test_error if self.few else run.test_error
            case "train_loss":
                return run.epochs[-1].train_loss
            case "process_s":
                return run.train_s if run.process_s is None else run.process_s
            case _:
                return run.late_gradient


@dataclass(frozen=True)
class StudyReport:
    """What `write_study` wrote."""

    page: Path
    text: str
    """The table and the verdicts."""


def write_study(
    study: Study,
    folders: Sequence[tuple[Experiment, Path]],
    out: Path,
    baselines: Mapping[str, Sequence[float]] | None = None,
    *,
    run_pages: bool = True,
    width: int = 80,
) -> StudyReport:
    """Write `NAME.html`, which links to a page of each run, and its figures and data under `NAME/`.

    Args:
        study: the table or figure.
        folders: experiments, one for each seed, in the order of the table, with their run folders. Missing and
            unfinished runs are left out, and the page says so.
        out: output folder.
        baselines: test errors in percent, one per seed, of other methods on the same images.
        run_pages: whether to write pages of the runs, which takes many minutes for hundreds of runs.
        width: characters per line of the text.

    Raises:
        ReportError: if no run is finished.
    """
    seeds, remarks = _read(folders)
    rows = [row for row in seeds if row.runs]
    runs = [run for row in rows for run in row.runs]
    if not runs:
        raise ReportError(f"{study.name}: none of its {len(folders)} runs is finished")
    judged = _verdicts(study, rows)
    found = [*_chosen_rates(study, rows), *_threshold(study, rows)]
    others = {name: tuple(errors) for name, errors in (baselines or {}).items()}
    inner = out / study.name
    with figure_style():
        figures = [figure for name in study.figures for figure in _DRAWINGS[name](rows)]
        for figure in figures:
            save(figure.figure, inner / "figures", figure.name)
        (inner / "data").mkdir(exist_ok=True, parents=True)
        tables = {"runs": _runs_csv(rows, others), "epochs": epochs_csv(runs)}
        if judged:
            tables["verdicts"] = _verdicts_csv(judged)
        for name, text in tables.items():
            write_whole(inner / "data" / f"{name}.csv", text.encode())
        page = out / f"{study.name}.html"
        lead = " ".join(part for part in (study.claim, _seeds_sentence(rows), *found) if part)
        links: list[dict[str, str]] = [{} for _ in rows]
        if run_pages:
            links = [{f"seed {run.config['seed']}": link_to_page(run.folder, out) for run in row.runs} for row in rows]
        cells = _cells(study, rows, others, lambda column: column.name)
        table = sortable_table(cells, links + [{} for _ in others]) + _verdicts_html(judged, rows)
        write_whole(page, html_page(study.title, lead, table, remarks, figures, runs, tables).encode())
    regime = _setting_line(rows)
    text = [*_wrapped(study.title, width), *_wrapped(regime, width), "", _text(study, rows, others, width)]
    for each in judged:
        text += ["", *_verdict_lines(each, rows, width)]
    for sentence in (*found, *remarks):
        text += ["", *_wrapped(sentence, width)] if sentence in found else _wrapped(sentence, width)
    return StudyReport(page, "\n".join(text))


def _read(folders: Sequence[tuple[Experiment, Path]]) -> tuple[list[Seeds], list[str]]:
    found: dict[str, tuple[Experiment, list[Run]]] = {}
    remarks: list[str] = []
    missing: dict[str, list[str]] = {}
    for experiment, folder in folders:
        _, runs = found.setdefault(experiment.name, (experiment, []))
        if (folder / "result.json").exists():
            runs.append(read_run(folder))
        else:
            ending = "failed, see its failed.json" if (folder / "failed.json").exists() else "is not finished"
            missing.setdefault(ending, []).append(f"{experiment.name}, seed {experiment.seed}")
    for ending, names in missing.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        remarks.append(f"{'; '.join(names[:3])}{more}: {ending}")
    everything = [run for _, runs in found.values() for run in runs]
    seeds = [
        Seeds(
            experiment,
            experiment.published,
            tuple(runs),
            tuple(share for run in runs if (share := _time_share(run, everything)) is not None),
        )
        for experiment, runs in found.values()
    ]
    if any(row.few for row in seeds):
        remarks.append("Few images: test errors are from the last step; no images choose an epoch.")
    if any(run.process_s is None for run in everything):
        remarks.append("Times are wall-clock times: compare them only if the machine was otherwise idle.")
    return seeds, remarks


def _time_share(run: Run, runs: Sequence[Run]) -> float | None:
    constant = constant_depth_of(run, runs)
    if constant is None:
        return None
    one, other = run.process_s or run.train_s, constant.process_s or constant.train_s
    return (one / run.num_steps) / (other / constant.num_steps) if other else None


def _verdicts(study: Study, rows: Sequence[Seeds]) -> list[Judged]:
    """The verdict on each claim that these runs can test."""
    judged = [judge(claim, _paired(claim.comparisons, rows)) for claim in study.claims]
    return [each for each in judged if each.paired]


def _paired(comparisons: Sequence[Comparison], rows: Sequence[Seeds]) -> list[Paired]:
    by_name = {row.experiment.name: row for row in rows}
    found: list[Paired] = []
    for comparison in comparisons:
        if comparison.less in by_name and comparison.more in by_name:
            less, more = (
                {run.config["seed"]: by_name[name].measured(run, comparison.measure) for run in by_name[name].runs}
                for name in (comparison.less, comparison.more)
            )
            if common := [seed for seed in less if seed in more]:
                found.append(Paired(comparison, tuple(less[seed] - more[seed] for seed in common)))
    return found


def _seeds_sentence(rows: Sequence[Seeds]) -> str:
    counts = {len(row.runs) for row in rows}
    if counts == {1}:
        return "Ours: one seed of each."
    number = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Ours: mean and standard deviation over {number} seeds of each."


def _setting_line(rows: Sequence[Seeds]) -> str:
    """Number of images and steps, in a line; empty if the rows differ."""
    common = {(row.experiment.data, row.experiment.model.num_layers, row.runs[0].num_steps) for row in rows}
    if len(common) != 1 or not rows[0].few:
        return ""
    data, num_layers, num_steps = common.pop()
    return (
        f"{data.dataset}, {data.images_per_class} training images of each class, {num_layers} layers, "
        f"{num_steps:,} steps; n = {min(len(row.runs) for row in rows)} seeds"
    )


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


def _cells(
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


def _text(study: Study, rows: Sequence[Seeds], others: Mapping[str, tuple[float, ...]], width: int) -> str:
    short = _short_titles(rows)
    above, *_ = _cells(study, rows, others, lambda column: column.short[0], lambda row: short[row.experiment.name])
    cells = _cells(study, rows, others, lambda column: column.short[1], lambda row: short[row.experiment.name])
    return fitted([["", *above[1:]], ["", *cells[0][1:]], *cells[1:]], width, least=width // 2)


def _short_titles(rows: Sequence[Seeds]) -> dict[str, str]:
    """Titles without their common beginning."""
    titles = [row.experiment.title for row in rows]
    parts = [title.split(", ") for title in titles]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    start = shared if len(parts) > 1 else 0
    return {row.experiment.name: ", ".join(each[start:]) for row, each in zip(rows, parts, strict=True)}


_UNITS = {"test_error": " points", "train_loss": "", "process_s": " s", "late_gradient": ""}
_MEASURES = {
    "test_error": "test error",
    "train_loss": "training loss",
    "process_s": "process time",
    "late_gradient": "gradient after the rate drops",
}


def _verdict_lines(judged: Judged, rows: Sequence[Seeds], width: int) -> list[str]:
    """The verdict as plain text."""
    lines = _wrapped(f"{judged.verdict.upper()}: {judged.claim.text}", width)
    for paired in judged.paired:
        lines += _wrapped(f"- {_sentence(paired, rows)}", width, indent="  ")
    return lines


def _sentence(paired: Paired, rows: Sequence[Seeds]) -> str:
    short = _short_titles(rows)
    comparison, n = paired.comparison, len(paired.differences)
    form = ".4f" if comparison.measure in ("train_loss", "late_gradient") else ".2f"
    interval = ""
    if n > 1:
        low, high = paired.mean - paired.half_width, paired.mean + paired.half_width
        interval = f" (95 % interval {low:+{form}} to {high:+{form}})"
    p = (
        f"p = {_p(paired.p)} (paired t), {_p(paired.exact_p)} (exact sign flips)"
        if n > 2
        else "too few seeds for a test"
    )
    return (
        f"{_MEASURES[comparison.measure]}, {short[comparison.less]} minus {short[comparison.more]}: "
        f"{paired.mean:+{form}}{_UNITS[comparison.measure]}{interval}; lower in {paired.num_wins} of {n} seeds; {p}"
    )


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _verdicts_html(judged: Sequence[Judged], rows: Sequence[Seeds]) -> str:
    if not judged:
        return ""
    items = "".join(
        f"<li><strong>{each.verdict}</strong>: {escape(each.claim.text)}<ul>"
        + "".join(f"<li>{escape(_sentence(paired, rows))}</li>" for paired in each.paired)
        + "</ul></li>"
        for each in judged
    )
    return f'<h2>Verdicts</h2>\n<ul class="verdicts">{items}</ul>\n<p>{escape(RULE)}</p>'


def _verdicts_csv(judged: Sequence[Judged]) -> str:
    rows = [
        {
            "claim": each.claim.text,
            "verdict": each.verdict,
            "less": paired.comparison.less,
            "more": paired.comparison.more,
            "measure": paired.comparison.measure,
            "seeds": len(paired.differences),
            "mean_difference": paired.mean,
            "half_width_95": paired.half_width if len(paired.differences) > 1 else None,
            "num_lower": paired.num_wins,
            "p_paired_t": paired.p,
            "p_exact_sign_flip": paired.exact_p,
        }
        for each in judged
        for paired in each.paired
    ]
    return records_csv(rows)


def _runs_csv(rows: Sequence[Seeds], others: Mapping[str, tuple[float, ...]]) -> str:
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


def _gap(rows: Sequence[Seeds]) -> list[Drawing]:
    lines = [
        Line(
            "stochastic depth" if row.experiment.depth else "constant depth",
            {int(str(run.config["seed"])): _over_steps(run) for run in row.runs},
            stochastic=row.experiment.depth is not None,
        )
        for row in rows
    ]
    return [gap(lines)]


def _over_steps(run: Run) -> tuple[list[int], list[float]]:
    steps: list[int] = []
    for epoch in run.epochs:
        steps.append(epoch.num_steps + (steps[-1] if steps else 0))
    return steps, [epoch.test_error for epoch in run.epochs]


def _curves(rows: Sequence[Seeds]) -> list[Drawing]:
    return _for_each_network(curves, rows)


def _gradient(rows: Sequence[Seeds]) -> list[Drawing]:
    return _for_each_network(gradient, rows)


def _for_each_network(draw: Callable[[Sequence[Run], Sequence[str]], Drawing], rows: Sequence[Seeds]) -> list[Drawing]:
    """A figure for each network and data set, whose rows can be compared."""
    groups: dict[tuple[str, int], list[Seeds]] = {}
    for row in rows:
        groups.setdefault((row.experiment.data.dataset, row.experiment.model.num_layers), []).append(row)
    drawings: list[Drawing] = []
    for (dataset, num_layers), group in groups.items():
        names = [row.experiment.name for row in group for _ in row.runs]
        drawing = draw([run for row in group for run in row.runs], names)
        if len(groups) > 1:
            drawing = replace(
                drawing,
                name=f"{drawing.name}-{dataset}-{num_layers}",
                title=f"{drawing.title}: {dataset}, {num_layers} layers",
            )
        drawings.append(drawing)
    return drawings


def _survival_curve(rows: Sequence[Seeds]) -> list[Drawing]:
    errors: dict[str, dict[float, Sequence[float]]] = {}
    for row in rows:
        if depth := row.experiment.depth:
            errors.setdefault(depth.schedule, {})[depth.final_survival_prob] = row.test_errors
    constant_depth = [error for row in rows if row.experiment.depth is None for error in row.test_errors]
    return [survival_curve(errors, constant_depth)]


def _heat_map(rows: Sequence[Seeds]) -> list[Drawing]:
    return [
        heat_map(
            {
                (
                    row.experiment.model.num_layers,
                    row.experiment.depth.final_survival_prob if row.experiment.depth else 1.0,
                ): row.test_errors
                for row in rows
            }
        )
    ]


def _depth_curve(rows: Sequence[Seeds]) -> list[Drawing]:
    errors: dict[bool, dict[int, Sequence[float]]] = {}
    for row in rows:
        errors.setdefault(row.experiment.depth is not None, {})[row.experiment.model.num_layers] = row.test_errors
    return [depth_curve(errors)]


def _rates(rows: Sequence[Seeds]) -> list[Drawing]:
    errors: dict[bool, dict[float, Sequence[float]]] = {}
    for row in rows:
        by_rate = errors.setdefault(row.experiment.depth is not None, {})
        by_rate[row.experiment.recipe.learning_rate] = [run.epochs[-1].validation_error for run in row.runs]
    return [rates(errors)]


def _chosen_rates(study: Study, rows: Sequence[Seeds]) -> list[str]:
    """The learning rates that tuning chooses."""
    if "rates" not in study.figures:
        return []
    best: list[str] = []
    for stochastic, name in ((False, "constant depth"), (True, "stochastic depth")):
        own = [row for row in rows if (row.experiment.depth is not None) == stochastic]
        common = set[object].intersection(*({run.config["seed"] for run in row.runs} for row in own)) if own else set()
        if common:
            means = {
                row.experiment.recipe.learning_rate: statistics.mean(
                    run.epochs[-1].validation_error for run in row.runs if run.config["seed"] in common
                )
                for row in own
            }
            best.append(f"{name} {min(means, key=means.__getitem__)} (n = {len(common)})")
    return [f"Chosen by the mean validation error: {', '.join(best)}."]


def _cells_by_dataset(rows: Sequence[Seeds]) -> dict[str, list[Cell]]:
    """By data set, the pairs at every length of training and number of images."""
    groups: dict[tuple[str, int, int], dict[bool, Seeds]] = {}
    for row in rows:
        data = row.experiment.data
        key = data.dataset, 10 * (data.images_per_class or 0), row.runs[0].num_steps
        groups.setdefault(key, {})[row.experiment.depth is not None] = row
    cells: dict[str, list[Cell]] = {}
    for (dataset, num_images, num_steps), pair in groups.items():
        if len(pair) == 2:
            constant, stochastic = (
                {run.config["seed"]: pair[kind].measured(run, "test_error") for run in pair[kind].runs}
                for kind in (False, True)
            )
            if differences := [stochastic[seed] - constant[seed] for seed in constant if seed in stochastic]:
                losses = [run.epochs[-1].train_loss for run in pair[False].runs]
                cells.setdefault(dataset, []).append(
                    Cell(num_images, num_steps, tuple(differences), statistics.mean(losses))
                )
    return cells


def _crossing(rows: Sequence[Seeds]) -> list[Drawing]:
    return [
        draw(dataset, cells) for dataset, cells in _cells_by_dataset(rows).items() for draw in (crossing, threshold)
    ]


def _threshold(study: Study, rows: Sequence[Seeds]) -> list[str]:
    """The rule of thumb: the training loss of constant depth below which stochastic depth is better."""
    if "crossing" not in study.figures:
        return []
    sentences: list[str] = []
    for dataset, cells in _cells_by_dataset(rows).items():
        loss = split_by_loss(cells)
        below, above = ([c for c in cells if (c.train_loss < loss) == side] for side in (True, False))
        sentences.append(
            f"{dataset}: stochastic depth has the lower mean error in {sum(c.mean < 0 for c in below)} of "
            f"{len(below)} settings in which the training loss of constant depth ends below {loss:.2g}, and in "
            f"{sum(c.mean < 0 for c in above)} of {len(above)} others."
        )
    return sentences


_DRAWINGS: dict[str, Callable[[Sequence[Seeds]], list[Drawing]]] = {
    "gap": _gap,
    "curves": _curves,
    "gradient": _gradient,
    "survival_curve": _survival_curve,
    "heat_map": _heat_map,
    "depth_curve": _depth_curve,
    "rates": _rates,
    "crossing": _crossing,
}


def _mean_std(values: Sequence[float], form: str) -> str:
    if not values:
        return NOTHING
    mean = format(statistics.mean(values), form)
    return f"{mean} \N{PLUS-MINUS SIGN} {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most 100 characters, on a wide terminal too."""
    return textwrap.wrap(text, min(width, 100), initial_indent=indent, subsequent_indent=indent + "  " * bool(indent))
