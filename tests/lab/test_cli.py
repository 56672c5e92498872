"""The command line: instant help, one line for every mistake, interruption that saves, kill -9 that loses nothing."""

import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import assert_same, outcome

from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.cli.options import parse_train
from stochastic_depth_lab.experiments import PAIRS
from stochastic_depth_lab.training.progress import Lines

SMALL = shlex.split(
    "--model.num-layers 14 --data.limit 100 --recipe.batch-size 16 --recipe.epochs 6 --recipe.epoch-passes 1"
)


def command(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).with_name("stochastic-depth")), *map(str, arguments)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "cifar10-110-stochastic", "--help"],
        ["reproduce", "-h"],
        ["report", "-h"],
    ],
    ids=" ".join,
)
def test_help_imports_no_torch(arguments):
    code = f"""
import sys
from stochastic_depth_lab.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert stop.code in (0, None)
assert "torch" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "stochastic-depth" in shown.stdout
    assert shown.stderr == ""


def test_the_value_of_an_option_is_not_taken_for_the_experiment():
    for words in (["--out", "digits-stochastic", "digits-constant"], ["digits-constant", "--out", "digits-stochastic"]):
        experiment, run = parse_train([*words, "--quick"])
        assert (experiment.name, experiment.depth, run.out) == ("digits-constant", None, Path("digits-stochastic"))
        assert experiment == parse_train(["digits-constant", "--quick", "--out", "x"])[0]


def test_help_of_an_experiment_shows_its_own_values(capsys):
    with pytest.raises(SystemExit):
        main(["train", "cifar10-1202-stochastic", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--recipe.warmup-epochs N Train the first N epochs" in shown
    assert "(default: 10)" in shown
    assert "--depth.final-survival-prob X" in shown


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["trian"], ["train", "digits-constant"]]
)
def test_help_and_mistakes_need_no_package(words):
    code = f"""
import sys
from importlib.abc import MetaPathFinder


class OnlyPython(MetaPathFinder):
    def find_spec(self, name, *_):
        if name.partition(".")[0] not in (*sys.stdlib_module_names, "stochastic_depth_lab"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, OnlyPython())
from stochastic_depth_lab.cli.main import main
sys.exit(main({words!r}))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == (0 if words[-1].startswith("--") else 2), shown.stderr
    assert len(shown.stderr.splitlines()) == bool(shown.returncode)


