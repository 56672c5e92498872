"""Reads run folders into typed, frozen objects. Missing or damaged files raise a one-line `ReportError`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field

from stochastic_depth_lab.errors import ReportError
from stochastic_depth_lab.files import from_json

Kind = TypeVar("Kind")
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Epoch:
    """One line of `metrics.jsonl`; errors in percent, durations in seconds."""

    epoch: Count
    train_loss: Number
    validation_error: Number
    validation_loss: Number
    test_error: Number
    test_loss: Number
    train_s: Number
    realized_depth: Number
    realized_cost: Number
    first_conv_grad: Number
    learning_rate: Number
    num_steps: Count
    open_counts: tuple[Number, ...]
    depth_counts: tuple[Number, ...] = ()
    """Number of steps that ran 0, 1, ..., all branches; empty in runs of older versions, which did not count."""
    process_s: Number | None = None
    """Process time of training; None in runs of older versions, which did not measure it."""


@dataclass(frozen=True)
class Published:
    """The published test error in percent, and its source."""

    test_error: Number
    source: str


@dataclass(frozen=True)
class Result:
    """The part of `result.json` that the epochs do not contain; errors in percent."""

    epochs: Count
    best_epoch: Count
    validation_error: Number
    test_error: Number
    num_parameters: Count


@dataclass(frozen=True)
class _Depth:
    granularity: str
    over_time: str = "constant"


@dataclass(frozen=True)
class _Config:
    """The part of `config.json` that a report needs: it may be of another version."""

    name: str
    data: dict[str, Any]
    model: dict[str, Any]
    recipe: dict[str, Any]
    depth: _Depth | None
    published: Published | None = None


@dataclass(frozen=True)
class _BranchesFile:
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    survival_probs: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    expected_depth: Number
    expected_cost: Number
    expected_time: Number | None = None


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    `granularity` is None at constant depth, `result` while the run is unfinished, `published` if nothing is published.
    `changes` says whether survival changes over the epochs; expected values are then means over all planned epochs.
    """

    folder: Path
    config: Mapping[str, object]
    environment: Mapping[str, object]
    names: tuple[str, ...]
    survival_probs: tuple[float, ...]
    expected_depth: float
    expected_cost: float
    granularity: str | None
    changes: bool
    epochs: tuple[Epoch, ...]
    published: Published | None
    result: Result | None
    notes: tuple[str, ...]
    expected_time: float | None = None
    """Share of constant depth's time if closed blocks took none; None in runs of older versions."""

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.config["name"])

    @property
    def stochastic(self) -> bool:
        """Whether the run has stochastic depth; otherwise it is a constant-depth run."""
        return self.granularity is not None

    @property
    def best_epoch(self) -> int:
        """The epoch of the lowest validation error, the first of several."""
        return self.result.best_epoch if self.result else min(self.epochs, key=lambda e: e.validation_error).epoch

    @property
    def test_error(self) -> float:
        """Test error at the lowest validation error, percent.

        A finished run states it: if it validates several times per epoch (SVHN), the epochs do not show it.
        """
        return self.result.test_error if self.result else self.epochs[self.best_epoch - 1].test_error

    @property
    def validation_error(self) -> float:
        """The lowest validation error, percent."""
        return self.result.validation_error if self.result else self.epochs[self.best_epoch - 1].validation_error

    @property
    def train_s(self) -> float:
        """Seconds of training, evaluation not included."""
        return math.fsum(e.train_s for e in self.epochs)

    @property
    def process_s(self) -> float | None:
        """Process time of training; None if an epoch lacks it."""
        times = [e.process_s for e in self.epochs if e.process_s is not None]
        return math.fsum(times) if len(times) == len(self.epochs) else None

    @property
    def late_gradient(self) -> float:
        """Mean |gradient| of the first convolution's weights after the learning rate first fell to half or less.

        Over all epochs if it never did.
        """
        rates = [e.learning_rate for e in self.epochs]
        dropped = [i for i in range(1, len(rates)) if rates[i] <= rates[i - 1] / 2]
        late = self.epochs[dropped[0] if dropped else 0 :]
        return math.fsum(e.first_conv_grad * e.num_steps for e in late) / sum(e.num_steps for e in late)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return sum(e.num_steps for e in self.epochs)

    @property
    def realized_depth(self) -> float:
        """Mean number of blocks run per step."""
        return self._mean_over_steps([e.realized_depth for e in self.epochs])

    @property
    def realized_cost(self) -> float:
        """Mean executed share of constant depth's training FLOPs per step."""
        return self._mean_over_steps([e.realized_cost for e in self.epochs])

    @property
    def first_conv_grad(self) -> float:
        """Mean |gradient| of the first convolution's weights over all steps."""
        return self._mean_over_steps([e.first_conv_grad for e in self.epochs])

    @property
    def depth_frequencies(self) -> tuple[float, ...]:
        """The share of the steps that ran 0, 1, ..., all branches; empty if an epoch was not counted."""
        if not all(e.depth_counts for e in self.epochs):
            return ()
        return tuple(
            math.fsum(counts) / self.num_steps for counts in zip(*(e.depth_counts for e in self.epochs), strict=True)
        )

    @property
    def open_frequencies(self) -> tuple[float, ...]:
        """How often each branch was open: its open counts over the steps."""
        return tuple(
            math.fsum(counts) / self.num_steps for counts in zip(*(e.open_counts for e in self.epochs), strict=True)
        )

    def _mean_over_steps(self, values: Sequence[float]) -> float:
        return math.fsum(v * e.num_steps for v, e in zip(values, self.epochs, strict=True)) / self.num_steps


