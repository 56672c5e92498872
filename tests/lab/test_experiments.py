"""Named experiments: all of them, by name, and every one with --quick."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.experiments import EXPERIMENTS, STUDIES, few, find, find_pair, find_study
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.experiments.config import Experiment, as_json, differences, from_json
from stochastic_depth_lab.experiments.scales import quick, small

PUBLISHED = {  # PAPER.md
    "cifar10-110": (6.41, 5.23),
    "cifar10-1202": (6.72, 4.91),
    "cifar100-110": (27.22, 24.58),
    "svhn-152": (2.01, 1.75),
    "imagenet-152": (21.78, 21.98),
    "cifar10-unaugmented-110": (13.63, 11.66),
    "cifar100-unaugmented-110": (44.74, 37.80),
}
PAIRS = [name.removesuffix("-constant") for name in EXPERIMENTS if name.endswith("-constant")]


def test_the_promised_experiments_exist():
    families = [f"cifar{classes}-{layers}" for classes in (10, 100) for layers in (20, 32, 44, 56, 110, 1202)]
    assert set(PAIRS) >= {"digits", "svhn-152", "imagenet-152", *families}
    assert len(EXPERIMENTS) == 2 * len(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_differs_in_nothing_but_depth(name):
    constant, stochastic = find_pair(name)
    fields = [line.partition(":")[0] for line in differences(as_json(constant), as_json(stochastic))]
    assert fields
    if name == "imagenet-152":  # 30 more epochs with stochastic depth, as in the paper
        fields = [field for field in fields if field not in ("recipe.epochs", "recipe.lr_drops")]
    if constant.data.images_per_class is not None:  # each has the rate that is best for it
        fields = [field for field in fields if field != "recipe.learning_rate"]
    assert all(field.startswith("depth") for field in fields)
    results = [each.published.test_error for each in (constant, stochastic) if each.published]
    assert results == list(PUBLISHED.get(name, ()))


def test_the_deepest_networks_differ_in_nothing_but_their_images():
    for kind in ("constant", "stochastic"):
        one, other = (as_json(find(f"{data}-1202-{kind}")) for data in ("cifar10", "cifar100"))
        assert differences(one, other) == ["data.dataset: cifar100, not cifar10"]


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_an_experiment_survives_its_file(experiment: Experiment):
    check(experiment)
    assert find(experiment.name) is experiment
    assert from_json(json.loads(json.dumps(asdict(experiment)))) == experiment
    assert quick(experiment).recipe.epochs >= 5
    if experiment.data.images_per_class is not None:
        assert quick(experiment).recipe.batch_size == 11  # two batches of 20 images
    assert quick(experiment).model == experiment.model


def test_differences_are_named_once_and_what_an_older_version_did_not_know_is_its_default():
    constant, stochastic = map(as_json, find_pair("cifar10-20"))
    assert differences(constant, stochastic) == [
        "depth: linear_decay 0.5 batch eval zero bernoulli constant 0.5, not none"
    ]
    assert differences(stochastic, constant) == [
        "depth: none, not linear_decay 0.5 batch eval zero bernoulli constant 0.5"
    ]
    older = {name: value for name, value in constant.items() if name != "initial_weights"}
    older["recipe"] = {name: value for name, value in constant["recipe"].items() if name != "num_threads"}
    newer = {**constant, "recipe": {**constant["recipe"], "num_threads": 1}}
    assert differences({**newer, "initial_weights": "ab"}, older) == [
        "recipe.num_threads: none, not 1",
        "initial_weights: none, not ab",
    ]
    with pytest.raises(ValueError, match="not the configuration of an experiment of this version"):
        differences(constant, {**constant, "newer": 1})
    with pytest.raises(ValueError, match=r"of this version: it has no recipe\.$"):
        from_json({name: value for name, value in constant.items() if name != "recipe"})


def test_the_recipe_is_the_papers():
    assert asdict(find("cifar10-110-stochastic")) == {
        "name": "cifar10-110-stochastic",
        "title": "CIFAR-10, 110 layers, stochastic depth",
        "data": {
            "dataset": "cifar10",
            "normalization": "channel",
            "translation": 4,
            "flip": True,
            "num_validation": None,
            "split_seed": 0,
            "images_per_class": None,
            "num_test": None,
            "limit": None,
            "image_size": None,
            "num_workers": 8,
        },
        "model": {"num_layers": 110, "family": "cifar", "shortcut": "pad", "init": "he", "keep": None},
        "depth": {
            "schedule": "linear_decay",
            "final_survival_prob": 0.5,
            "granularity": "batch",
            "rescale": "eval",
            "skipped_grad": "zero",
            "draw": "bernoulli",
            "over_time": "constant",
            "turn": 0.5,
        },
        "recipe": {
            "epochs": 500,
            "epoch_passes": 1,
            "batch_size": 128,
            "learning_rate": 0.1,
            "lr_schedule": "step_text",
            "lr_drops": (0.5, 0.75),
            "warmup_epochs": 0,
            "warmup_learning_rate": 0.01,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "validate_every": None,
            "num_threads": None,
            "batch_norm": "local",
            "checkpoint_every": 200,
        },
        "precision": "fp32",
        "seed": 0,
        "initial_weights": None,
        "regularizers": {"activation_survival_prob": 1.0, "filter_survival_prob": 1.0, "filter_penalty": 0.0},
        "published": {
            "test_error": 5.23,
            "source": "Huang et al. 2016, table of results, as given by public summaries",
            "train_h": 15 + 7 / 60,
        },
    }
    assert find("cifar10-1202-constant").recipe.warmup_epochs == 10
    svhn = find("svhn-152-stochastic")
    assert (svhn.recipe.epochs, svhn.recipe.validate_every, svhn.recipe.lr_drops) == (50, 200, (0.6, 0.7))
    assert (svhn.data.translation, svhn.data.flip) == (0, False)


def test_names_need_no_torch():
    code = "import sys, stochastic_depth_lab.experiments; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# The deepest take a minute each: two epochs are enough to see them learn at both rates, and one of two that differ in
# nothing but depth, or but the images, stands for the other (tested above).
DEEPEST = {"cifar10-1202-stochastic", "cifar100-1202-constant", "imagenet-152-stochastic"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in DEEPEST else ())
        for name in EXPERIMENTS
        if name in DEEPEST or name.rpartition("-")[0] not in ("cifar10-1202", "cifar100-1202", "imagenet-152")
    ],
)
def test_every_experiment_trains_quickly(name, made_up_data_root, tmp_path: Path, capsys):
    fewer = ["--recipe.epochs", "2"] if name in DEEPEST else []
    assert main(["train", name, "--quick", *fewer, "--out", str(tmp_path / "run")]) == 0
    experiment = quick(find(name))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 3 if name in DEEPEST else 6))
    branches = json.loads((tmp_path / "run" / "branches.json").read_text())
    convolutions = 2 if experiment.model.family == "cifar" else 3
    assert len(branches["names"]) == (experiment.model.num_layers - 2) // convolutions
    for row in rows:
        assert 0 < row["realized_depth"] <= len(branches["names"])
        assert sum(row["open_counts"]) == pytest.approx(row["realized_depth"] * row["num_steps"])
        assert (row["realized_cost"] == 1) == (experiment.depth is None)
    assert "test error" in capsys.readouterr().out


def test_the_papers_tables_and_figures_are_there():
    assert list(STUDIES)[:7] == ["digits", "table1", "table2", "curves", "gradients", "survival", "depth-survival"]
    table2 = STUDIES["table2"]
    hours = [each.published.train_h for each in table2.experiments if each.published]
    assert [f"{int(h)} h {round(h % 1 * 60)}" for h in hours if h] == [
        "20 h 42", "15 h 7", "20 h 51", "15 h 20", "33 h 43", "25 h 33",
    ]  # fmt: skip
    errors = [each.published.test_error for each in STUDIES["table1"].experiments if each.published]
    assert errors == [6.41, 5.23, 6.72, 4.91, 27.22, 24.58, 2.01, 1.75, 21.78, 21.98]
    assert [each.name for each in STUDIES["curves"].experiments] == [
        each.name for each in STUDIES["table1"].experiments if "imagenet" not in each.name
    ]


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_a_study_has_small_forms_and_no_run_twice(study):
    for experiments in (study.experiments, study.small_experiments):
        assert len({each.name for each in experiments}) == len(experiments)
        configurations = {
            json.dumps({**as_json(each), "name": "", "title": "", "published": None}) for each in experiments
        }
        assert len(configurations) == len(experiments)
        for each in experiments:
            check(each)
            assert from_json(as_json(each)) == each
    for each in study.small_experiments:
        assert (each.data.images_per_class is None) == (study.name == "cifar10-all")


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_claims_name_experiments_of_their_study(study):
    names = {each.name for each in (*study.experiments, *study.small_experiments)}
    for claim in study.claims:
        assert claim.comparisons
        assert {name for each in claim.comparisons for name in (each.less, each.more)} <= names
        assert all(each.less != each.more for each in claim.comparisons)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sorted(
        {*STUDIES}
        - {"table1", "table2", "curves", "payoff", "deeper", "cifar10-all", "learning-rates-cifar10"}
        - {"learning-rates-deeper"}
    ),
)
def test_a_study_runs_in_its_quick_form(name, tmp_path: Path, capsys, monkeypatch):
    """Those of digits alone; the others train the same way on made-up files of other tests."""
    if name == "learning-rates":  # All numbers of steps are the same in the quick form.
        rates = tuple(each for each in STUDIES[name].small_experiments if "-3000-steps-" in each.name)
        assert len(rates) == 16
        monkeypatch.setitem(STUDIES, name, replace(STUDIES[name], small_experiments=rates))
    assert main(["reproduce", name, "--scale", "small", "--quick", "--jobs", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert STUDIES[name].title in shown
    verdicts = ("CONFIRMED", "CONTRADICTED", "UNDECIDED")
    assert sum(shown.count(f"{verdict}: ") for verdict in verdicts) == len(
        [claim for claim in STUDIES[name].claims if _is_small(STUDIES[name], claim)]
    )
    assert list((tmp_path / name / "figures").glob("*.png")) or not STUDIES[name].figures


def _is_small(study, claim) -> bool:
    names = {each.name for each in study.small_experiments}
    return any({each.less, each.more} <= names for each in claim.comparisons)


def test_the_survival_curve_has_both_schedules_and_shares_the_tables_runs():
    for experiments in (STUDIES["survival"].experiments, STUDIES["survival"].small_experiments):
        probs = {"linear_decay": [], "uniform": []}
        for each in experiments:
            if each.depth:
                probs[each.depth.schedule].append(each.depth.final_survival_prob)
        assert probs["linear_decay"] == probs["uniform"]
        assert len(probs["uniform"]) >= 4
    assert find("cifar10-110-stochastic") in STUDIES["survival"].experiments
    assert find("cifar10-110-constant") in STUDIES["depth-survival"].experiments


def test_the_same_name_is_the_same_run_in_every_study():
    forms = {}
    for study in STUDIES.values():
        for each in (*study.experiments, *study.small_experiments):
            assert forms.setdefault(each.name, each) == each


def test_a_small_form_has_few_images_and_fewer_layers():
    for name in ("cifar10-110", "cifar10-1202", "cifar100-110", "svhn-152"):
        constant, stochastic = find_study(name).small_experiments
        assert (stochastic.data.images_per_class, stochastic.data.flip, stochastic.data.translation) == (
            10 if name == "cifar100-110" else 100, False, 0,
        )  # fmt: skip
        assert stochastic.recipe.epochs * stochastic.recipe.epoch_passes * 1000 / stochastic.recipe.batch_size == 3000
        assert [line.partition(":")[0] for line in differences(as_json(constant), as_json(stochastic))] == ["depth"]
    assert small(find("cifar10-1202-stochastic")).model.num_layers == 110
    assert small(find("imagenet-152-stochastic")).model.num_layers == 18
    assert small(find("digits-constant")) is find("digits-constant")
    assert small(find("cifar10-110-stochastic")).title == "CIFAR-10, 32 layers, stochastic depth"


def _chosen():
    for layers, rates in few.DEEPER_RATES.items():
        yield "learning-rates-deeper", layers, 200 if layers == 1202 else 2000, rates
    for study, layers, by_steps in (
        ("learning-rates", 56, few.DIGITS_RATES),
        ("learning-rates-cifar10", 32, few.CIFAR10_RATES),
    ):
        for steps, rates in by_steps.items():
            yield study, layers, steps, rates


def _num_steps(experiment) -> int:
    recipe = experiment.recipe
    num_images = 10 * experiment.data.images_per_class
    return recipe.epochs * recipe.epoch_passes * num_images // recipe.batch_size


@pytest.mark.parametrize(("study", "num_layers", "num_steps", "rates"), list(_chosen()))
def test_the_rates_are_those_that_validation_chooses(study, num_layers, num_steps, rates):
    path = Path(__file__).parents[2] / "results" / study / "runs.jsonl"
    # Errors on more images, where those for validation cannot tell rates apart (benchmarks/further_validation.py).
    further = path.with_name("further-images.json")
    on_more = json.loads(further.read_text()) if further.exists() else {}
    grid = [
        (each.depth is not None, each.recipe.learning_rate)
        for each in STUDIES[study].experiments
        if (each.model.num_layers, _num_steps(each)) == (num_layers, num_steps)
    ]
    found = {setting: {} for setting in grid}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        config = from_json(run["config.json"])
        if (config.model.num_layers, _num_steps(config)) == (num_layers, num_steps):
            errors = found[config.depth is not None, config.recipe.learning_rate]
            of_validation = run["metrics"][-1]["validation_error"]
            errors[config.seed] = on_more.get(run["folder"], of_validation), run["folder"] in on_more
    for stochastic, rate in enumerate(rates):
        own = {each: errors for (kind, each), errors in found.items() if kind == bool(stochastic)}
        seeds = set.intersection(*map(set, own.values()))  # those that have the whole grid
        assert seeds
        assert min(seeds) >= STUDIES[study].first_seed > max(each.seeds for each in STUDIES.values())
        assert len({errors[seed][1] for errors in own.values() for seed in seeds}) == 1  # all on the same images
        means = {each: sum(errors[seed][0] for seed in seeds) / len(seeds) for each, errors in own.items()}
        assert rate == min(sorted(means), key=lambda each: round(means[each], 6))
