"""Reads a run folder into typed, frozen objects; whatever is missing or damaged is a `ReportError` of one line."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast


class ReportError(ValueError):
    """Something that cannot be reported on, in one line: what it is and what was expected."""


@dataclass(frozen=True)
class Epoch:
    """One line of `metrics.jsonl`; errors in percent, durations in seconds."""

    epoch: int
    train_loss: float
    validation_error: float
    validation_loss: float
    test_error: float
    test_loss: float
    train_s: float
    realised_depth: float
    realised_cost: float
    first_conv_grad: float
    learning_rate: float
    num_steps: int
    open_counts: tuple[float, ...]
    depth_counts: tuple[float, ...]
    """How many steps ran 0, 1, ..., all branches; empty in runs of older versions, which did not count."""
    process_s: float | None = None
    """Process time of training; None in runs of older versions, which did not measure it."""


@dataclass(frozen=True)
class Published:
    """The published test error in percent, and where it stands."""

    test_error: float
    source: str


@dataclass(frozen=True)
class Result:
    """The part of `result.json` that the epochs do not hold; errors in percent."""

    best_epoch: int
    validation_error: float
    test_error: float
    num_parameters: int


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    `granularity` is None at constant depth, `result` while the run is unfinished, `published` where nothing is.
    `changes` says whether survival changes over the epochs; expectations are then means over all that are planned.
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

        A finished run's own word counts: where it validates several times an epoch (SVHN), the epochs do not show it.
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
        """Mean |gradient| of the first convolution's weights since the learning rate first fell to half or less.

        Over all epochs if it never did.
        """
        rates = [e.learning_rate for e in self.epochs]
        dropped = [i for i in range(1, len(rates)) if rates[i] <= rates[i - 1] / 2]
        late = self.epochs[dropped[0] if dropped else 0 :]
        return math.fsum(e.first_conv_grad * e.num_steps for e in late) / sum(e.num_steps for e in late)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all epochs."""
        return sum(e.num_steps for e in self.epochs)

    @property
    def realised_depth(self) -> float:
        """Mean blocks run per step."""
        return self._mean_over_steps([e.realised_depth for e in self.epochs])

    @property
    def realised_cost(self) -> float:
        """Mean executed share of constant depth's training FLOPs per step."""
        return self._mean_over_steps([e.realised_cost for e in self.epochs])

    @property
    def first_conv_grad(self) -> float:
        """Mean |gradient| of the first convolution's weights over all steps."""
        return self._mean_over_steps([e.first_conv_grad for e in self.epochs])

    @property
    def depth_frequencies(self) -> tuple[float, ...]:
        """The share of the steps that ran 0, 1, ..., all branches; empty where an epoch was not counted."""
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
    """The run that `folder` holds.

    The last line of `metrics.jsonl` may be cut off, as a killed run leaves it: it is passed over and noted.

    Raises:
        ReportError: if `folder` is no run folder, has no finished epoch yet, or is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ReportError(f"{folder} is not a run folder: it has no config.json.")
    config = _Reader.of_file(folder / "config.json")
    config.text("name")
    for part in ("data", "model", "recipe"):
        if config.inner(part) is None:
            raise ReportError(f"{config.where} is damaged: it has no {part}")
    branches = _Reader.of_file(folder / "branches.json")
    names = branches.texts("names")
    survival_probs = branches.numbers("survival_probs", length=len(names))
    if max(survival_probs) > 1:
        raise ReportError(f"{branches.where} is damaged: a survival probability is {max(survival_probs)}, above 1")
    epochs, notes = _read_epochs(folder / "metrics.jsonl", num_branches=len(names))
    result = _read_result(folder / "result.json", num_epochs=len(epochs))
    granularity, changes = _read_depth(config)
    if result is None:
        of_all = "; what is expected of it is the mean over all epochs" if changes else ""
        notes = (*notes, _unfinished(config, len(epochs)) + of_all)
    return Run(
        folder=folder,
        config=config.fields,
        environment=_Reader.of_file(folder / "environment.json").fields,
        names=names,
        survival_probs=survival_probs,
        expected_depth=branches.number("expected_depth"),
        expected_cost=branches.number("expected_cost"),
        granularity=granularity,
        changes=changes,
        epochs=epochs,
        published=_read_published(config),
        result=result,
        notes=notes,
    )


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
    """The run folders among some paths: a folder of runs, such as that of a sweep or a table, stands for all of them.

    Returns:
        Those to report on, and those found in a folder of runs that have no finished epoch yet.
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
    """A short name for each run, none of them twice.

    The experiment's, with the seed where it must be; where names are too long, or the same, what the runs differ in:
    `p_L 0.3 · wd 1e-4 · equal cost`; at last their folders.

    Names come from outside: characters that cannot be shown (a line feed would break a table) are replaced.
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
    # Numbers at the front make them different whatever they are called.
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
"""What fields are called in a label; nothing where the value says it all."""


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
        " · ".join(_said(key, each[key]) for key in keys if key in each) or str(config["name"])
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


def _said(key: str, value: object) -> str:
    name = _SHORT.get(key, key.rpartition(".")[2].replace("_", " "))
    text = _number(value) if isinstance(value, float) else str(value).replace("_", " ")
    return f"{name} {text}".strip()


def _number(value: float) -> str:
    """A number as people write it: 0.05, 1e-4."""
    text = f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3e}"
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}" if exponent else text


def _shortened(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else name[: longest // 2 - 1] + "…" + name[-longest // 2 :]


def printable(text: str) -> str:
    """The text with every character replaced that cannot be shown in one line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@dataclass(frozen=True)
