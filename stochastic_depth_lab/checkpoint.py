"""Checkpoints: written whole or not at all, the one before kept, damage noticed, nothing unpickled that could run."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from stochastic_depth_lab.atomic import flush_folder, write_whole
from stochastic_depth_lab.config import differences

FORMAT_VERSION = 2
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line with the reason and the remedy."""


def save(folder: Path, state: Mapping[str, Any], experiment: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before becomes `previous.pt`.

    A kill between the two renames leaves `previous.pt` alone, from which a run continues just as exactly.

    Args:
        folder: the checkpoints' folder; it is made if need be.
        state: dictionaries, lists, numbers, strings and tensors.
        experiment: the run's configuration, which a resumed run must share.

    Raises:
        OSError: if it cannot be written, such as on a full disk; the old ones are kept.
    """
    content = {"format_version": FORMAT_VERSION, "experiment": dict(experiment), **state}
    folder.mkdir(exist_ok=True)
    next_one = folder / "next.pt"
    write_whole(next_one, _packed(content))
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / PREVIOUS)
    next_one.replace(folder / LAST)
    flush_folder(folder)


def save_weights(folder: Path, weights: Mapping[str, Any]) -> None:
    """Write the weights of the lowest validation error as `best.pt`: a plain `state_dict`."""
    folder.mkdir(exist_ok=True)
    write_whole(folder / BEST, _packed(dict(weights)))


def load(folder: Path, experiment: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole, on the CPU, or None; and remarks on those that are not.

    Args:
        folder: the checkpoints' folder; it need not exist.
        experiment: the configuration of the run that wants to go on.

    Raises:
        CheckpointError: if the checkpoint is that of another configuration or format, or if there are some and all are
            damaged.
    """
    remarks: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            content = read(path)
        except CheckpointError as error:
            remarks.append(str(error))
            continue
        if content.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {content.get('format_version')}, this version reads {FORMAT_VERSION}: "
                "continue with the version that began the run."
            )
        if others := differences(experiment, content["experiment"]):
            raise CheckpointError(f"{path} is of another configuration: {'; '.join(others)} (there, not here).")
        return content, remarks
    if remarks:
        raise CheckpointError(f"no checkpoint is whole: {' '.join(remarks)} Begin anew in another folder.")
    return None, []


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint or a file of weights holds, on the CPU.

    Raises:
        CheckpointError: if it is damaged, or would need to run code to be read.
    """
    try:
        # PyTorch does not compare the checksums of the archive's parts (tried with 2.13): an altered byte would load.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        return cast("dict[str, Any]", torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # whatever a damaged file makes zipfile, torch and pickle stumble over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({reason}).") from error


def digest(path: Path) -> str:
    """SHA-256 of a file of weights, by which a configuration knows it.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _packed(content: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()  # in memory first: torch's own writer hides the reason of a failed write
    torch.save(content, file)
    return file.getvalue()
