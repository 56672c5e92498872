"""Files that are written whole or not at all, and JSON that is read into dataclasses."""

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Kind = TypeVar("Kind")
_RENAMED = {
    b'"normalisation"': b'"normalization"',
    b'"regularisers"': b'"regularizers"',
    b'"synchronised"': b'"synchronized"',
    b'"realised_depth"': b'"realized_depth"',
    b'"realised_cost"': b'"realized_cost"',
}
"""Fields and values as run folders of version 0.1 spell them, and their present names."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a temporary file, flush it to disk, then rename it: readers see the old file or the new one.

    An interruption may leave `NAME.tmp`, which the next write replaces. A full disk leaves only the old file.

    Raises:
        OSError: if the file cannot be written, for example because the disk is full.
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
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's error names no file
    flush_folder(path.parent)


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    """Write a JSON object with `write_whole`."""
    write_whole(path, json.dumps(fields, indent=2, allow_nan=False).encode() + b"\n")


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable: they are entries of the folder, not of the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def from_json(kind: type[Kind], content: bytes | str, *, extra: Literal["ignore", "forbid"] = "ignore") -> Kind:
    """Read JSON into an object of a type, usually a dataclass, whose annotations say what is allowed.

    Nothing is converted, except whole numbers to floats, lists to tuples and objects to dataclasses. Files of version
    0.1 are read too: some of their fields have another name now.

    Args:
        kind: the type.
        content: JSON text.
        extra: what to do with fields that the type does not have.

    Raises:
        ValueError: in one line, if the text is not JSON, or a field is missing, unknown or of the wrong type.

    Example:
        >>> from stochastic_depth_lab.experiments.config import Comparison
        >>> from_json(Comparison, '{"less": "a", "more": 3}')
        Traceback (most recent call last):
        ValueError: more should be a valid string, but is '3'
    """
    from pydantic import ValidationError  # help and mistakes on the command line need no package

    text = content.encode() if isinstance(content, str) else content
    for old, new in _RENAMED.items():
        text = text.replace(old, new)
    try:
        return _adapter(kind).validate_json(text, strict=True, extra=extra)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))[:60]
    match first["type"]:
        case "json_invalid":
            raise ValueError("not JSON")
        case "missing":
            raise ValueError(f"it has no {field}")
        case "unexpected_keyword_argument":
            raise ValueError(f"{field!r} is unknown")
        case _:
            expected = first["msg"].replace("Input", field or "it", 1)
            raise ValueError(f"{expected}, but is {str(first['input'])[:40]!r}")


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
