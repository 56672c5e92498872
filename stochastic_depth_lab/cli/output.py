"""Output of the commands: results on stdout, progress and messages on stderr."""

import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from stochastic_depth_lab.cli.interrupts import EndingAtOnce

QUICK = "--quick: five epochs on a few images. The numbers mean nothing."


def load(*modules: str) -> None:
    """Import modules of this package that need PyTorch, which takes seconds, and say so on a terminal."""
    waiting = "Loading PyTorch ..." if sys.stderr.isatty() and "torch" not in sys.modules else ""
    sys.stderr.write(waiting)
    sys.stderr.flush()
    with EndingAtOnce():
        for module in modules:
            importlib.import_module(f"stochastic_depth_lab.{module}")
    if waiting:
        sys.stderr.write(f"\r{' ' * len(waiting)}\r")


def is_first() -> bool:
    """Whether this is the only process, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def show(text: str) -> None:
    """Print a result."""
    print(text, flush=True)  # noqa: T201 -- results are what the command is for


def note(message: str) -> None:
    """Print a message in one line."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)  # noqa: T201


def fail(message: str, code: int = 2) -> int:
    """Print a message, and return an exit code."""
    note(message)
    return code


def refuse_unwritable(folder: Path | None) -> None:
    """Raise ValueError, before any work, if an output folder is a file, lies under one, or cannot be written."""
    if folder is None:
        return
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise ValueError(f"--out must be a folder, but {folder} is a file or lies under one.")
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}.") from None


@contextmanager
def warnings_in_one_line() -> Generator[None]:
    """Show warnings without their place in the code."""

    def in_one_line(message: Warning | str, *_: object) -> str:
        return f"{message}\n"

    before = warnings.formatwarning
    warnings.formatwarning = in_one_line
    try:
        yield
    finally:
        warnings.formatwarning = before
