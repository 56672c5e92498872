"""Made-up run folders whose numbers can be computed by hand."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from stochastic_depth_lab.report import write_report

RunWriter = Callable[..., Path]

CONFIG = {
    "name": "digits-constant",
    "title": "Digits, 14 layers",
    "data": {"dataset": "digits"},
    "model": {"num_layers": 14, "shortcut": "pad", "init": "he"},
    "depth": None,
    "recipe": {"epochs": 4, "batch_size": 64, "learning_rate": 0.1},
    "seed": 0,
    "published": None,
}
DEPTH = {
    "schedule": "linear_decay",
    "final_survival_prob": 0.5,
    "granularity": "batch",
    "rescale": "eval",
    "skipped_grad": "zero",
    "draw": "bernoulli",
}
STEPS = (10, 20, 20, 50)


def epoch_line(number: int, *, probs: list[float], slowness: float) -> dict[str, object]:
    """Epoch `number` of four; the third validates best, steps differ so that weighting shows."""
    steps = STEPS[number - 1]
    return {
        "epoch": number,
        "train_loss": 2.0 / number,
        "validation_error": [50.0, 20.0, 4.0, 6.0][number - 1],
        "validation_loss": 0.5,
        "test_error": [52.0, 21.0, 5.125, 4.5][number - 1],
        "test_loss": 0.5,
        "train_s": slowness * number,
        "realized_depth": sum(probs) + 0.01 * number,
        "realized_cost": sum(probs) / len(probs) - 0.001 * number,
        "first_conv_grad": 0.001 * number,
        "learning_rate": [0.1, 0.1, 0.01, 0.01][number - 1],
        "num_steps": steps,
        "steps_per_s": steps / (slowness * number),
        "open_counts": [round(p * steps, 6) for p in probs],
    }


def write(
    root: Path,
    folder: str = "constant",
    *,
    stochastic: bool = False,
    granularity: str = "batch",
    probs: list[float] | None = None,
    config: Mapping[str, object] | None = None,
    finished: bool = True,
    num_epochs: int = 4,
    num_parameters: int = 173_210,
) -> Path:
    """Write a run folder of 4 epochs and 4 blocks into `root`; returns its path."""
    probs = probs or ([0.875, 0.75, 0.625, 0.5] if stochastic else [1.0] * 4)
    path = root / folder
    path.mkdir(parents=True)
    own = {"name": "digits-stochastic", "depth": {**DEPTH, "granularity": granularity}} if stochastic else {}
    (path / "config.json").write_text(json.dumps({**CONFIG, **own, **(config or {})}))
    (path / "environment.json").write_text(json.dumps({"torch": "2.13.0", "command": f"train --out {folder}"}))
    branches = {
        "names": [f"layer{i}.0" for i in range(1, len(probs) + 1)],
        "survival_probs": probs,
        "expected_depth": sum(probs),
        "expected_cost": sum(probs) / len(probs),
        "expected_time": 0.75 * sum(probs) / len(probs) + 0.25,
    }
    (path / "branches.json").write_text(json.dumps(branches))
    slowness = 0.7 if stochastic else 1.0
    lines = [epoch_line(number, probs=probs, slowness=slowness) for number in range(1, num_epochs + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {
            "best_epoch": 3,
            "validation_error": 4.0,
            "test_error": 5.125,
            "final_test_error": 4.5,
            "epochs": num_epochs,
            "num_parameters": num_parameters,
        }
        (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def write_run(tmp_path: Path) -> RunWriter:
    """Writes a separate run folder for this test; returns its path."""
    return partial(write, tmp_path / "runs")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a constant-depth and a stochastic run of the same network, to be read only."""
    root = tmp_path_factory.mktemp("pair")
    return write(root, "constant"), write(root, "stochastic", stochastic=True)


@pytest.fixture(scope="session")
def pair_report(pair: tuple[Path, Path]) -> Path:
    """The page that compares them, beside them."""
    return write_report(pair)
