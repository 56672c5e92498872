"""Which figures a study draws of its rows, and what it reads off them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from stochastic_depth_lab.experiments.config import Study
from stochastic_depth_lab.report.figures import Drawing, curves, gradient
from stochastic_depth_lab.report.runs import Run
from stochastic_depth_lab.report.study.figures import (
    Cell,
    Line,
    crossing,
    depth_curve,
    gap,
    heat_map,
    rates,
    survival_curve,
)
from stochastic_depth_lab.report.study.rows import Seeds
from stochastic_depth_lab.report.study.rule_of_thumb import rule_of_thumb, sentences


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
    return _for_each_setting(lambda group: curves(*_runs_and_names(group)), rows)


def _gradient(rows: Sequence[Seeds]) -> list[Drawing]:
    return _for_each_setting(lambda group: gradient(*_runs_and_names(group)), rows)


def _runs_and_names(rows: Sequence[Seeds]) -> tuple[list[Run], list[str]]:
    return [run for row in rows for run in row.runs], [row.experiment.name for row in rows for _ in row.runs]


def _by_setting(rows: Sequence[Seeds]) -> dict[tuple[str | int, ...], list[Seeds]]:
    """Rows that can be compared: by data set and number of layers, and by steps if these differ in one of them."""
    steps: dict[tuple[str | int, ...], set[int]] = {}
    for row in rows:
        steps.setdefault(_network(row), set()).add(row.runs[0].num_steps)
    groups: dict[tuple[str | int, ...], list[Seeds]] = {}
    for row in rows:
        network = _network(row)
        key = network if len(steps[network]) == 1 else (*network, row.runs[0].num_steps)
        groups.setdefault(key, []).append(row)
    return groups


def _network(row: Seeds) -> tuple[str | int, ...]:
    return row.experiment.data.dataset, row.experiment.model.num_layers


def _in_words(layers_and_steps: Sequence[str | int]) -> str:
    units = ("layers", "steps")[: len(layers_and_steps)]
    return ", ".join(f"{number:,} {unit}" for number, unit in zip(layers_and_steps, units, strict=True))


def _for_each_setting(draw: Callable[[Sequence[Seeds]], Drawing], rows: Sequence[Seeds]) -> list[Drawing]:
    """A figure for each setting."""
    groups = _by_setting(rows)
    drawings: list[Drawing] = []
    for (dataset, *numbers), group in groups.items():
        drawing = draw(group)
        if len(groups) > 1:
            drawing = replace(
                drawing,
                name="-".join(map(str, (drawing.name, dataset, *numbers))),
                title=f"{drawing.title}: {dataset}, {_in_words(numbers)}",
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
    return _for_each_setting(_rates_of_a_setting, rows)


def _rates_of_a_setting(rows: Sequence[Seeds]) -> Drawing:
    errors: dict[bool, dict[float, Sequence[float]]] = {}
    for row in rows:
        by_rate = errors.setdefault(row.experiment.depth is not None, {})
        by_rate[row.experiment.recipe.learning_rate] = [run.epochs[-1].validation_error for run in row.runs]
    return rates(errors)


def _crossing(rows: Sequence[Seeds]) -> list[Drawing]:
    return [
        draw(dataset, cells) for dataset, cells in _cells_by_dataset(rows).items() for draw in (crossing, rule_of_thumb)
    ]


DRAWINGS: dict[str, Callable[[Sequence[Seeds]], list[Drawing]]] = {
    "gap": _gap,
    "curves": _curves,
    "gradient": _gradient,
    "survival_curve": _survival_curve,
    "heat_map": _heat_map,
    "depth_curve": _depth_curve,
    "rates": _rates,
    "crossing": _crossing,
}


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
                loss = statistics.mean(run.epochs[-1].train_loss for run in pair[False].runs)
                recipe = pair[False].experiment.recipe
                cells.setdefault(dataset, []).append(
                    Cell(num_images, num_steps, tuple(differences), loss, recipe.epochs * recipe.epoch_passes)
                )
    return cells


def chosen_rates(study: Study, rows: Sequence[Seeds]) -> list[str]:
    """The learning rates that tuning chooses for each setting."""
    if "rates" not in study.figures:
        return []
    chosen: list[str] = []
    groups = _by_setting(rows)
    for (_, *numbers), group in groups.items():
        best: list[str] = []
        for stochastic, name in ((False, "constant depth"), (True, "stochastic depth")):
            own = [row for row in group if (row.experiment.depth is not None) == stochastic]
            seeds = [{run.config["seed"] for run in row.runs} for row in own]
            if common := set[object].intersection(*seeds) if seeds else set[object]():
                means = {
                    row.experiment.recipe.learning_rate: statistics.mean(
                        run.epochs[-1].validation_error for run in row.runs if run.config["seed"] in common
                    )
                    for row in own
                }
                # The lowest of equally good ones, up to rounding.
                chosen_rate = min(sorted(means), key=lambda rate: round(means[rate], 6))
                best.append(f"{name} {chosen_rate} (n = {len(common)})")
        of = f" for {_in_words(numbers)}" if len(groups) > 1 else ""
        chosen.append(f"Chosen{of} by the mean validation error: {', '.join(best)}.")
    return chosen


def rules_of_thumb(study: Study, rows: Sequence[Seeds]) -> list[str]:
    """What tells the settings in which stochastic depth is better from the others."""
    if "crossing" not in study.figures:
        return []
    return [each for dataset, cells in _cells_by_dataset(rows).items() for each in sentences(dataset, cells)]
