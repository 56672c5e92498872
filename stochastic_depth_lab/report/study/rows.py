"""The rows of a study's table: the runs of one experiment each, which differ in the seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stochastic_depth_lab.experiments.config import Experiment, Published
from stochastic_depth_lab.report.runs import Run, read_run
from stochastic_depth_lab.report.table import constant_depth_of


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


def read_rows(folders: Sequence[tuple[Experiment, Path]]) -> tuple[list[Seeds], list[str]]:
    """The rows of these run folders, and remarks on what is missing."""
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


def seeds_sentence(rows: Sequence[Seeds]) -> str:
    """How many seeds the numbers are from."""
    counts = {len(row.runs) for row in rows}
    if counts == {1}:
        return "Ours: one seed of each."
    number = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Ours: mean and standard deviation over {number} seeds of each."


def setting_line(rows: Sequence[Seeds]) -> str:
    """Number of images and steps, in a line; empty if the rows differ."""
    common = {(row.experiment.data, row.experiment.model.num_layers, row.runs[0].num_steps) for row in rows}
    if len(common) != 1 or not rows[0].few:
        return ""
    data, num_layers, num_steps = common.pop()
    return (
        f"{data.dataset}, {data.images_per_class} training images of each class, {num_layers} layers, "
        f"{num_steps:,} steps; n = {min(len(row.runs) for row in rows)} seeds"
    )


def short_titles(rows: Sequence[Seeds]) -> dict[str, str]:
    """Titles without their common beginning."""
    titles = [row.experiment.title for row in rows]
    parts = [title.split(", ") for title in titles]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    start = shared if len(parts) > 1 else 0
    return {row.experiment.name: ", ".join(each[start:]) for row, each in zip(rows, parts, strict=True)}
