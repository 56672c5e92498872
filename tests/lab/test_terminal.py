"""The command in a real terminal: a pseudo-terminal of 80 or 120 columns, without colors, a dumb one, and a pipe."""

import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from stochastic_depth_lab.cli import main as cli
from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.training import setup

SMALL = "--model.num-layers 14 --data.limit 100 --recipe.batch-size 16 --recipe.epochs 2"
TERMINALS = {
    "80 columns": (80, {"TERM": "xterm-256color"}),
    "120 columns": (120, {"TERM": "xterm-256color"}),
    "no color": (80, {"TERM": "xterm-256color", "NO_COLOR": "1"}),
    "dumb": (80, {"TERM": "dumb"}),
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
on_terminals = pytest.mark.parametrize(("width", "variables"), TERMINALS.values(), ids=TERMINALS)


class Terminal:
    """A command that runs in a pseudo-terminal."""

    def __init__(self, line: str, width: int, variables: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "TERM")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stochastic_depth_lab", *shlex.split(line)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | variables,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def wait_until_it_loads(self) -> None:
        """Wait until the command reaches its own code; before that, Python itself handles interrupts."""
        os.read(self._ours, 65536)

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def shown(self) -> str:
        """Everything until the command ends."""
        parts: list[bytes] = []
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # the other side is closed
                part = b""
            if not part:
                break
            parts.append(part)
        os.close(self._ours)
        self.process.wait()
        return b"".join(parts).decode().replace("\r\n", "\n")


MISTAKES = {
    "trian": "Unknown command 'trian'. Did you mean 'train'? See stochastic-depth --help.",
    "train digits-stochastic": "Missing --out FOLDER: output folder. See stochastic-depth train --help.",
    "report x --uot y": "Unknown option '--uot'. Did you mean '--out'? See stochastic-depth report --help.",
    "train digits-stochastik --out X": "Unknown experiment 'digits-stochastik'. Did you mean 'digits-stochastic'?",
}


@on_terminals
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_plain_line(line, width, variables):
    terminal = Terminal(line, width, variables)
    assert terminal.shown() == f"{MISTAKES[line]}\n"
    assert terminal.process.returncode == 2


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_the_same_line_in_a_pipe(line):
    done = subprocess.run(
        [sys.executable, "-m", "stochastic_depth_lab", *shlex.split(line)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{MISTAKES[line]}\n")


@on_terminals
@pytest.mark.parametrize("line", ["--help", *(f"{command} --help" for command in cli.COMMANDS)])
def test_help_fits_the_terminal(line, width, variables):
    shown = Terminal(line, width, variables).shown()
    assert shown.startswith("Usage: stochastic-depth ")
    assert "\x1b" not in shown
    assert not re.search("[─-╿]", shown)
    too_long = [text for text in shown.splitlines() if len(text) > width]
    assert all(text.startswith("  stochastic-depth ") or "{" in text for text in too_long), too_long


def test_help_names_experiments_and_placeholders():
    shown = Terminal("train --help", 100, {"TERM": "xterm"}).shown()
    assert {*cli.EXPERIMENTS} <= {*re.findall(r"[\w-]+", shown)}  # no name is broken at a hyphen
    assert "Usage: stochastic-depth train EXPERIMENT --out FOLDER [options]" in shown
    assert "digits-stochastic" in shown.partition("Options:")[0]
    for words in (
        "--weights FILE ",
        "--seed N ",
        "--precision {fp32,bf16,fp16}",
        "--data.no-flip ",
        "--recipe.lr-drops X",
    ):
        assert words in shown
    for words in ("STR", "{None}", "INT", "FLOAT", "(default: None)"):
        assert words not in shown
    assert "Examples:\n  stochastic-depth train digits-stochastic --out runs/one" in shown
    assert "--version" in Terminal("--help", 100, {"TERM": "xterm"}).shown()


@pytest.mark.slow
@on_terminals
def test_progress_fits_the_terminal(tmp_path, width, variables):
    terminal = Terminal(f"train digits-stochastic --out {tmp_path / 'run'} {SMALL}", width, variables)
    shown = terminal.shown()
    assert terminal.process.returncode == 0, shown
    assert shown.startswith("Loading PyTorch ...\r")
    plain = ESCAPES.sub("", shown)
    lines = [part for line in plain.splitlines() for part in line.split("\r")]
    *_, bar, result = [line for line in lines if line.strip()]
    assert result.startswith("test error ") or "see " in result
    assert all(len(line) <= width for line in lines if "epoch" in line and "left" in line), bar
    if "NO_COLOR" in variables or variables["TERM"] == "dumb":
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)  # colors


@pytest.mark.slow
def test_ctrl_c_leaves_no_traceback_at_any_moment(tmp_path):
    """During imports, before the first step, or within a step: at any moment."""
    for number in range(12):
        terminal = Terminal(f"train digits-stochastic --out {tmp_path / str(number)} {SMALL}", 80, {"TERM": "xterm"})
        terminal.wait_until_it_loads()
        time.sleep(0.3 * number)
        terminal.press_ctrl_c()
        shown = terminal.shown()
        assert "Traceback" not in shown, shown
        if terminal.process.returncode == 130:
            *_, last = ESCAPES.sub("", shown).strip().splitlines()
            saved = (tmp_path / str(number) / "checkpoints" / "last.pt").exists()
            assert ("Stopped and saved. Resume with: " in shown) == saved, last


def test_an_interrupt_of_the_first_import_is_silent():
    """Interrupts during Python's own start, before the command's first line, do not count."""
    code = """
import _signal, os, sys
from stochastic_depth_lab.__main__ import main

class Interrupting:
    def find_spec(self, name, *_):
        if name == "stochastic_depth_lab.cli.interrupts":
            os.kill(os.getpid(), _signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
_signal.signal(_signal.SIGINT, _signal.default_int_handler)  # whatever this process has inherited
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupted_import_ends_at_once():
    """Whatever error an import turns a KeyboardInterrupt into, it is not shown."""
    code = """
import os, signal, sys
from stochastic_depth_lab.cli import main as cli, output

def importing(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)
    except KeyboardInterrupt:
        raise RecursionError

output.importlib.import_module = importing
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process has inherited
sys.exit(cli.main(["schedule"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nInterrupted.\n")


def test_an_interrupted_inspection_ends_at_once():
    """It imports other packages, which may turn a KeyboardInterrupt into any error."""
    code = """
import os, signal, sys
from stochastic_depth_lab.cli import main as cli
from stochastic_depth_lab.measure import inspect

def importing(name, rate):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)
    except KeyboardInterrupt:
        raise RuntimeError

inspect._CREATE["timm"] = importing
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(["inspect", "timm:resnet18"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nInterrupted.\n")


@pytest.mark.parametrize(
    ("module", "name", "saved"), [(setup, "find_device", False), (setup, "load_images", True)], ids=["before", "within"]
)
def test_a_stop_before_the_first_step_says_whether_there_is_something_to_resume(
    tmp_path, capsys, monkeypatch, module, name, saved
):
    original = getattr(module, name)

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)
    run = tmp_path / "run"
    assert main(["train", "digits-constant", "--out", str(run), *shlex.split(SMALL)]) == 130
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(
        "Stopped and saved. Resume with: " if saved else "Stopped before there was anything to save."
    )
    assert (run / "checkpoints" / "last.pt").exists() == saved


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_an_interrupt_of_help_is_one_word(words, capsys, monkeypatch):
    def interrupted(_text):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "show", interrupted)
    assert main(words) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("tr", "train"),
        ("train digits-s", "digits-stochastic"),
        ("reproduce gradi", "gradients"),
        ("report --o", "--out"),
        ("train x --recipe.warmup-l", "--recipe.warmup-learning-rate"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, words, completed, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    if shell != "bash":  # not on every machine: what it is made of
        assert completed in re.split(r"[\s\"']+", script)
        return
    typed = ["stochastic-depth", *words.split()]
    code = f"{script}\nCOMP_WORDS=({shlex.join(typed)}); COMP_CWORD={len(typed) - 1}; _stochastic_depth\n"
    shown = subprocess.run(["bash", "-c", code + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [completed]


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ("--quick", "--quick: five epochs on a few images. The numbers mean nothing."),
        (f"--precision fp16 {SMALL} --recipe.epochs 1", "fp16 is up to 50 times as slow as fp32 on a CPU"),
        (f"--resume {SMALL} --recipe.epochs 1", "There is nothing to resume in"),
    ],
    ids=["quick", "fp16", "resume"],
)
def test_possible_surprises_are_announced_first(options, remark, tmp_path, capsys):
    assert main(["train", "digits-constant", "--device", "cpu", "--out", str(tmp_path), *shlex.split(options)]) == 0
    assert capsys.readouterr().err.startswith(remark)


def test_resuming_a_quick_run_without_the_option_names_it(tmp_path, capsys):
    words = ["train", "digits-constant", "--out", str(tmp_path / "run")]
    assert main([*words, "--quick"]) == 0
    assert main([*words, "--resume"]) == 2
    assert "holds a --quick run of this experiment: add --quick" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "digits-stochastic", "--out", str(folder), *shlex.split(SMALL)]) == 0
    return folder


def test_missing_best_weights_are_named(trained, capsys):
    best = trained / "checkpoints" / "best.pt"
    best.rename(trained / "away")
    assert main(["evaluate", str(trained)]) == 0
    shown = capsys.readouterr()
    (trained / "away").rename(best)
    assert f"{best} is missing: only the last weights were evaluated." in shown.err
    assert "best weights" not in shown.out


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}'], ids=["not JSON", "no object", "no experiment"])
@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_broken_configuration_is_named(trained, command, content, capsys):
    config = trained / "config.json"
    before = config.read_text()
    config.write_text(content)
    code = main([command, str(trained)])
    config.write_text(before)
    assert code == 2
    said = capsys.readouterr().err
    assert str(config) in said
    assert said.count("\n") == 1


def test_report_takes_a_folder_of_runs(trained, capsys):
    (trained.parent / "begun").mkdir()
    (trained.parent / "begun" / "config.json").write_text("{}")
    assert main(["report", str(trained.parent)]) == 0
    shown = capsys.readouterr()
    assert f"Left out 1 runs without a finished epoch: {trained.parent / 'begun'}." in shown.err
    assert f"report: {trained.parent / 'report.html'}" in shown.out
