"""Every block of Python and every command in the README and the pages runs and does what the text says."""

import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


def commands() -> list[str]:
    return [line for block in blocks("README.md", "console") for line in block.splitlines() if line.startswith("$ ")]


def without_numbers(text: str) -> str:
    """Rounding differs between machines, and with it the last digits of what a page shows."""
    return re.sub(r"\d[\d.]*(e[+-]\d+)?", "#", text)  # 0.0e+00 too


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_every_block_of_python_runs_and_prints_what_the_page_shows(page: str) -> None:
    namespace: dict[str, object] = {}
    # The blocks of a page follow on each other, as a reader types; a block of text right after one is its output.
    fences = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", flags=re.M | re.S)
    for block, shown in fences.findall((ROOT / page).read_text()):
        with redirect_stdout(StringIO()) as printed:
            exec(compile(block, page, "exec"), namespace)
        if shown:
            assert without_numbers(printed.getvalue()) == without_numbers(shown)


def test_the_readme_has_code_and_commands() -> None:
    assert len(blocks("README.md", "python")) >= 1
    assert len(commands()) >= 3


@pytest.mark.parametrize("target", re.findall(r"^\$ make (\w+)", README, flags=re.M))
def test_every_make_target_exists(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/" in done.stdout


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("$ stochastic-depth")])
def test_every_command_runs(line: str, tmp_path: Path) -> None:
    words = shlex.split(line.removeprefix("$ "), comments=True)
    if words[1] in ("train", "reproduce"):
        words.append("--quick")  # The same command in its short form; the full one takes minutes.
    if words[1] in ("report", "evaluate"):
        run("stochastic-depth", "train", "digits-constant", "--quick", "--out", words[2], cwd=tmp_path)
    run(*words, cwd=tmp_path)


def run(*words: str, cwd: Path) -> None:
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run([program, *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
