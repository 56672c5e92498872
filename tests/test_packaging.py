"""What a user installs: wheel and sdist, with and without the laboratory's packages, and PyTorch that is too old."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def install(package: Path, folder: Path, *, with_packages: bool) -> Path:
    """A new environment with the package in it, and with the packages of this one or none; its scripts."""
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    if with_packages:
        (site_packages,) = folder.glob("lib/python*/site-packages")
        others = [path for path in sys.path if path.endswith("site-packages")]
        (site_packages / "others.pth").write_text("\n".join(others))
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    python = folder / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", *options, package, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_the_sdist_holds_all_that_its_tests_and_its_readme_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("Makefile", "constraints.txt", "README.md", "RESULTS.md", "LICENSE", "tests/conftest.py"):
        assert name in names
    linked = re.findall(r"\]\(([\w./-]+)", (ROOT / "README.md").read_text())
    assert {name for name in linked if not name.startswith("http")} <= names
    for folder in ("docs", "examples", "benchmarks", "tests", "stochastic_depth", "stochastic_depth_lab"):
        tracked = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert tracked <= names


@pytest.mark.slow
def test_the_wheel_without_the_extra_shows_its_help_and_says_what_is_missing(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    scripts = install(built[1], tmp_path / "plain", with_packages=False)
    command = scripts / "stochastic-depth"
    assert run(command, "--version", cwd=tmp_path).stdout == f"{PROJECT['version']}\n"
    assert run(command, "train", "--help", cwd=tmp_path).stdout.startswith("Usage: stochastic-depth train EXPERIMENT")
    done = run(command, "train", "digits-constant", "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        r"stochastic-depth train needs the package \w+: run pip install '\.\[lab\]' in a clone of the project\.\n",
        done.stderr,
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["sdist", "wheel"])
def test_what_is_installed_trains_and_reports(built: tuple[Path, Path], tmp_path: Path, number: int) -> None:
    scripts = install(built[number], tmp_path / "full", with_packages=True)
    code = (
        "import stochastic_depth, stochastic_depth_lab; print(stochastic_depth.__file__, stochastic_depth_lab.__file__)"
    )
    where = run(scripts / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert all(path.startswith(str(tmp_path / "full")) for path in where), where
    small = ["--model.num-layers", "8", "--data.limit", "50", "--recipe.epochs", "1"]
    for command in (["train", "digits-stochastic", "--out", "run", *small], ["report", "run"]):
        done = run(scripts / "stochastic-depth", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("version", ["2.7.1+cu126", "1.13.1"])
def test_a_torch_that_is_too_old_is_one_line(version: str, tmp_path: Path) -> None:
    code = f"""
import sys
from unittest.mock import MagicMock
sys.modules["torch"] = MagicMock(__version__={version!r})
try:
    import stochastic_depth
except ImportError as error:
    print(error)
from stochastic_depth_lab.cli.main import main
sys.exit(main(["schedule"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = f"stochastic-depth needs PyTorch 2.8 or newer, but {version} is installed.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, said, said)


@pytest.mark.parametrize("version", ["2.8.0a0+34c6371", "2.10.0", "3.0.0"])
def test_a_torch_in_the_range_is_not_refused(version: str) -> None:
    fake = f"types.SimpleNamespace(__version__={version!r})"
    code = f"import sys, types; sys.modules['torch'] = {fake}; import stochastic_depth"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "needs PyTorch" not in done.stderr


def test_the_range_is_the_same_everywhere() -> None:
    (torch,) = PROJECT["dependencies"]
    assert torch == "torch>=2.8"
    assert "torch==2.8.0" in (ROOT / "Makefile").read_text()
    assert "PyTorch (2.8 or newer)" in (ROOT / "README.md").read_text()


def test_the_demo_installs_what_it_needs_and_nothing_else() -> None:
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (installed,) = re.findall(r"--editable '(.*)'", shown.stdout)
    assert installed == ".[lab]"
