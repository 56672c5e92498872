"""Files that appear whole or not at all, also when the process is killed or the power fails."""

import json
import os
from collections.abc import Mapping
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: whoever looks sees the old file or the new one.

    An interruption may leave `NAME.tmp`, which the next write takes over; a full disk leaves nothing but the old file.

    Raises:
        OSError: if it cannot be written, such as on a full disk.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # that of a full disk names no file
    flush_folder(path.parent)


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    """An object as a file, as `write_whole`."""
    write_whole(path, json.dumps(fields, indent=2, allow_nan=False).encode() + b"\n")


def flush_folder(folder: Path) -> None:
    """Make renames in a folder last: they are entries of the folder, not of the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
