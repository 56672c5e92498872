"""The run folder: what a run is, where it ran, what it measured. Whoever reads it later needs nothing else."""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from stochastic_depth_lab.atomic import write_json, write_whole
from stochastic_depth_lab.config import Experiment, as_json, check, differences, from_json, quick

_LOCK = ".lock"


class RunError(ValueError):
    """A run folder that cannot be used as asked: one line with the reason and the remedy."""


class RunFolder:
    """A run folder; `opened` makes it for who writes. Of several processes that train together only the first one does.

    Args:
        path: the folder.
        experiment: what runs in it.
    """

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path = path
        self.experiment = as_json(experiment)
        self.checkpoints = path / "checkpoints"

    def write_beginning(self, environment: Mapping[str, Any], branches: Mapping[str, Any]) -> None:
        """Write `config.json`, `environment.json` and `branches.json`; a resumed run adds its environment."""
        path = self.path / "environment.json"
        if path.exists():
            first = read_json(path)
            environment = {**first, "resumed": [*first.get("resumed", []), environment]}
        write_json(path, environment)
        write_json(self.path / "branches.json", branches)
        write_json(self.path / "config.json", self.experiment)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add an epoch to `metrics.jsonl`; it is on the disk when this returns."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_epochs(self, num_epochs: int) -> None:
        """Leave the first epochs of `metrics.jsonl`, those that the checkpoint knows, and drop the rest.

        A run that was killed may have written one epoch more, or part of it, which it is about to repeat.

        Raises:
            RunError: if one of the epochs to keep is missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)[:num_epochs] if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") or _epoch_of(line) != number:
                raise RunError(f"{path} is damaged: line {number} is not epoch {number}. Begin anew in another folder.")
        if len(lines) < num_epochs:
            raise RunError(
                f"{path} has {len(lines)} epochs, the checkpoint {num_epochs}. Begin anew in another folder."
            )
        write_whole(path, b"".join(lines))

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`: the run is finished."""
        write_json(self.path / "result.json", result)


def look(path: Path, experiment: Experiment, *, resume: bool) -> dict[str, Any] | None:
    """Whether a run may go into a folder; nothing is written.

    Returns:
        The result if the run is finished already, else None.

    Raises:
        RunError: if there is something in the folder and `resume` is not asked for, or if it holds another run.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"--out must be a folder, but {path} is a file.")
    if not path.exists() or all(entry.name == _LOCK for entry in path.iterdir()):
        return None
    config = path / "config.json"
    if not resume:
        remedy = "give another folder, or --resume to resume its run" if config.exists() else "give another folder"
        raise RunError(f"{path} exists and is not empty: {remedy}.")
    if not config.exists():
        return None
    found = read_experiment(path)
    if others := differences(as_json(experiment), as_json(found)):
        if not differences(as_json(quick(experiment)), as_json(found)):
            raise RunError(f"{path} holds a --quick run of this experiment: add --quick, or give another folder.")
        raise RunError(f"{path} holds another run: {'; '.join(others)} (there, not here). Give another folder.")
    result = path / "result.json"
    return read_json(result) if result.exists() else None


def folder_for(out: Path, experiment: Experiment) -> Path:
    """Where a configuration runs among many: the folder in which it began, whatever its name, or a new one.

    Folders of other configurations, and of versions whose configurations this one cannot read, are left alone.

    Raises:
        ValueError: if its name could lead out of `out`.
    """
    check(experiment)
    ours = as_json(experiment)
    for config in sorted(out.glob("*/config.json")):
        with contextlib.suppress(ValueError):
            theirs = read_json(config)
            # The seed first: among hundreds of runs a whole comparison with each takes a minute.
            if theirs.get("seed") == experiment.seed and not differences(ours, theirs):
                return config.parent
    name = f"{experiment.name}-seed-{experiment.seed}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(out / name for name in names if not (out / name / "config.json").exists())


@contextmanager
def opened(path: Path, experiment: Experiment, *, resume: bool) -> Generator[RunFolder]:
    """A run folder to write into; while it is open no other process can open it.

    Raises:
        RunError: as `look`, or if another run is writing in it.
    """
    look(path, experiment, resume=resume)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        yield RunFolder(path, experiment)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    # The operating system drops this lock with the process that holds it, however it ends: no lock is ever stale.
    with (path / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(f"another run is writing in {path} (process {file.read().strip() or '?'}).") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file.

    Raises:
        RunError: if the file is missing or holds no object.
    """
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path.parent} is not a run folder: it has no {path.name}.") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path} is damaged: not JSON.") from None
    if not isinstance(fields, dict):
        raise RunError(f"{path} is damaged: not an object.")
    return cast("dict[str, Any]", fields)


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
    """Where a run found its data; None: where data lie by default.

    Raises:
        RunError: as `read_json`.
    """
    found = read_json(path / "environment.json").get("data_root")
    return found and Path(found)


def environment(device: torch.device, data_root: Path | None) -> dict[str, Any]:
    """Versions, hardware, threads, data, command and time: what a number needs to be repeated."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "system": platform.platform(),
        "cpu": _cpu(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "data_root": data_root and str(data_root.absolute()),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    """Of the packages that numbers depend on; the last two read ImageNet, and may be missing."""
    found: dict[str, str] = {}
    for name in ("stochastic-depth", "torch", "numpy", "torchvision", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit this package runs from, with a + if files were changed since; None outside of a checkout."""
    if not (Path(__file__).parents[1] / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        # No lock: killed in the middle of it, a run would leave one in the user's repository.
        command: Sequence[str] = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _epoch_of(line: bytes) -> int | None:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