def read_run(folder: Path) -> Run:
    """The run in a folder.

    If the last line of `metrics.jsonl` is cut off, as a killed run leaves it, it is skipped with a note.

    Raises:
        ReportError: if `folder` is not a run folder, has no finished epoch yet, or is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ReportError(f"{folder} is not a run folder: it has no config.json.")
    config = read_file(_Config, folder / "config.json")
    branches = read_file(_BranchesFile, folder / "branches.json")
    num_branches = len(branches.names)
    if len(branches.survival_probs) != num_branches:
        count = len(branches.survival_probs)
        raise ReportError(
            f"{folder / 'branches.json'} is damaged: it has {count} probabilities for {num_branches} names"
        )
    epochs, notes = _read_epochs(folder / "metrics.jsonl", num_branches=num_branches)
    result = _read_result(folder / "result.json", num_epochs=len(epochs))
    changes = config.depth is not None and config.depth.over_time != "constant"
    if result is None:
        planned = f" of {config.recipe['epochs']}" if "epochs" in config.recipe else ""
        note = f"unfinished: {len(epochs)}{planned} epochs so far"
        notes = (*notes, note + ("; the expected values are means over all epochs" if changes else ""))
    return Run(
        folder=folder,
        config=read_file(dict[str, Any], folder / "config.json"),
        environment=read_file(dict[str, Any], folder / "environment.json"),
        names=branches.names,
        survival_probs=branches.survival_probs,
        expected_depth=branches.expected_depth,
        expected_cost=branches.expected_cost,
        granularity=config.depth and config.depth.granularity,
        changes=changes,
        epochs=epochs,
        published=config.published,
        result=result,
        notes=notes,
        expected_time=branches.expected_time,
    )


def read_file(kind: type[Kind], path: Path) -> Kind:
    """An object from a JSON file of a run folder.

    Raises:
        ReportError: if the file is missing or damaged.
    """
    try:
        return from_json(kind, path.read_bytes())
    except FileNotFoundError:
        raise ReportError(f"{path.parent} is not a complete run folder: it has no {path.name}") from None
    except ValueError as error:
        raise ReportError(f"{path} is damaged: {error}") from None


def _read_epochs(path: Path, *, num_branches: int) -> tuple[tuple[Epoch, ...], tuple[str, ...]]:
    """The finished epochs, and a note if the last line is cut off."""
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    # A run that is killed while it writes a line leaves its beginning, without a line feed. That is never JSON.
    cut_off = bool(rest) and not _is_json(rest)
    if rest and not cut_off:
        lines.append(rest)
    if not lines:
        raise ReportError(f"{path.parent}: no epoch has finished yet, there is nothing to report")
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, start=1):
        try:
            epoch = from_json(Epoch, line)
            if epoch.epoch != number:
                raise ValueError(f"it holds epoch {epoch.epoch}")
            for name, expected in (("open_counts", num_branches), ("depth_counts", num_branches + 1)):
                if len(getattr(epoch, name)) not in (expected, 0 if name == "depth_counts" else expected):
                    raise ValueError(f"{name} has {len(getattr(epoch, name))} entries for {num_branches} branches")
        except ValueError as error:
            raise ReportError(f"{path}, line {number}, is damaged: {error}") from None
        epochs.append(epoch)
    note = f"the last line of {path.name} is cut off, as a killed run leaves it, and is left out"
    return tuple(epochs), (note,) if cut_off else ()


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_result(path: Path, *, num_epochs: int) -> Result | None:
    if not path.exists():
        return None
    result = read_file(Result, path)
    if result.epochs != num_epochs:
        raise ReportError(f"{path} is damaged: it has {result.epochs} epochs, metrics.jsonl {num_epochs}")
    if result.best_epoch > num_epochs:
        raise ReportError(f"{path} is damaged: best_epoch is {result.best_epoch} of {num_epochs}")
    return result


def read_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """The runs to compare, in the order given.

    Raises:
        ReportError: if there is none, if one is given twice, or as `read_run`.
    """
    if not folders:
        raise ReportError("no run folder was given")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ReportError(f"{folder} was given twice")
    return tuple(read_run(folder) for folder in folders)


def run_folders(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The run folders in some paths. A folder of runs, such as the output of a sweep or table, stands for its runs.

    Returns:
        Run folders to report on, and those in folders of runs that have no finished epoch yet.
    """
    folders: list[Path] = []
    left_out: list[Path] = []
    for path in paths:
        inner = (
            []
            if (path / "config.json").is_file()
            else sorted([*path.glob("*/config.json"), *path.glob("runs/*/config.json")])
        )
        if not inner:
            folders.append(path)
        for config in inner:
            metrics = config.with_name("metrics.jsonl")
            (folders if metrics.is_file() and metrics.stat().st_size else left_out).append(config.parent)
    if left_out and not folders:
        raise ReportError(f"no run in {' '.join(map(str, paths))} has finished an epoch yet")
    return folders, left_out


