"""Installation from wheel and sdist, with and without the laboratory's packages, and with an old PyTorch."""

import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

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


def test_the_description_of_the_package_has_no_link_that_needs_the_repository(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        description = wheel.read(name).decode()
    assert "# stochastic-depth\n" in description
    assert re.findall(r"\]\((?!https?:)[^)]*\)", description) == []


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("https://host/a/b", "[page](https://host/a/b/blob/v1.2/docs/a.md#x) ![plot](https://host/a/b/raw/v1.2/p.svg)"),
        (None, "page "),
    ],
    ids=["with an address", "without one"],
)
def test_links_of_the_readme_become_absolute(repository: str | None, expected: str) -> None:
    pytest.importorskip("hatchling")
    readme_outside = runpy.run_path(str(ROOT / "hatch_build.py"))["readme_outside"]
    assert readme_outside("[page](docs/a.md#x) ![plot](p.svg)", "1.2", repository) == expected
    assert readme_outside("[a](https://b.c) [d](#e)", "1.2", repository) == "[a](https://b.c) [d](#e)"


def test_the_workflows_use_the_versions_that_are_pinned() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    tested = {
        (entry["torch"], entry["torchvision"]) for entry in workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    }
    pinned = dict(re.findall(r"^([\w-]+)==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
    oldest = re.findall(r"torch(?:vision)?==([\d.]+)", (ROOT / "Makefile").read_text())
    assert {tuple(oldest), (pinned["torch"], pinned["torchvision"])} <= tested
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    assert ruff == f"v{pinned['ruff']}"
    targets = [
        step["run"].removeprefix("make ")
        for job in workflow["jobs"].values()
        for step in job["steps"][-1:]
        if "run" in step
    ]
    assert {"check", "test"} <= set(targets)


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda form: form.stem
)
def test_issue_forms_are_valid(form: Path) -> None:
    """As far as the code host's rules can be checked here."""
    content = yaml.safe_load(form.read_text())
    assert content.keys() <= {"name", "description", "title", "labels", "assignees", "body"}
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids)
    for field in content["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["attributes"].keys() <= {"label", "description", "placeholder", "render", "value"}


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
