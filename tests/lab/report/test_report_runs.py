"""Reading run folders: intact ones are read exactly, damaged ones are refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stochastic_depth_lab.report import ReportError, read_run
from stochastic_depth_lab.report.figures import drawings
from stochastic_depth_lab.report.runs import labels, read_runs, run_folders
from stochastic_depth_lab.report.theme import MUTED, figure_style


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_line(folder: Path, number: int, change: Callable[[str], str]) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ReportError) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_numbers_are_weighted_by_steps(write_run):
    run = read_run(write_run("s", stochastic=True))
    # Steps 10, 20, 20, 50: the mean of the epochs' numbers is (10*1 + 20*2 + 20*3 + 50*4) / 100 = 3.1
    assert run.num_steps == 100
    assert run.first_conv_grad == pytest.approx(0.0031)
    assert run.realized_depth == pytest.approx(2.75 + 0.031)
    assert run.realized_cost == pytest.approx(0.6875 - 0.0031)
    assert run.train_s == pytest.approx(0.7 * (1 + 2 + 3 + 4))
    assert run.open_frequencies == pytest.approx((0.875, 0.75, 0.625, 0.5))


def test_unfinished_run_takes_its_own_lowest_validation_error(write_run):
    run = read_run(write_run(finished=False, num_epochs=2))
    assert (run.best_epoch, run.validation_error, run.test_error) == (2, 20.0, 21.0)
    assert run.notes == ("unfinished: 2 of 4 epochs so far",)


def test_finished_run_may_validate_more_often_than_once_an_epoch(write_run):
    folder = write_run()
    edit(folder / "result.json", best_epoch=4, validation_error=3.0, test_error=4.75)
    run = read_run(folder)
    assert (run.best_epoch, run.validation_error, run.test_error) == (4, 3.0, 4.75)
    assert run.notes == ()


def test_first_of_equal_validation_errors(write_run):
    folder = write_run(finished=False)
    edit_line(folder, 4, lambda line: line.replace('"validation_error": 6.0', '"validation_error": 4.0'))
    assert read_run(folder).best_epoch == 3


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["a brace", "a part", "all but a brace"])
def test_a_cut_off_last_line_is_skipped_with_a_note(write_run, kept):
    folder = write_run(finished=False)
    whole = (folder / "metrics.jsonl").read_text()
    last = whole.splitlines()[-1]
    (folder / "metrics.jsonl").write_text(whole.removesuffix(last + "\n") + last[:kept])
    run = read_run(folder)
    assert len(run.epochs) == 3
    assert run.notes[0] == "the last line of metrics.jsonl is cut off, as a killed run leaves it, and is left out"


def test_last_line_without_line_feed_counts(write_run):
    folder = write_run()
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().rstrip("\n"))
    assert len(read_run(folder).epochs) == 4


def test_not_a_run_folder(write_run, tmp_path):
    assert_refused(tmp_path / "nowhere", "is not a run folder: it has no config.json")


@pytest.mark.parametrize("content", [None, "", '{"epoch": 1'], ids=["missing", "empty", "cut off"])
def test_no_finished_epoch(write_run, content):
    folder = write_run(finished=False)
    (folder / "metrics.jsonl").unlink()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    assert_refused(folder, str(folder), "no epoch has finished yet")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda line: line[:40], "not JSON"),
        (lambda _: "", "not JSON"),
        (lambda _: "[1, 2]", "it should be an object, but is '[1, 2]'"),
        (lambda line: line.replace('"epoch": 2', '"epoch": 3'), "epoch 3"),
        (
            lambda line: line.replace('"train_loss": 1.0', '"train_loss": NaN'),
            "a finite number, but is 'nan'",
        ),
        (
            lambda line: line.replace('"train_loss": 1.0', '"train_loss": "low"'),
            "a valid number, but is 'low'",
        ),
        (
            lambda line: line.replace('"train_loss": 1.0', '"train_loss": true'),
            "a valid number, but is 'True'",
        ),
        (
            lambda line: line.replace('"num_steps": 20', '"num_steps": 0'),
            "num_steps should be greater",
        ),
        (lambda line: line.replace('"train_loss"', '"loss"'), "has no train_loss"),
        (lambda line: line.replace('"open_counts": [20.0, ', '"open_counts": ['), "3 entries for 4 branches"),
    ],
    ids=["cut", "empty", "list", "epoch", "nan", "text", "bool", "no steps", "missing", "counts"],
)
def test_damaged_line_is_named(write_run, change, why):
    folder = write_run(finished=False)
    edit_line(folder, 2, change)
    assert_refused(folder, "metrics.jsonl, line 2,", why)


@pytest.mark.parametrize("name", ["config.json", "branches.json", "environment.json", "result.json"])
def test_damaged_file_is_named(write_run, name):
    folder = write_run()
    (folder / name).write_bytes(b"\xff\xfe{")
    assert_refused(folder, name, "not JSON")


@pytest.mark.parametrize("name", ["branches.json", "environment.json"])
def test_missing_file_is_named(write_run, name):
    folder = write_run()
    (folder / name).unlink()
    assert_refused(folder, f"has no {name}")


@pytest.mark.parametrize(
    ("file", "changes", "why"),
    [
        ("config.json", {"name": 3}, "name should be a valid string, but is '3'"),
        ("config.json", {"depth": "linear"}, "depth should be an object, but is 'linear'"),
        ("config.json", {"published": {"test_error": 5.0}}, "it has no published.source"),
        ("branches.json", {"names": []}, "at least 1 item"),
        ("branches.json", {"survival_probs": [0.5]}, "1 probabilities for 4 names"),
        (
            "branches.json",
            {"survival_probs": [0.5, 0.5, 0.5, 1.5]},
            "or equal to 1, but is '1.5'",
        ),
        ("result.json", {"epochs": 9}, "9 epochs, metrics.jsonl 4"),
        ("result.json", {"best_epoch": 5}, "best_epoch is 5 of 4"),
    ],
)
def test_wrong_value_is_named(write_run, file, changes, why):
    folder = write_run()
    edit(folder / file, **changes)
    assert_refused(folder, file, why)


def test_runs_given_twice_or_not_at_all(write_run):
    folder = write_run()
    with pytest.raises(ReportError, match="given twice"):
        read_runs([folder, folder / ".." / folder.name])
    with pytest.raises(ReportError, match="no run folder"):
        read_runs([])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"name": "a"}, {"name": "b"}, ("a", "b")),
        ({"name": "a", "seed": 0}, {"name": "a", "seed": 1}, ("a, seed 0", "a, seed 1")),
        ({"name": "a"}, {"name": "a"}, ("a, one", "a, two")),
        ({"name": "c"}, {"name": "a\nb\x00"}, ("c", "a\ufffdb\ufffd")),
        ({"name": "x" * 50}, {"name": "y" * 50}, ("one", "two")),
        ({"name": "x" * 50, "seed": 0}, {"name": "x" * 50, "seed": 1}, ("seed 0", "seed 1")),
        (
            {"name": "x" * 50, "recipe": {"learning_rate": 0.1, "weight_decay": 1e-4, "epochs": 4}},
            {"name": "y" * 50, "recipe": {"learning_rate": 0.05, "weight_decay": 0.00125, "epochs": 4}},
            ("lr 0.1 · wd 1e-4", "lr 0.05 · wd 0.00125"),
        ),
    ],
    ids=["names", "seeds", "folders", "unprintable", "long", "long, seeds", "long, settings"],
)
def test_labels_tell_runs_apart(write_run, first, second, expected):
    assert labels([read_run(write_run("one", config=first)), read_run(write_run("two", config=second))]) == expected


def test_a_sweep_over_three_fields_has_a_label_for_each_of_its_runs(write_run):
    """The names that `sweep --grid` gives, which are too long to be shown."""
    combinations = [(p, wd, draw) for p in (0.3, 0.7) for wd in (1e-4, 0.0) for draw in ("bernoulli", "equal_cost")]
    runs = []
    for p, wd, draw in combinations:
        name = f"digits-stochastic-final-survival-prob-{p}-weight-decay-{wd}-draw-{draw}"
        config = {
            "name": name,
            "depth": {"schedule": "linear_decay", "final_survival_prob": p, "granularity": "batch", "draw": draw},
            "recipe": {"epochs": 4, "weight_decay": wd},
        }
        runs.append(read_run(write_run(f"{name}-seed-0", stochastic=True, config=config)))
    assert labels(runs)[:3] == (
        "p_L 0.3 · bernoulli · wd 1e-4",
        "p_L 0.3 · equal cost · wd 1e-4",
        "p_L 0.3 · bernoulli · wd 0",
    )
    assert len(set(labels(runs))) == 8
    with figure_style():
        curves = drawings(runs)[0]
    looks = {
        (line.get_color(), line.get_linestyle()) for line in curves.figure.axes[0].lines if line.get_color() != MUTED
    }
    assert len(looks) == 8


def test_a_folder_of_runs_stands_for_its_runs(write_run, tmp_path):
    one, two = write_run("b"), write_run("a", stochastic=True)
    (one.parent / "begun").mkdir()
    (one.parent / "begun" / "config.json").write_text("{}")
    assert run_folders([one.parent]) == ([two, one], [one.parent / "begun"])
    assert run_folders([one, two]) == ([one, two], [])
    study = tmp_path / "study" / "runs"
    study.mkdir(parents=True)
    one.rename(study / "b")
    assert run_folders([tmp_path / "study"]) == ([study / "b"], [])
    two.rename(tmp_path / "a")
    with pytest.raises(ReportError, match=r"no run in .* has finished an epoch yet"):
        run_folders([two.parent])


def test_a_run_of_an_older_version_has_no_expected_time(write_run):
    folder = write_run(stochastic=True)
    assert read_run(folder).expected_time == 0.75 * 0.6875 + 0.25
    branches = json.loads((folder / "branches.json").read_text())
    del branches["expected_time"]
    (folder / "branches.json").write_text(json.dumps(branches))
    run = read_run(folder)
    assert run.expected_time is None
    with figure_style():
        assert "expectation" in [drawing.name for drawing in drawings([run])]
