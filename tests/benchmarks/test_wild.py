"""The benchmark on public model code: its reference agrees with the library, and detects errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import wild  # noqa: E402
from wild_models import ENTRIES, Entry, matching  # noqa: E402

sys.path.pop(0)


@pytest.mark.slow
def test_the_driver_writes_equal_rows_for_timm_and_torchvision(tmp_path: Path) -> None:
    out = tmp_path / "table"
    command = [
        sys.executable,
        str(BENCHMARKS / "wild.py"),
        "--only",
        "timm ViT",
        "torchvision ResNet",
        "--out",
        str(out),
    ]
    root = BENCHMARKS.parent
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(out.with_suffix(".json").read_text())["reports"]
    rows = [(r["entry"], r["use"], r["branches"], r["skipped"], r["missed"], r["outcome"]) for r in reports]
    assert rows == [
        ("timm ViT", "drop paths", 6, 6, 0, "equal"),
        ("timm ViT", "additions", 6, 6, 0, "equal"),
        ("torchvision ResNet", "additions", 4, 4, 0, "equal"),
    ]
    assert "16 branches: 16 (100.0%) are skipped" in done.stdout
    assert out.with_suffix(".md").read_text() in done.stdout


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def entry(model: nn.Module, ends: tuple[str, ...], additions: int) -> Entry:
    return Entry("here", ("torch",), lambda _rate: (model, [torch.randn(3, 4)]), additions, ends, 0, 0.5)


def test_a_branch_that_the_engineer_did_not_count_is_named_and_a_counted_one_that_is_not_found_is_missed() -> None:
    # The first linear map ends no branch: without it, the second one's bias is left.
    report = wild.examine(entry(nn.Sequential(Block(), Block()), ("*.first",), 2), "additions")
    assert (report.outcome, report.found, report.missed, len(report.others)) == ("unclear", 2, 2, 2)
    report = wild.examine(entry(nn.Sequential(Block(), Block()), ("*.second",), 2), "additions")
    assert (report.outcome, report.missed, report.others) == ("equal", 0, [])


def test_a_wrong_count_and_a_refusal_are_told_apart() -> None:
    assert wild.examine(entry(Block(), ("second",), 2), "additions").outcome == "entry"
    report = wild.examine(entry(nn.Sequential(nn.Linear(4, 4)), ("0",), 1), "additions")
    assert (report.outcome, report.missed) == ("refused", 1)
    assert "No residual branch was found" in report.messages[0]


def test_wrong_numbers_deviate(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients_of = wild.gradients_of

    def slightly_wrong(run: object, model: nn.Module, inputs: list[Tensor], *but: object) -> object:
        outputs, gradients = gradients_of(run, model, inputs, *but)
        if isinstance(run, nn.Module):  # the library's
            gradients["second.weight"] = gradients["second.weight"] + 1e-6
        return outputs, gradients

    monkeypatch.setattr(wild, "gradients_of", slightly_wrong)
    report = wild.examine(entry(Block(), ("second",), 1), "additions")
    assert report.outcome == "deviates"
    assert report.gradient_deviation is not None
    assert report.gradient_deviation > 1e-9
    assert report.output_deviation == 0


# Python 3.12 warns of forks beside threads, which the libraries that tests import leave behind.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_dies_or_hangs_is_a_row() -> None:
    hanging = dataclasses.replace(ENTRIES["timm ViT"], make=lambda _rate: __import__("time").sleep(60))
    assert wild.in_a_process(hanging, "additions", 1.0).outcome == "time limit"
    dying = dataclasses.replace(ENTRIES["timm ViT"], make=lambda _rate: os._exit(3))
    report = wild.in_a_process(dying, "additions", 60.0)
    assert (report.outcome, report.messages) == ("crash", ["the process ended with exit code 3"])


def test_patterns_are_names_or_children_of_a_class() -> None:
    model = nn.Sequential(Block(), nn.Sequential(Block()))
    assert matching(model, ["Block:second"]) == ["0.second", "1.0.second"]
    assert matching(model, ["*.first"]) == ["0.first"]
    with pytest.raises(AssertionError, match="matches no module"):
        matching(model, ["Block:third"])
