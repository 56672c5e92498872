"""Other people's training loops: each example is short, trains, and resumed equals the uninterrupted run."""

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stochastic_depth as sd

sys.path[:0] = [str(Path(__file__).parents[1] / "library" / "distributed"), str(Path(__file__).parent)]
import ranks  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "hf_trainer": "accelerate",
    "timm_training": "timm",
    "layerskip": "accelerate",
}


def load_example(name: str) -> Callable[[Path, int], dict[str, Tensor]]:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    # This one trains, removes layers, saves and generates.
    assert len(path.read_text().splitlines()) <= (120 if path.stem == "layerskip" else 60)


@pytest.mark.filterwarnings("default")
def test_layerskip_saves_plain_checkpoints_and_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    weights = load_example("layerskip")(tmp_path, 2)
    words = capsys.readouterr().out.partition("runs of the last layer for 48 tokens: ")[2].split()
    greedy, drafted = int(words[0]), int(words[2])
    assert drafted < greedy == 48
    folded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folded")
    assert_equal(folded.state_dict(), weights)
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "first-half")
    assert half.config.num_hidden_layers == 2
    assert_equal(half.state_dict(), {name: weights[name] for name in half.state_dict()})


# Warnings of these packages about their own code.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NEEDS)
def test_resumed_it_is_the_uninterrupted_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS[name])
    train = load_example(name)
    drawn: list[int] = []
    plain = sd.Controller.load_state_dict
    monkeypatch.setattr(
        sd.Controller, "load_state_dict", lambda self, state: (drawn.append(state["counter"]), plain(self, state))[1]
    )
    whole = train(tmp_path / "whole", 3)
    assert drawn == []
    first = train(tmp_path / "parts", 1)
    assert any(not torch.equal(tensor, whole[key]) for key, tensor in first.items())
    resumed = train(tmp_path / "parts", 3)
    assert drawn == [8]  # steps of an epoch: the gates resumed from there
    assert_equal(resumed, whole)


def torchrun_and_kill_one(folder: Path, epochs: int) -> None:
    """Both processes run under torchrun; one is killed after the first checkpoint, and torchrun starts both again."""
    torchrun = shlex.split("-m torch.distributed.run --nproc-per-node 2 --max-restarts 3 --monitor-interval 0.1")
    arguments = [EXAMPLES / "plain_torchrun.py", "--out", folder, "--epochs", str(epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.with_suffix(".log")).open("wb") as log:
        process = subprocess.Popen([sys.executable, *torchrun, *arguments], env=environment, stdout=log, stderr=log)
    try:
        while not (folder / "last.pt").exists():
            assert process.poll() is None, folder.with_suffix(".log").read_text()
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        assert process.wait(90) == 0, folder.with_suffix(".log").read_text()
    finally:
        process.terminate()
        process.wait()


def _plain(_rank: int, folder: str, epochs: int) -> None:
    load_example("plain_torchrun")(Path(folder), epochs)


@pytest.mark.slow
def test_plain_torchrun_resumed_or_killed_is_the_uninterrupted_run(tmp_path: Path) -> None:
    ranks.run(_plain, 2, str(tmp_path / "whole"), 12)
    for epochs in (1, 12):
        ranks.run(_plain, 2, str(tmp_path / "resumed"), epochs)
    torchrun_and_kill_one(tmp_path / "killed", 12)
    assert "exitcode: -9" in (tmp_path / "killed.log").read_text()
    whole = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert whole["depth"]["counter"] == 48  # half as many steps as one process needs for the same data
    for name in ("resumed", "killed"):
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)
        assert_equal(state["model"], whole["model"])
        assert state["depth"] == whole["depth"]
