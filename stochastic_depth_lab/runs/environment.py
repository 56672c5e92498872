"""The machine and versions of a run, which a number needs to be reproducible."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_REPOSITORY = Path(__file__).parents[2]


def environment(device: torch.device, data_root: Path | None) -> dict[str, Any]:
    """Versions, hardware, threads, data, command, commit and time."""
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
    """Of the packages that numbers depend on. The last two read ImageNet, and may be missing."""
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
    """The commit of this package, with a + if tracked files have changed since; None outside a git checkout."""
    if not (_REPOSITORY / ".git").exists():
        return None
    try:
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    # Without locks: a run that is killed here must not leave one in the user's repository.
    command = ["git", "--no-optional-locks", "-C", str(_REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
