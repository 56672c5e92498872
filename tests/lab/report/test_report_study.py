"""A study's page: means, deviations and published numbers as computed by hand; missing runs are mentioned."""

import csv
import html
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from stochastic_depth_lab.experiments import find
from stochastic_depth_lab.experiments.config import Claim, Comparison, Data, Depth, Experiment, Model, Published, Study
from stochastic_depth_lab.report import ReportError, write_study
from stochastic_depth_lab.report.figures import rendered
from stochastic_depth_lab.report.study.figures import Cell, crossing, heat_map, survival_curve
from stochastic_depth_lab.report.study.rule_of_thumb import LOSS, PASSES, bound_of, rule_of_thumb, sentences
from stochastic_depth_lab.report.study.verdicts import RULE
from stochastic_depth_lab.report.theme import figure_style

DIGITS = replace(find("digits-constant"), data=Data("digits"), model=Model(110))
CONSTANT = replace(DIGITS, name="constant", title="Constant", published=Published(6.41, "x", 20.7))
STOCHASTIC = replace(DIGITS, name="linear-0.5", title="Linear <0.5>", depth=Depth(), published=Published(5.23, "x"))
ERRORS = {("constant", 0): 10.0, ("constant", 1): 12.0, ("linear-0.5", 0): 9.0, ("linear-0.5", 1): 9.5}


def with_error(folder: Path, test_error: float) -> Path:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "test_error": test_error}))
    return folder


@pytest.fixture
def folders(write_run) -> list[tuple[Experiment, Path]]:
    return [
        (
            replace(experiment, seed=seed),
            with_error(
                write_run(f"{experiment.name}-{seed}", stochastic=experiment is STOCHASTIC, config={"seed": seed}),
                ERRORS[experiment.name, seed],
            ),
        )
        for experiment in (CONSTANT, STOCHASTIC)
        for seed in (0, 1)
    ]


CLAIMS = (Claim("Less error.", (Comparison("linear-0.5", "constant"), Comparison("not", "there"))),)
STUDY = Study("table", "A table", "The paper says so.", (CONSTANT, STOCHASTIC), (), ("curves", "survival_curve"))


def test_the_table_is_the_papers_with_ours_beside_it(folders, tmp_path):
    report = write_study(STUDY, folders, tmp_path / "out")
    lines = [re.split(r"\s{2,}", line) for line in report.text.splitlines()]
    std = statistics.stdev([10.0, 12.0])
    assert lines[3][1:5] == ["%", "%", "loss", "n"]
    assert lines[4][:5] == ["Constant", "6.41", f"11.00 ± {std:.2f}", "0.5000", "2"]
    assert "20:42:00" in lines[4]
    assert lines[5][:5] == ["Linear <0.5>", "5.23", "9.25 ± 0.35", "0.5000", "2"]
    assert "0.700" in lines[5]  # of the constant runs' seconds, by the made-up epochs
    page = report.page.read_text()
    assert page == (tmp_path / "out" / "table.html").read_text()
    assert "Linear &lt;0.5&gt;" in page
    assert "<0.5>" not in page
    assert page.count("<script>") == 1  # sorts the table
    assert "The paper says so. Ours: mean and standard deviation over 2 seeds of each." in page
    for link in re.findall(r'href="([^"#]+)"', page):
        held = link.startswith("data:") or link == "https://arxiv.org/abs/1603.09382"
        assert held or (tmp_path / "out" / link).is_file(), link
        assert held or link.endswith("report.html"), link  # pages of runs; the page's own files are in it
    (row,) = re.findall(r'<th scope="row">Linear.*?</th>', page)
    pages = [(word, (tmp_path / "out" / link).resolve()) for link, word in re.findall(r'href="([^"]+)">([^<]+)<', row)]
    assert pages == [(f"seed {seed}", folders[2 + seed][1] / "report.html") for seed in (0, 1)]
    rows = list(csv.DictReader((tmp_path / "out" / "table" / "data" / "runs.csv").read_text().splitlines()))
    assert [(row["experiment"], int(row["seed"]), float(row["test_error"])) for row in rows] == [
        (name, seed, error) for (name, seed), error in ERRORS.items()
    ]


def test_missing_runs_are_mentioned(folders, tmp_path):
    (folders[1][1] / "result.json").unlink()
    (folders[2][1] / "result.json").unlink()
    (folders[2][1] / "failed.json").write_text("{}")
    text = write_study(STUDY, folders, tmp_path / "out").text
    assert "constant, seed 1: is not finished" in text
    assert "linear-0.5, seed 0: failed" in text
    assert "10.00 " in text
    for _, folder in folders:
        (folder / "result.json").unlink(missing_ok=True)
    with pytest.raises(ReportError, match="none of its 4 runs is finished"):
        write_study(STUDY, folders, tmp_path / "out")