class _Reader:
    """The fields of one JSON object, asked for by type; `where` opens every message."""

    where: str
    fields: Mapping[str, object]

    @classmethod
    def of_file(cls, path: Path) -> "_Reader":
        try:
            return cls.of_text(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise ReportError(f"{path.parent} is not a whole run folder: it has no {path.name}") from None

    @classmethod
    def of_text(cls, text: bytes, where: str) -> "_Reader":
        try:
            fields = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{where} is damaged: not JSON ({type(error).__name__})") from None
        if not isinstance(fields, dict):
            raise ReportError(f"{where} is damaged: an object is expected, it holds {type(fields).__name__}")
        return cls(where, cast("dict[str, object]", fields))

    def require(self, key: str) -> object:
        if key not in self.fields:
            raise ReportError(f"{self.where} is damaged: it has no {key}")
        return self.fields[key]

    def inner(self, key: str) -> "_Reader | None":
        value = self.fields.get(key)
        return _Reader(f"{self.where}, {key},", cast("dict[str, object]", value)) if isinstance(value, dict) else None

    def text(self, key: str) -> str:
        value = self.require(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._list(key)
        if not values or not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of at least one text", values)
        return tuple(str(value) for value in values)

    def number(self, key: str) -> float:
        return self._number(key, self.require(key))

    def numbers(self, key: str, *, length: int) -> tuple[float, ...]:
        values = self._list(key)
        if len(values) != length:
            raise ReportError(f"{self.where} is damaged: {key} has {len(values)} entries for {length} branches")
        return tuple(self._number(key, value) for value in values)

    def whole(self, key: str) -> int:
        value = self.require(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "a whole number from 1", value)
        return value

    def _list(self, key: str) -> list[object]:
        value = self.require(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list", value)
        return cast("list[object]", value)

    def _number(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise self._wrong(key, "a finite number from 0", value)
        return float(value)

    def _wrong(self, key: str, expected: str, value: object) -> ReportError:
        return ReportError(f"{self.where} is damaged: {key} is {str(value)[:40]!r}, {expected} is expected")


def _read_epochs(path: Path, *, num_branches: int) -> tuple[tuple[Epoch, ...], tuple[str, ...]]:
    """The finished epochs, and a note where the last line is cut off."""
    if not path.is_file():
        raise ReportError(f"{path.parent}: no epoch has finished yet, there is nothing to report")
    *lines, rest = path.read_bytes().split(b"\n")
    # A kill while a line is written leaves its beginning, without a line feed; no beginning of an object is JSON.
    cut_off = bool(rest) and not _is_json(rest)
    if rest and not cut_off:
        lines.append(rest)
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, start=1):
        fields = _Reader.of_text(line, f"{path}, line {number},")
        if fields.whole("epoch") != number:
            raise ReportError(f"{path}, line {number}, is damaged: it holds epoch {fields.whole('epoch')}")
        epochs.append(_epoch(fields, num_branches))
    if not epochs:
        raise ReportError(f"{path.parent}: no epoch has finished yet, there is nothing to report")
    note = f"the last line of {path.name} is cut off, as a killed run leaves it, and is left out"
    return tuple(epochs), (note,) if cut_off else ()


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _epoch(fields: _Reader, num_branches: int) -> Epoch:
    return Epoch(
        epoch=fields.whole("epoch"),
        train_loss=fields.number("train_loss"),
        validation_error=fields.number("validation_error"),
        validation_loss=fields.number("validation_loss"),
        test_error=fields.number("test_error"),
        test_loss=fields.number("test_loss"),
        train_s=fields.number("train_s"),
        realised_depth=fields.number("realised_depth"),
        realised_cost=fields.number("realised_cost"),
        first_conv_grad=fields.number("first_conv_grad"),
        learning_rate=fields.number("learning_rate"),
        num_steps=fields.whole("num_steps"),
        open_counts=fields.numbers("open_counts", length=num_branches),
        depth_counts=(
            fields.numbers("depth_counts", length=num_branches + 1) if "depth_counts" in fields.fields else ()
        ),
        process_s=fields.number("process_s") if "process_s" in fields.fields else None,
    )


def _read_result(path: Path, *, num_epochs: int) -> Result | None:
    if not path.exists():
        return None
    fields = _Reader.of_file(path)
    if fields.whole("epochs") != num_epochs:
        raise ReportError(f"{path} is damaged: it tells of {fields.whole('epochs')} epochs, metrics.jsonl {num_epochs}")
    if fields.whole("best_epoch") > num_epochs:
        raise ReportError(f"{path} is damaged: best_epoch is {fields.whole('best_epoch')} of {num_epochs}")
    return Result(
        best_epoch=fields.whole("best_epoch"),
        validation_error=fields.number("validation_error"),
        test_error=fields.number("test_error"),
        num_parameters=fields.whole("num_parameters"),
    )


def _read_depth(config: _Reader) -> tuple[str | None, bool]:
    """The granularity, None at constant depth, and whether survival changes over the epochs."""
    if config.require("depth") is None:
        return None, False
    depth = config.inner("depth")
    if depth is None:
        raise ReportError(f"{config.where} is damaged: depth is neither null nor an object")
    return depth.text("granularity"), depth.fields.get("over_time", "constant") != "constant"


def _read_published(config: _Reader) -> Published | None:
    published = config.inner("published")
    return published and Published(published.number("test_error"), published.text("source"))


def _unfinished(config: _Reader, num_epochs: int) -> str:
    recipe = config.inner("recipe")
    planned = f" of {recipe.whole('epochs')}" if recipe and "epochs" in recipe.fields else ""
    return f"unfinished: {num_epochs}{planned} epochs so far"