def test_without_the_extra_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stochastic_depth_lab.training.progress", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "stochastic_depth_lab.training.progress")
    assert main(["train", "digits-constant", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said == (
        "stochastic-depth train needs the package rich.console: run pip install '.[lab]' in a clone of the project.\n"
    )


def test_a_closed_pipe_ends_the_command_silently():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from stochastic_depth_lab.cli.main import main; sys.exit(main(['schedule']))"
    shown = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert shown.stderr == ""
    assert shown.returncode == 128 + signal.SIGPIPE


MISTAKES = {
    "trian": "Unknown command 'trian'. Did you mean 'train'?",
    "--verison": "Unknown option '--verison'. Did you mean '--version'?",
    "train": "Missing EXPERIMENT",
    "train digits-stochastik --out OUT": "Unknown experiment 'digits-stochastik'. Did you mean 'digits-stochastic'?",
    "train digits-stochastik --out digits-stochastic": "Unknown experiment 'digits-stochastik'.",
    "train digits-constant": "Missing --out FOLDER",
    "train digits --out OUT": "Unknown experiment 'digits'. Did you mean one of digits-constant, digits-stochastic?",
    "train digits-constant --out": "--out needs a value",
    "train digits-constant --out=": "--out must not be empty",
    "train digits-constant again --out OUT": "Unexpected argument 'again'",
    "train digits-constant --out OUT --sed 3": "Unknown option '--sed'. Did you mean '--seed'?",
    "train digits-constant --out OUT --quick=yes": "--quick takes no value",
    "train digits-constant --out OUT --seed x": "--seed must be a whole number, but is 'x'",
    "train digits-constant --out OUT --seed 1.5": "--seed must be a whole number, but is '1.5'",
    "train digits-constant --out OUT --seed 99999999999999999999999": "seed must be at least 0 and below 2**63, but is",
    "train digits-constant --out OUT --seed -1": "seed must be at least 0",
    "train digits-constant --out OUT --recipe.epochs two": "--recipe.epochs must be a whole number, but is 'two'",
    "train digits-constant --out OUT --recipe.learning-rate nan": "learning-rate must be a number, but is 'nan'",
    "train digits-constant --out OUT --precision fp8": "--precision must be fp32, bf16 or fp16, but is 'fp8'",
    "train digits-constant --out OUT --data.translation 100": "smaller than the images, 8x8 pixels, but is 100",
    "train digits-constant --out OUT --recipe.warmup-epochs 99": "must be less than recipe.epochs, 15, but is 99",
    "train digits-constant --out OUT --recipe.lr-drops 0.9 0.1": "recipe.lr_drops must increase, but are 0.9 0.1",
    "train digits-constant --out OUT --device tpu": "--device must be cpu, cuda, cuda:N or mps, but is 'tpu'",
    "train digits-constant --out OUT --device cuda:99": "There is no device 'cuda:99'",
    "train digits-constant --out OUT --cuda-graphs --device cpu": "--cuda-graphs needs a GPU, but the device is cpu",
    "reproduce curves --scale small --out OUT --cuda-graphs": "--cuda-graphs are for train, and for reproduce of one",
    "train digits-constant --out OUT --depth.schedule uniform": "has constant depth. Use digits-stochastic",
    "train digits-stochastic --out OUT --depth.final-survival-prob 0": "must be in (0, 1], but is 0",
    "train digits-stochastic --out OUT --depth.final-survival-prob 1.5": "must be in (0, 1], but is 1.5",
    "train digits-stochastic --out OUT --model.num-layers 21": "6n + 2",
    "train digits-stochastic --out OUT --recipe.epochs 0": "recipe.epochs must be at least 1, but is 0",
    "train digits-stochastic --out OUT --recipe.learning-rate -1": "recipe.learning_rate must be a positive number",
    "train digits-stochastic --out OUT --recipe.lr-drops 250": "shares of the epochs in (0, 1)",
    "train digits-stochastic --out OUT --recipe.momentum 0": "recipe.momentum must be in (0, 1), but is 0",
    "train digits-stochastic --out OUT --data.num-validation 5000": "validation must be",
    "train digits-constant --out OUT --data.images-per-class 200": "images_per_class must be 1..121, the training im",
    "train digits-constant --out OUT --data.images-per-class 0": "data.images_per_class must be at least 1, but is 0",
    "train digits-constant --out OUT --recipe.epoch-passes 0": "recipe.epoch_passes must be at least 1, but is 0",
    "train imagenet-152-constant --out OUT --data.images-per-class 9": "for images in memory, not for imagenet",
    "train cifar10-20-constant --out OUT --data-root FILE": "FILE",
    "train digits-constant --out OUT --weights NOWHERE": "NOWHERE cannot be read: No such file",
    "train digits-constant --out OUT --weights FILE": "FILE is damaged",
    "train digits-constant --out FULL": "is not empty",
    "train digits-constant --out FILE": "--out must be a folder",
    "reproduce digit --out OUT": "Unknown pair of experiments, table or figure 'digit'. Did you mean 'digits'?",
    "reproduce digits": "--out",
    "evaluate FULL": "is not a run folder",
    "evaluate NOWHERE": "is not a run folder",
    "report FULL": "is not a run folder",
    "report": "Missing RUN",
    "evaluate FULL --analyze --out OUT": "--out is for --subnetworks and --monte-carlo",
    "evaluate FULL --out OUT": "--out is for --subnetworks and --monte-carlo",
    "sweep digits-stochastic --quick --out /proc/nowhere": "/proc/nowhere",
    "reproduce gradients --quick --out /proc/nowhere": "/proc/nowhere",
    "reproduce digits --out /proc/nowhere": "--out /proc/nowhere cannot be written: No such file or directory.",
    "evaluate FULL --subnetworks --out /proc/nowhere": "--out /proc/nowhere cannot be written",  # before any work
    "evaluate FULL --monte-carlo 4 --out /proc/nowhere": "--out /proc/nowhere cannot be written",
    "completion tcsh": "SHELL must be bash, zsh or fish, but is 'tcsh'",
    "inspect timm:vit_tiny_patch16_224 --device cuda:99": "There is no device 'cuda:99'",
    "inspect timm:vit_tiny_patch16_224 --device nonsense": "--device must be cpu, cuda, cuda:N or mps",
    "inspect timm:vit_smll_patch16_224": "Similar names: vit_small_patch16_224",
    "inspect torchvision:resnet19": "Similar names: resnet18",
    "inspect timm:vit_tiny_patch16_224 --measure --batch-size 0": "--batch-size must be at least 1, but is 0",
    "inspect timm:vit_tiny_patch16_224 --measure --image-size 7": "does not take images of 7x7 pixels: Input height",
    "inspect timm:vit_tiny_patch16_224 --drop-path-rate -0.1": "--drop-path-rate must be in [0, 1), but is -0.1",
    "sweep digits-stochastic --quick --out OUT --grid seed=1,2": "--grid takes fields of an experiment, such as",
    "sweep digits-stochastic --quick --out OUT --grid depth.turn=0.2,0.2": "--grid has depth.turn=0.2 twice",
    "sweep digits-stochastic --quick --out OUT --grid depth.final-survival-prob=0.2,0": "must be in (0, 1], but is 0",
    "sweep digits-stochastic --quick --out FILE": "--out must be a folder, but FILE is a file",
    "reproduce gradients --quick --out FILE": "--out must be a folder, but FILE is a file",
    "evaluate FULL --subnetworks --out FILE": "--out must be a folder, but FILE is a file",
    "evaluate FULL --subnetworks --finetune-epochs 0": "--finetune-epochs must be at least 1, but is 0",
    "evaluate FULL --monte-carlo 4 --out FILE/here": "--out must be a folder, but FILE/here is a file or lies under",
    "export FULL --out FULL": "--out must be a file, but FULL is a folder",
    "export FULL --out FILE/x.onnx": "--out must be a folder, but FILE is a file",
    "schedule --num-layers 21": "6n + 2",
    "schedule --final-survival-prob 0": "must be in (0, 1]",
    "schedule exponential": "uniform, timm, efficientnet or convnext, but is 'exponential'",
    "schedule --out figure.pdf": ".png or .svg",
}


@pytest.mark.parametrize("line", MISTAKES, ids=str)
def test_a_mistake_is_one_line_and_changes_nothing(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FULL").mkdir()
    Path("FULL", "notes.txt").write_text("mine")
    Path("FILE").write_text("mine")
    assert main(line.split()) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert MISTAKES[line] in shown
    assert sorted(str(path) for path in Path().rglob("*")) == ["FILE", "FULL", "FULL/notes.txt"]


def test_a_loss_that_is_not_finite_is_one_line(tmp_path, capsys):
    arguments = ["train", "digits-stochastic", "--out", str(tmp_path / "run"), *SMALL]
    assert main([*arguments, "--recipe.learning-rate", "1e30"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "epoch 1, step" in last


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, capsys, monkeypatch):
    """Files may grow to a megabyte, as on a full disk; a real limit of the operating system."""
    run = tmp_path / "run"
    code = (
        "import resource, signal, sys; from stochastic_depth_lab.cli.main import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", "digits-constant", "--out", run, *SMALL]
    stopped = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert stopped.returncode == 2
    *_, said = stopped.stderr.splitlines()
    assert said.startswith("File too large: ")
    assert said.endswith("Make room, then resume the run with --resume.")
    assert not list(run.rglob("*.tmp"))
    assert main([*map(str, arguments), "--resume"]) == 0


def test_train_reports_and_evaluates(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "digits-stochastic", "--out", str(run), "--seed", "3", *SMALL]) == 0
    shown = capsys.readouterr()
    result = json.loads((run / "result.json").read_text())
    assert f"test error {result['test_error']:.2f} %" in shown.out
    first, *lines = shown.err.splitlines()
    assert first == "digits-stochastic: 6 epochs of 7 steps"
    assert [line.split()[:2] for line in lines] == [["epoch", f"{epoch}/6"] for epoch in range(1, 7)]
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["model"]["num_layers"]) == (3, 14)

    assert main(["train", "digits-stochastic", "--out", str(run), "--seed", "3", "--resume", *SMALL]) == 0
    assert "is finished already" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 0
    assert f"best weights  test        error {result['test_error']:.2f} %" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert "digits-stochastic" in capsys.readouterr().out
    assert (run / "report.html").exists()


def test_reproduce_trains_both_and_reports(tmp_path, capsys, monkeypatch):
    names = "digits-constant", "digits-stochastic"
    monkeypatch.setitem(PAIRS, "digits-small", tuple(parse_train([name, "--out", "x", *SMALL])[0] for name in names))
    assert main(["reproduce", "digits-small", "--out", str(tmp_path / "runs"), "--seed", "2"]) == 0
    shown = capsys.readouterr()
    assert "digits-constant" in shown.out
    assert "digits-stochastic" in shown.out
    assert (tmp_path / "runs" / "report.html").exists()
    assert len(list((tmp_path / "runs" / "figures").glob("*.png"))) >= 3
    rows = [json.loads((tmp_path / "runs" / name / "config.json").read_text())["seed"] for name in names]
    assert rows == [2, 2]
    assert main(["reproduce", "digits-small", "--out", str(tmp_path / "runs"), "--seed", "2"]) == 2
    assert main(["reproduce", "digits-small", "--out", str(tmp_path / "runs"), "--seed", "2", "--resume"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, capsys, monkeypatch, number, code):
    arguments = ["train", "digits-stochastic", *SMALL, "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    before = signal.getsignal(number)

    def interrupt(self: Lines, row: dict[str, object]) -> None:
        if row["epoch"] == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "on_epoch", interrupt)
        capsys.readouterr()
        assert main([*arguments, str(tmp_path / "parts")]) == code
    assert signal.getsignal(number) is before
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("Stopped and saved. Resume with: stochastic-depth train digits-stochastic ")
    assert main(shlex.split(said.partition("stochastic-depth ")[2])) == 0
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_the_uninterrupted_run(tmp_path):
    """`kill -9` of a real training process; a moment is a number of saves after the start plus up to 0.1 s."""
    arguments = ["train", "digits-stochastic", *SMALL, "--recipe.epochs", 30, "--recipe.checkpoint-every", 2]
    assert main([*map(str, arguments), "--out", str(tmp_path / "whole")]) == 0
    run = tmp_path / "parts"
    moments = random.Random(0)
    num_kills = 0
    for _ in range(3):
        process = subprocess.Popen(command(*arguments, "--out", run, "--resume"), stderr=subprocess.DEVNULL)
        last = run / "checkpoints" / "last.pt"
        started = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and (last.stat().st_mtime_ns if last.exists() else 0) == started:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.1)
        num_kills += process.poll() is None
        process.kill()
        process.wait()
    assert num_kills >= 2
    subprocess.run(command(*arguments, "--out", run, "--resume"), check=True, capture_output=True)
    assert_same(outcome(run), outcome(tmp_path / "whole"))


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_of_80_columns_shows_all_of_the_progress(tmp_path, monkeypatch):
    shown = _Tty()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    assert main(["train", "digits-stochastic", "--out", str(tmp_path / "run"), *SMALL]) == 0
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue()).strip().splitlines()[-1].rpartition("\r")[2]
    assert re.search(r"epoch 6/6  loss \d\.\d{4}  error \d+\.\d\d \(\d+\.\d\d\) \d:\d\d:\d\d left$", last), last
    assert len(last) + len("100/500") - len("6/6") + 2 <= 80


def test_schedule_shows_and_draws(tmp_path, capsys):
    assert main(["schedule", "--num-layers", "20", "--out", str(tmp_path / "survival.png")]) == 0
    shown = capsys.readouterr().out
    assert "expected depth 6.50 of 9 blocks" in shown
    assert (tmp_path / "survival.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_events_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    assert main(["train", "digits-constant", *SMALL, "--out", str(tmp_path / "run"), "--tensorboard"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("test_error")] == [row["epoch"] for row in rows]
    assert events.Scalars("train_loss")[-1].value == pytest.approx(rows[-1]["train_loss"])


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    assert main(["train", "digits-constant", *SMALL, "--out", str(tmp_path / "run"), "--tensorboard"]) == 2
    assert "run pip install '.[tensorboard]' in a clone of the project." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