def test_few_images_are_judged_after_the_last_step(folders, tmp_path):
    study = replace(STUDY, figures=("gap",), claims=CLAIMS)
    data = Data("digits", images_per_class=20)
    few = [(replace(each, data=data, published=None), folder) for each, folder in folders]
    report = write_study(study, few, tmp_path / "out", {"nearest neighbor": [4.0, 6.0]})
    assert "4.50 ± 0.00" in report.text  # of the last epoch, not that of the lowest validation error
    assert "nearest neighbor" in report.text
    assert "5.00 ± 1.41" in report.text
    assert max(map(len, report.text.splitlines())) <= 80
    rows = list(csv.DictReader((tmp_path / "out" / "table" / "data" / "runs.csv").read_text().splitlines()))
    assert [row["experiment"] for row in rows[-2:]] == ["nearest neighbor"] * 2
    assert [float(row["test_error"]) for row in rows[-2:]] == [4.0, 6.0]


def test_verdicts_pair_the_seeds(folders, tmp_path):
    report = write_study(replace(STUDY, claims=CLAIMS), folders, tmp_path / "out")
    text, page = report.text, report.page.read_text()
    assert "<strong>undecided</strong>: Less error." in page
    assert RULE in html.unescape(page)
    # 9.0 - 10.0 and 9.5 - 12.0: the mean is -1.75, and two seeds decide nothing.
    assert "UNDECIDED: Less error." in text
    assert "-1.75 points" in text
    assert "lower in 2 of 2 seeds" in " ".join(text.split())
    (row,) = csv.DictReader((tmp_path / "out" / "table" / "data" / "verdicts.csv").read_text().splitlines())
    assert (row["verdict"], float(row["mean_difference"]), row["num_lower"]) == ("undecided", -1.75, "2")


def test_the_survival_curve_goes_through_the_means():
    errors = {"linear_decay": {0.5: [9.0, 10.0], 0.2: [12.0]}, "uniform": {0.5: [20.0]}}
    with figure_style():
        drawing = survival_curve(errors, [11.0, 13.0])
        (axes,) = drawing.figure.axes
        lines = [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axes.lines]
        assert ((0.2, 0.5), (12.0, 9.5)) in lines
        assert ((0, 1), (12.0, 12.0)) in lines  # constant depth, from edge to edge
        assert ((0.5,), (20.0,)) in lines
        assert b"uniform" in rendered(drawing.figure, "svg")


def test_the_heat_map_holds_every_mean_and_marks_the_lowest():
    with figure_style():
        drawing = heat_map({(8, 0.5): [30.0, 32.0], (8, 1.0): [40.0], (14, 0.5): [20.0]})
        (axes,) = drawing.figure.axes
        texts = {(text.get_position(), text.get_text(), text.get_fontweight()) for text in axes.texts}
    assert texts == {
        ((0.5, 0.5), "31.00", "bold"),
        ((1.5, 0.5), "40.00", "normal"),
        ((0.5, 1.5), "20.00", "bold"),
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "constant"]


def test_a_heat_maps_colors_survive_the_page(folders, tmp_path):
    study = replace(STUDY, figures=("heat_map",))
    page = write_study(study, folders, tmp_path / "out").page.read_text()
    assert "fill: #" in page
    assert "9.25" in page


def test_figures_of_several_networks_have_names_of_their_own(folders, tmp_path):
    (constant, first), *_ = folders
    other = replace(constant, model=replace(constant.model, num_layers=20), depth=Depth())
    write_study(STUDY, [(constant, first), (replace(other, name="other"), folders[2][1])], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "table" / "figures").glob("*.png")}
    assert names == {"curves-digits-110.png", "curves-digits-20.png", "survival_curve.png"}


def test_rates_are_chosen_for_each_network_on_the_seeds_that_all_its_rates_have(write_run, tmp_path):
    validation_errors = {  # by layers, rate and seed
        (110, 0.1): {0: 9.0, 1: 9.0},
        (110, 0.2): {0: 8.0, 1: 9.5},
        (20, 0.1): {0: 6.0, 1: 1.0},
        (20, 0.2): {0: 7.0},
    }
    folders = []
    for (num_layers, rate), errors in validation_errors.items():
        experiment = replace(
            CONSTANT,
            name=f"{num_layers}-{rate}",
            model=Model(num_layers),
            recipe=replace(CONSTANT.recipe, learning_rate=rate),
        )
        for seed, error in errors.items():
            folder = write_run(f"{experiment.name}-{seed}", config={"seed": seed})
            *first, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
            lines = (*first, {**last, "validation_error": error})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            folders.append((replace(experiment, seed=seed), folder))
    study = replace(STUDY, figures=("rates",), claims=())
    report = write_study(study, folders, tmp_path / "out")
    assert "Chosen for 110 layers by the mean validation error: constant depth 0.2 (n = 2)." in report.text
    assert "Chosen for 20 layers by the mean validation error: constant depth 0.1 (n = 1)." in report.text
    names = {path.name for path in (tmp_path / "out" / "table" / "figures").glob("*.png")}
    assert names == {"rates-digits-110.png", "rates-digits-20.png"}
    one = write_study(study, folders[:4], tmp_path / "one")
    assert "Chosen by the mean validation error: constant depth 0.2 (n = 2)." in one.text