def labels(runs: Sequence[Run]) -> tuple[str, ...]:
    """A short, unique name for each run.

    The experiment's name, with the seed if needed; if names are too long or equal, the settings in which the runs
    differ: `p_L 0.3 · wd 1e-4 · equal cost`; otherwise their folders. Characters that cannot be shown, such as line
    feeds, are replaced.
    """
    candidates = (
        [run.name for run in runs],
        [f"{run.name}, seed {run.config.get('seed')}" for run in runs],
        differing([run.config for run in runs]),
        [f"{run.name}, {run.folder.name}" for run in runs],
        [run.folder.name for run in runs],
    )
    for names in candidates:
        shown = [printable(name) for name in names]
        if len(set(shown)) == len(shown) and max(map(len, shown)) <= _LONGEST:
            return tuple(shown)
    # Numbers in front make them unique in any case.
    return tuple(f"{number}: {_shortened(printable(run.name))}" for number, run in enumerate(runs, start=1))


_LONGEST = 48
"""Characters of a label, with its seed."""
_SHORT = {
    "depth.final_survival_prob": "p_L",
    "recipe.weight_decay": "wd",
    "recipe.learning_rate": "lr",
    "recipe.batch_size": "batch",
    "model.num_layers": "layers",
    "data.dataset": "",
    "depth.schedule": "",
    "depth.granularity": "per",
    "depth.draw": "",
    "depth.over_time": "",
    "precision": "",
}
"""Names of fields in a label; empty if the value is enough."""


def differing(configs: Sequence[Mapping[str, object]]) -> list[str]:
    """What each configuration differs in from the others: `layers 14 · wd 1e-4 · equal cost`.

    Args:
        configs: as `config.json` holds them.
    """
    flat = [
        _flat({key: value for key, value in config.items() if key not in ("name", "title", "published")})
        for config in configs
    ]
    keys = [
        key
        for key in dict.fromkeys(key for each in flat for key in each)
        if len({str(each.get(key)) for each in flat}) > 1
    ]
    return [
        " · ".join(_setting_text(key, each[key]) for key in keys if key in each) or str(config["name"])
        for config, each in zip(configs, flat, strict=True)
    ]


def _flat(fields: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast("Mapping[str, object]", value), f"{above}{key}.")
        elif value is None and key == "depth":
            flat["depth"] = "constant"
        else:
            flat[above + key] = value
    return flat


def _setting_text(key: str, value: object) -> str:
    name = _SHORT.get(key, key.rpartition(".")[2].replace("_", " "))
    text = _number(value) if isinstance(value, float) else str(value).replace("_", " ")
    return f"{name} {text}".strip()


def _number(value: float) -> str:
    """A number in a readable form: 0.05, 1e-4."""
    text = f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3e}"
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}" if exponent else text


def _shortened(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else name[: longest // 2 - 1] + "…" + name[-longest // 2 :]


def printable(text: str) -> str:
    """The text, with every character replaced that cannot be shown in one line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
