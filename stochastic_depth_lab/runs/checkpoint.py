"""Checkpoints: written atomically, with the previous one kept; damage is detected; no code is unpickled."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from stochastic_depth_lab.errors import CheckpointError
from stochastic_depth_lab.experiments.config import differences
from stochastic_depth_lab.files import flush_folder, write_whole

FORMAT_VERSION = 3
LAST, PREVIOUS, BEST, BEST_SAFETENSORS = "last.pt", "previous.pt", "best.pt", "best.safetensors"


def save(folder: Path, state: Mapping[str, Any], experiment: Mapping[str, Any]) -> None:
    """Write a checkpoint: the state, a format version, the configuration, and a SHA-256 digest of all that.

    The last one becomes `previous.pt`. A kill between the two renames leaves only `previous.pt`, from which a run
    resumes just as exactly.

    Args:
        folder: the checkpoints' folder; created if it does not exist.
        state: dictionaries, lists, numbers, strings and tensors.
        experiment: the run's configuration, which a resumed run must share.

    Raises:
        OSError: if it cannot be written, for example because the disk is full. The old ones are kept.
    """
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "experiment": dict(experiment), **state}
    content["digest"] = content_digest(content)
    folder.mkdir(exist_ok=True)
    next_one = folder / "next.pt"
    write_whole(next_one, _packed(content))
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / PREVIOUS)
    next_one.replace(folder / LAST)
    flush_folder(folder)


def save_weights(folder: Path, weights: Mapping[str, Tensor], experiment: Mapping[str, Any]) -> None:
    """Write the weights of the lowest validation error: a plain `state_dict` as `best.pt`, and as safetensors.

    The metadata of `best.safetensors` holds format version and configuration.
    """
    folder.mkdir(exist_ok=True)
    metadata = {"format": "pt", "format_version": str(FORMAT_VERSION), "experiment": json.dumps(experiment)}
    write_whole(folder / BEST_SAFETENSORS, as_safetensors(weights, metadata))
    write_whole(folder / BEST, _packed(dict(weights)))


def as_safetensors(weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file; the same weights and metadata give the same bytes."""
    from safetensors.torch import save

    return save({name: weight.cpu().contiguous() for name, weight in weights.items()}, metadata)


def load(
    folder: Path, experiment: Mapping[str, Any], *, set_aside: bool = False
) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest intact checkpoint, on the CPU, or None; and remarks about damaged ones.

    Args:
        folder: the checkpoints' folder, which need not exist.
        experiment: the configuration of the run to resume.
        set_aside: rename a damaged newest one to `damaged.pt`: the next save would replace the intact previous one
            with it.

    Raises:
        CheckpointError: if the checkpoint is of another configuration or format, or if all are damaged.
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
                "resume with the version that started the run."
            )
        stated = content.pop("digest", None)
        if stated != content_digest(content):
            remarks.append(f"{path} is damaged (its content does not match its digest).")
            continue
        if others := differences(experiment, content["experiment"]):
            raise CheckpointError(f"{path} is of another configuration: {'; '.join(others)} (there, not here).")
        if remarks and set_aside:
            (folder / LAST).replace(folder / "damaged.pt")
        return content, remarks
    if remarks:
        raise CheckpointError(f"no checkpoint is intact: {' '.join(remarks)} Start again in another folder.")
    return None, []


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint or of a file of weights, PyTorch's or safetensors, on the CPU.

    Raises:
        CheckpointError: if it is damaged, or if reading it would run code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with zipfile.ZipFile(path) as archive:
            _refuse_bomb(archive, path.stat().st_size)
            # PyTorch (2.13) does not check the checksums of the parts: it would load an altered byte.
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return cast("dict[str, Any]", content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged file can make zipfile, torch and pickle fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({reason}).") from error


def digest(path: Path) -> str:
    """SHA-256 of a file of weights, for the configuration.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def content_digest(content: object) -> str:
    """SHA-256 of nested dictionaries, lists, numbers, strings and tensors, down to the last bit of each.

    Example:
        >>> content_digest({"a": [1, torch.zeros(2)]}) == content_digest({"a": [1, torch.zeros(2)]})
        True
        >>> content_digest({"a": [1, torch.zeros(2)]}) == content_digest({"a": [1, torch.zeros(3)]})
        False
    """
    hashed = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            hashed.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            entries = cast("Mapping[object, object]", value)
            hashed.update(f"mapping {len(entries)};".encode())
            for name, entry in entries.items():
                add(name)
                add(entry)
        elif isinstance(value, (list, tuple)):
            items = cast("Sequence[object]", value)
            hashed.update(f"sequence {len(items)};".encode())
            for item in items:
                add(item)
        else:
            hashed.update(f"{type(value).__name__} {value!r};".encode())

    add(content)
    return hashed.hexdigest()


def _refuse_bomb(archive: zipfile.ZipFile, num_bytes: int) -> None:
    """Refuse compressed parts. PyTorch compresses nothing: such an archive is made to fill the memory."""
    parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > num_bytes:
        raise zipfile.BadZipFile("its parts are compressed, which PyTorch never does")


def _packed(content: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()  # in memory first: torch's own writer hides why a write failed
    torch.save(content, file)
    return file.getvalue()