def test_rates_are_chosen_for_each_number_of_steps(write_run, tmp_path):
    folders = []
    for num_steps, rate, error in ((60, 0.1, 2.0), (60, 0.2, 3.0), (1200, 0.1, 1.0), (1200, 0.2, 0.5)):
        recipe = replace(CONSTANT.recipe, learning_rate=rate)
        experiment = replace(CONSTANT, name=f"{num_steps}-{rate}", model=Model(20), recipe=recipe)
        folder = write_run(experiment.name)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        changed = [{**row, "num_steps": num_steps // len(rows), "validation_error": error} for row in rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        folders.append((experiment, folder))
    text = write_study(replace(STUDY, figures=("rates",), claims=()), folders, tmp_path / "out").text
    text = " ".join(text.split())
    assert "Chosen for 20 layers, 60 steps by the mean validation error: constant depth 0.1 (n = 1)." in text
    assert "Chosen for 20 layers, 1,200 steps by the mean validation error: constant depth 0.2 (n = 1)." in text
    names = {path.name for path in (tmp_path / "out" / "table" / "figures").glob("*.png")}
    assert names == {"rates-digits-20-60.png", "rates-digits-20-1200.png"}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_wide_table_fits_the_terminal(folders, tmp_path, width):
    titles = {"constant": "CIFAR-10 without augmentation, constant depth", "linear-0.5": "CIFAR-10, linear, p_L = 0.5"}
    named = [(replace(each, title=titles[each.name]), folder) for each, folder in folders]
    study = replace(STUDY, title="Test error " * 20, figures=("curves", "gradient"), claims=CLAIMS)
    text = write_study(study, named, tmp_path / "out", run_pages=False, width=width).text
    assert all(len(line) <= width for line in text.splitlines()), text
    together = " ".join(text.split())
    for number in ("6.41", "5.23", "11.00 ± 1.41", "9.25 ± 0.35", "20:42:00", "0.700", "2.75 / 2.78"):
        assert number in together


def test_where_stochastic_depth_breaks_even():
    """Two lengths with 100 images, three with 200; with 200 it is worse up to a loss of 0.5."""
    cells = [
        Cell(100, 10, (-1.0, -3.0), 0.2, 5),
        Cell(100, 30, (-4.0,), 0.01, 15),
        Cell(200, 10, (1.0, 3.0), 2.0, 2),
        Cell(200, 30, (2.0,), 0.5, 8),
        Cell(200, 100, (-6.0,), 0.001, 25),
    ]
    with figure_style():
        axes = crossing("digits", cells).figure.axes[0]
        (line,) = axes.lines
        # Two of eight points of the way from 30 to 100 steps, in the middle of these columns.
        assert line.get_xydata().tolist() == [[1.75, 1.5]]
        assert [text.get_text().replace("\N{MINUS SIGN}", "-") for text in axes.texts] == [
            "-2.0",
            "-4.0",
            "+2.0",
            "+2.0",
            "-6.0",
        ]
        assert bound_of(LOSS, cells) == pytest.approx((0.2 * 0.5) ** 0.5)
        assert bound_of(PASSES, cells) == pytest.approx((2 * 5) ** 0.5)
        drawn = rule_of_thumb("digits", cells).figure.axes
    for axes, sign in zip(drawn, (LOSS, PASSES), strict=True):
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [bound_of(sign, cells)]
    of_loss, of_passes = sentences("digits", cells)
    assert of_loss == (
        "digits: stochastic depth has the lower mean error in 3 of 3 settings in which the training loss of constant "
        "depth ends below 0.32, and in 0 of 2 others."
    )
    # One is on the wrong side in any case: five passes helped, eight did not.
    assert of_passes == (
        "digits: stochastic depth has the lower mean error in 3 of 4 settings in which training passes more than 3.2 "
        "times over its images, and in 0 of 1 others."
    )


@pytest.mark.parametrize("means", [(-1.0, -2.0, -3.0), (1.0, 2.0, 3.0), (1.0, -2.0, -3.0), (-1.0,)])
def test_nothing_separates_what_is_all_better_or_the_wrong_way_round(means):
    cells = [
        Cell(100, 10 * (index + 1), (mean,), 0.1 * (index + 1), 10 / (index + 1)) for index, mean in enumerate(means)
    ]
    with figure_style():
        drawn = rule_of_thumb("digits", cells).figure.axes
    for sign, axes in zip((LOSS, PASSES), drawn, strict=True):
        assert bound_of(sign, cells) is None
        assert not [line for line in axes.lines if line.get_linestyle() == "--"]
    of_loss, of_passes = sentences("digits", cells)
    assert of_loss.endswith("No final training loss of constant depth separates these from the others.")
    assert of_passes.endswith("No number of passes over the training images separates these from the others.")
