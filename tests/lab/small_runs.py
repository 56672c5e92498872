"""Runs of about a second: 14 layers on a hundred digits, and functions to compare two runs."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stochastic_depth_lab.after import evaluation, trained
from stochastic_depth_lab.experiments import find
from stochastic_depth_lab.experiments.config import Depth, Experiment
from stochastic_depth_lab.training import loop, setup

CPU = torch.device("cpu")
TIMES = ("train_s", "process_s", "steps_per_s")


class Silent:
    """An observer that records its callbacks."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.rows: list[dict[str, Any]] = []
        self.remarks: list[str] = []

    def on_start(self, _experiment: Experiment, _num_steps: int, epoch: int, step: int) -> None:
        self.starts.append((epoch, step))

    def on_steps(self, epoch: int, step: int, train_loss: float) -> None: ...

    def on_epoch(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def on_remark(self, remark: str) -> None:
        self.remarks.append(remark)


STOCHASTIC = Depth()


def small(depth: Depth | None = STOCHASTIC, **recipe: Any) -> Experiment:
    """Four epochs of seven steps, the last of which is shorter."""
    digits = find("digits-constant")
    return replace(
        digits,
        name="small",
        depth=depth,
        data=replace(digits.data, images_per_class=None, limit=100),
        model=replace(digits.model, num_layers=14),
        recipe=replace(
            digits.recipe, **{"epochs": 4, "epoch_passes": 1, "batch_size": 16, "learning_rate": 0.02, **recipe}
        ),
    )


def train(experiment: Experiment, folder: Path, **options: Any) -> dict[str, Any]:
    return loop.train(experiment, folder, [options.pop("observer", Silent())], device=CPU, **options)


@contextmanager
def float64() -> Generator[None]:
    """Within, runs train and evaluate in float64.

    Another processor adds in another order, and training amplifies the difference: two float32 trajectories agree to
    any fixed tolerance on one machine and not on the next.
    """
    plain = setup.build_network

    def built(*arguments: Any) -> Any:
        model, depth = plain(*arguments)
        model.double().register_forward_pre_hook(lambda _module, inputs: inputs[0].double())
        return model, depth

    with pytest.MonkeyPatch.context() as patch:
        for module in (setup, evaluation, trained):
            patch.setattr(module, "build_network", built)
        yield


def outcome(folder: Path) -> dict[str, Any]:
    """Everything in a run folder that must be the same after an interruption: weights and numbers, except times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return {
        "metrics": [{name: value for name, value in row.items() if name not in TIMES} for row in rows],
        "result": {name: value for name, value in result.items() if name not in TIMES},
        "best": torch.load(folder / "checkpoints" / "best.pt", weights_only=True),
        **{name: last[name] for name in ("model", "optimizer", "gates", "scaler", "epoch", "best")},
    }


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal bit for bit, all the way down."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_same(left[name], right[name], f"{where}.{name}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where
