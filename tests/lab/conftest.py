"""Data for the laboratory's tests: made up, and the real CIFAR-10 if this machine has it."""

import os
import subprocess
import sys
from pathlib import Path

import made_up_data
import pytest

_SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"  # beside the repository, on developers' machines


@pytest.fixture(scope="session")
def _made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, made_up_data.Sources]:
    folder = tmp_path_factory.mktemp("made_up_data")
    return folder, made_up_data.write_all(folder)


@pytest.fixture
def made_up_data_root(_made_up: tuple[Path, made_up_data.Sources], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data root with small, made-up CIFAR-10, CIFAR-100 and SVHN files. During the test it is STOCHASTIC_DEPTH_DATA,
    and the readers of this process take its files for the published ones. Read only: the tests of a session share it.
    """
    folder, sources = _made_up
    made_up_data.publish(monkeypatch, sources)
    monkeypatch.setenv("STOCHASTIC_DEPTH_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with the real CIFAR-10: STOCHASTIC_DEPTH_DATA, or restored from the developers' lossless copy (4 s)."""
    given = os.environ.get("STOCHASTIC_DEPTH_DATA")
    if given and (Path(given) / "cifar-10-batches-py").is_dir():
        return Path(given)
    restore = _SHARED / "restore_cifar10.py"
    if not restore.exists():
        pytest.skip("needs the real CIFAR-10: set STOCHASTIC_DEPTH_DATA to the folder of cifar-10-batches-py")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, restore, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def svhn_piece() -> Path:
    """The first 1,083 images of SVHN's training file, in its format."""
    path = _SHARED / "svhn" / "train_32x32_first1083.mat"
    if not path.exists():
        pytest.skip("needs the developers' piece of SVHN")
    return path
