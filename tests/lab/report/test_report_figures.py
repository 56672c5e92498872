"""The figures: valid, not blank, the same bytes every time, and drawn from the right numbers."""

import csv
import io
import json
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from PIL import Image

from stochastic_depth_lab.report import read_run
from stochastic_depth_lab.report.figures import drawings, epochs_csv, save, survival_csv
from stochastic_depth_lab.report.theme import figure_style

NAMES = ("curves", "gradient", "survival", "expectation")


@pytest.fixture(scope="module")
def runs(pair):
    return [read_run(folder) for folder in pair]


def assert_picture(path) -> None:
    """A PNG file with something in it."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 800
        pixels = image.convert("L").resize((200, 100)).tobytes()
    assert statistics.pvariance(pixels) > 50


def texts(svg: bytes | str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_files_are_pictures_and_the_same_every_time(runs, pair_report, tmp_path):
    with figure_style():
        paths = [path for drawing in drawings(runs) for path in save(drawing.figure, tmp_path, drawing.name)]
    assert [path.name for path in paths] == [f"{name}.{form}" for name in NAMES for form in ("png", "svg")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        assert path.read_bytes() == (pair_report.parent / "figures" / path.name).read_bytes()
        if path.suffix == ".png":
            assert_picture(path)
        else:
            assert texts(path.read_bytes())


def test_constant_depth_alone_has_no_figures_of_gates(runs):
    with figure_style():
        assert [drawing.name for drawing in drawings(runs[:1])] == ["curves", "gradient"]
        assert [drawing.name for drawing in drawings(runs[1:])] == list(NAMES)


def test_figures_have_units_and_every_run(pair_report):
    shown = {name: texts((pair_report.parent / "figures" / f"{name}.svg").read_bytes()) for name in NAMES}
    for name in ("curves", "gradient"):
        assert {"digits-constant", "digits-stochastic", "epoch"} <= set(shown[name])
    assert {"training loss", "test error, % (above 25 not shown)"} <= set(shown["curves"])
    # The learning rate falls between the second and the third epoch.
    assert "→ 0.01" in shown["gradient"]
    assert "digits-stochastic: share of 100 steps" in shown["survival"]
    # Realized and expected share of depth, FLOPs and time: 2.781 / 4, 0.6875 - 0.0031, 0.7.
    assert {"0.695 (expected 0.688)", "0.684 (expected 0.688)", "0.700 (expected 0.766)"} <= set(shown["expectation"])


def test_lines_hold_the_numbers(runs):
    with figure_style():
        curves, gradient, survival, _ = (drawing.figure for drawing in drawings(runs))
    loss, error = curves.axes
    for line in loss.lines[:2]:
        assert list(line.get_ydata()) == pytest.approx([2, 1, 2 / 3, 0.5])
    for line in error.lines[:2]:
        assert list(line.get_ydata()) == [52.0, 21.0, 5.125, 4.5]
    # The learning rate's drop, then the dots at the lowest validation error.
    assert list(error.lines[2].get_xdata()) == [2.5, 2.5]
    assert [(list(dot.get_xdata()), list(dot.get_ydata())) for dot in error.lines[3:]] == [([3], [5.125])] * 2
    assert list(gradient.axes[0].lines[0].get_ydata()) == [0.001, 0.002, 0.003, 0.004]
    assert gradient.axes[0].get_yscale() == "log"
    frequencies, differences = (axes.lines[-1].get_ydata() for axes in survival.axes)
    assert list(frequencies) == pytest.approx([0.875, 0.75, 0.625, 0.5])
    assert list(differences) == pytest.approx([0, 0, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("rates", "labels"),
    [
        ((0.1, 0.07, 0.03, 0.001), []),
        ((0.1, 0.1, 0.09, 0.08), []),
        ((0.1, 0.1, 0.01, 0.001), ["→ 0.01"]),
        ((0.1, 0.01, 0.00005, 0.00005), ["→ 0.00005"]),
        ((0.1, 0.1, 0.00203125, 0.00203125), ["→ 0.00203"]),
        ((0.01, 0.1, 0.1, 0.1), []),
    ],
    ids=["falls in every epoch", "slowly", "step after a plateau", "step before a plateau", "three digits", "warm-up"],
)
def test_steps_of_the_learning_rate(write_run, rates, labels):
    folder = write_run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({**line, "learning_rate": rate}) + "\n" for line, rate in zip(lines, rates, strict=True))
    )
    with figure_style():
        gradient = drawings([read_run(folder)])[1]
    assert ("Dotted" in gradient.caption) == bool(labels)
    assert [text.get_text() for text in gradient.figure.axes[0].texts] == labels


def test_rates_that_drop_at_one_time_share_a_label(write_run):
    runs = []
    for name, rates in (
        ("a", (0.2, 0.2, 0.02, 0.02)),
        ("b", (0.02, 0.02, 0.002, 0.002)),
        ("c", (0.2, 0.2, 0.02, 0.02)),
    ):
        folder = write_run(name)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps({**line, "learning_rate": rate}) + "\n" for line, rate in zip(lines, rates, strict=True))
        )
        runs.append(read_run(folder))
    with figure_style():
        gradient = drawings(runs)[1]
    assert [text.get_text() for text in gradient.figure.axes[0].texts] == ["→ 0.02, 0.002"]


@pytest.mark.parametrize(
    "unusual",
    [
        [{}],
        [{"stochastic": True, "granularity": "sample"}],
        [{"stochastic": True, "num_epochs": 1, "finished": False}],
        [{"stochastic": True, "probs": [1 - i / 1200 for i in range(1, 601)]}],
        [{"folder": f"run{i}", "stochastic": i % 2 == 1, "config": {"seed": i}} for i in range(7)],
        [{"config": {"name": "_hidden $x_1$ \N{CJK UNIFIED IDEOGRAPH-6DF1}"}}],
    ],
    ids=["constant depth alone", "per sample", "one epoch", "600 blocks", "seven runs", "odd name"],
)
def test_unusual_runs_are_drawn(write_run, tmp_path, unusual):
    read = [read_run(write_run(**run)) for run in unusual]
    with figure_style():
        for drawing in drawings(read):
            picture, _ = save(drawing.figure, tmp_path / "figures", drawing.name)
            assert_picture(picture)
    if len(read) == 1:
        assert read[0].name in texts((tmp_path / "figures" / "curves.svg").read_bytes())


def test_all_zero_is_drawn_without_a_logarithm(write_run):
    folder = write_run()
    lines = (folder / "metrics.jsonl").read_text().replace('"train_loss": 2.0', '"train_loss": 0.0').splitlines()
    (folder / "metrics.jsonl").write_text(lines[0].replace("52.0", "0") + "\n")
    (folder / "result.json").unlink()
    with figure_style():
        curves = drawings([read_run(folder)])[0].figure
    assert curves.axes[0].get_yscale() == "linear"
    assert curves.axes[1].get_ylim() == (0, 1)


def test_csv_of_epochs_and_blocks(runs):
    epochs = list(csv.DictReader(io.StringIO(epochs_csv(runs))))
    assert [(e["run"], e["epoch"]) for e in epochs] == [
        (name, str(number)) for name in ("digits-constant", "digits-stochastic") for number in (1, 2, 3, 4)
    ]
    assert [float(e["test_error"]) for e in epochs[:4]] == [52.0, 21.0, 5.125, 4.5]
    blocks = list(csv.DictReader(io.StringIO(survival_csv(runs))))
    assert [(b["run"], b["block"], b["name"]) for b in blocks[4:6]] == [
        ("digits-stochastic", "1", "layer1.0"),
        ("digits-stochastic", "2", "layer2.0"),
    ]
    assert float(blocks[7]["realized_frequency"]) == pytest.approx(0.5)
    assert (float(blocks[7]["band_low"]), float(blocks[7]["band_high"])) == (0.40, 0.60)


def test_no_band_for_gates_per_sample(write_run):
    run = read_run(write_run(stochastic=True, granularity="sample"))
    assert [line["band_low"] for line in csv.DictReader(io.StringIO(survival_csv([run])))] == [""] * 4


def test_no_band_where_survival_changes_over_the_epochs(write_run):
    """Realized counts are then sums of different draws; in an unfinished run their means differ even from the plan."""
    folder = write_run(stochastic=True)
    config = json.loads((folder / "config.json").read_text())
    assert [line["band_low"] for line in csv.DictReader(io.StringIO(survival_csv([read_run(folder)])))] != [""] * 4
    config["depth"]["over_time"] = "early"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").unlink()
    run = read_run(folder)
    assert [line["band_low"] for line in csv.DictReader(io.StringIO(survival_csv([run])))] == [""] * 4
    assert "the expected values are means over all epochs" in run.notes[-1]


def test_nothing_global_is_left_behind_and_no_torch_needed(write_run):
    code = f"""
import sys, matplotlib
from pathlib import Path
from stochastic_depth_lab.report import write_report
keys = [key for key in matplotlib.rcParams if key != "backend"]
before = [matplotlib.rcParams[key] for key in keys]
write_report([Path({str(write_run())!r})])
assert [matplotlib.rcParams[key] for key in keys] == before
assert not {{"torch", "matplotlib.pyplot", "tkinter"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
