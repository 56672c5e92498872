"""The run folder: configuration, environment and measurements of a run."""

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stochastic_depth_lab.errors import RunError
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.experiments.config import Experiment, as_json, differences, from_json
from stochastic_depth_lab.experiments.scales import quick
from stochastic_depth_lab.files import from_json as parse
from stochastic_depth_lab.files import write_json, write_whole

_LOCK = ".lock"


class RunFolder:
    """A run folder. Of several processes that train together, only rank 0 uses it.

    Args:
        path: the folder.
        experiment: the experiment that runs in it.
    """

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path = path
        self.experiment = as_json(experiment)
        self.checkpoints = path / "checkpoints"
        self._experiment = experiment

    def check(self, *, resume: bool) -> dict[str, Any] | None:
        """Check that the run may use the folder. Writes nothing.

        Returns:
            The result if the run is already finished, else None.

        Raises:
            RunError: if the folder is not empty and `resume` is false, or if it holds another run.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise RunError(f"--out must be a folder, but {path} is a file.")
        if not path.exists() or all(entry.name == _LOCK for entry in path.iterdir()):
            return None
        has_run = (path / "config.json").exists()
        if not resume:
            remedy = "give another folder, or --resume to resume its run" if has_run else "give another folder"
            raise RunError(f"{path} exists and is not empty: {remedy}.")
        if not has_run:
            return None
        found = as_json(read_experiment(path))
        if others := differences(self.experiment, found):
            if not differences(as_json(quick(self._experiment)), found):
                raise RunError(f"{path} holds a --quick run of this experiment: add --quick, or give another folder.")
            raise RunError(f"{path} holds another run: {'; '.join(others)} (there, not here). Give another folder.")
        result = path / "result.json"
        return read_json(result) if result.exists() else None

    @contextmanager
    def opened(self, *, resume: bool) -> Generator[None]:
        """Open the folder for writing, so that no other process can open it.

        Raises:
            RunError: as `check`, or if another run is writing in it.
        """
        self.check(resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        # The operating system drops this lock with the process that holds it: a lock is never stale.
        with (self.path / _LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "?"
                raise RunError(f"another run is writing in {self.path} (process {owner}).") from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def begin(self, num_epochs: int, environment: Mapping[str, Any], branches: Mapping[str, Any]) -> None:
        """Write `config.json`, `environment.json` and `branches.json`, and keep the epochs that are done.

        A run that was killed may have written one more epoch than its checkpoint knows, or part of one: it is repeated.

        Raises:
            RunError: if one of the epochs is missing or damaged.
        """
        self.keep_epochs(num_epochs)
        path = self.path / "environment.json"
        if path.exists():
            first = read_json(path)
            environment = {**first, "resumed": [*first.get("resumed", []), environment]}
        write_json(path, environment)
        write_json(self.path / "branches.json", branches)
        write_json(self.path / "config.json", self.experiment)

    def keep_epochs(self, num_epochs: int) -> None:
        """Drop all but the first epochs of `metrics.jsonl`, which the checkpoint knows."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)[:num_epochs] if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") or _epoch_of(line) != number:
                raise RunError(
                    f"{path} is damaged: line {number} is not epoch {number}. Start again in another folder."
                )
        if len(lines) < num_epochs:
            raise RunError(f"{path} has {len(lines)} epochs, the checkpoint {num_epochs}. Use another folder.")
        write_whole(path, b"".join(lines))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append an epoch to `metrics.jsonl`, and flush it to disk."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far."""
        return [parse(dict[str, Any], line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write `result.json`, which marks the run as finished, and return what it holds."""
        write_json(self.path / "result.json", result)
        return read_json(self.path / "result.json")


def folder_for(out: Path, experiment: Experiment) -> Path:
    """The run folder of an experiment among many: see `folders_for`."""
    (folder,) = folders_for(out, [experiment])
    return folder


def folders_for(out: Path, experiments: Iterable[Experiment]) -> list[Path]:
    """The run folders of experiments among many: those that hold their configurations, or new ones.

    Folders of other configurations are left alone, and so are those of versions that this one cannot read.

    Raises:
        ValueError: if the name of an experiment could lead out of `out`.
    """
    known: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for config in sorted(out.glob("*/config.json")):
        with contextlib.suppress(ValueError):
            theirs = read_json(config)
            # By seed: comparing hundreds of runs with each other takes a minute.
            known.setdefault(repr(theirs.get("seed")), []).append((config.parent, theirs))
    return [_folder_among(known, out, experiment) for experiment in experiments]


def _folder_among(
    known: Mapping[str, Sequence[tuple[Path, dict[str, Any]]]], out: Path, experiment: Experiment
) -> Path:
    check(experiment)
    ours = as_json(experiment)
    for folder, theirs in known.get(repr(experiment.seed), ()):
        with contextlib.suppress(ValueError):
            if not differences(ours, theirs):
                return folder
    name = f"{experiment.name}-seed-{experiment.seed}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(out / name for name in names if not (out / name / "config.json").exists())


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of a run folder.

    Raises:
        RunError: if the file is missing or holds no object.
    """
    try:
        return parse(dict[str, Any], path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path.parent} is not a run folder: it has no {path.name}.") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}.") from None


def read_experiment(path: Path) -> Experiment:
    """The experiment of a run folder.

    Raises:
        RunError: if it is missing, damaged or of another version; it names the file.
    """
    fields = read_json(path / "config.json")
    try:
        return from_json(fields)
    except ValueError as error:
        raise RunError(f"{path / 'config.json'} is damaged, or of another version: {error}") from None


def data_root_of(path: Path) -> Path | None:
    """Where a run found its data; None: the default.

    Raises:
        RunError: as `read_json`.
    """
    found = read_json(path / "environment.json").get("data_root")
    return found and Path(found)


def _epoch_of(line: bytes) -> int | None:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
