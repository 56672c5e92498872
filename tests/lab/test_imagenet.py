"""ImageNet's row of the table, on a folder of made-up pictures: torchvision's own networks, trained from files."""

import json
from dataclasses import replace

import pytest
import torch
from small_runs import CPU, assert_same, outcome, train

from stochastic_depth_lab.cli.main import main
from stochastic_depth_lab.experiments import find
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.experiments.config import Experiment
from stochastic_depth_lab.experiments.scales import quick
from stochastic_depth_lab.experiments.scales import small as small_form
from stochastic_depth_lab.training import loop
from stochastic_depth_lab.training.setup import build_network, describe_branches, load_images

PAIR = ("imagenet-152-constant", "imagenet-152-stochastic")


def small(name: str, num_workers: int = 0) -> Experiment:
    """The small form, on pictures that are smaller still, for two epochs of three steps."""
    experiment = small_form(find(name))
    data = replace(experiment.data, image_size=32, num_validation=6, limit=12, num_workers=num_workers)
    recipe = replace(experiment.recipe, epochs=2, batch_size=5, learning_rate=0.01)
    return replace(experiment, data=data, recipe=recipe, precision="fp32")


@pytest.mark.parametrize("name", PAIR)
def test_the_network_is_torchvisions_and_every_block_a_branch(name, made_up_data_root):
    import torchvision

    experiment = small(name)
    images = load_images(experiment, CPU)
    model, depth = build_network(experiment, images.data)
    inputs = images.normalization(images.data.test.images)
    branches, cost = describe_branches(experiment, model, depth, inputs)
    assert [each.split("#")[0] for each in branches.names] == [
        f"layer{group}.{block}" for group in (1, 2, 3, 4) for block in (0, 1)
    ]
    assert branches.survival_probs == ([1.0] * 8 if depth is None else [1 - block / 16 for block in range(1, 9)])
    plain = torchvision.models.resnet18(num_classes=3).to(memory_format=torch.channels_last)
    plain.load_state_dict(model.state_dict())
    if depth is None:
        assert (branches.expected_cost, cost) == (1.0, None)
        assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
        assert type(model.layer1[0]) is type(plain.layer1[0])
    else:
        assert branches.expected_depth == pytest.approx(5.75)  # (3L - 1) / 4
        assert 0.6 < branches.expected_cost < 0.8
        assert 0.4 < branches.expected_time < 1
        with depth.gates([True] * 8):
            assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
        assert not torch.equal(model.eval()(inputs), plain.eval()(inputs))


@pytest.mark.parametrize("name", PAIR)
def test_an_interrupted_run_resumes_bit_for_bit(name, made_up_data_root, tmp_path):
    experiment = small(name)
    train(experiment, tmp_path / "whole")
    num_asked = 0

    def stop_in_the_second_epoch() -> bool:
        nonlocal num_asked
        num_asked += 1
        return num_asked > 6

    with pytest.raises(loop.Interrupted):
        train(experiment, tmp_path / "parts", stop_requested=stop_in_the_second_epoch)
    train(experiment, tmp_path / "parts", resume=True)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_evaluation_reads_the_folder_again(made_up_data_root, tmp_path, capsys):
    result = train(small(PAIR[1]), tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert f"best weights  test        error {result['test_error']:.2f} %" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--analyze"]) == 2
    assert "works only for the paper's networks for small images" in capsys.readouterr().err


def test_a_missing_folder_says_how_to_get_it(tmp_path, capsys):
    for name in PAIR:
        assert main(["train", name, "--out", str(tmp_path / "run"), "--data-root", str(tmp_path)]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert "Register at https://image-net.org, download ILSVRC2012_img_train.tar (138 GB)" in shown
    assert not (tmp_path / "run").exists()


def test_the_papers_recipe():
    constant, stochastic = map(find, PAIR)
    for experiment, epochs, drops in ((constant, 90, [30, 60]), (stochastic, 120, [30, 60, 90])):
        recipe = experiment.recipe
        assert recipe.epochs == epochs
        assert [share * epochs for share in recipe.lr_drops] == pytest.approx(drops)
        assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 1e-4)
        assert (experiment.data.flip, experiment.data.image_size, experiment.model.num_layers) == (True, None, 152)
    assert stochastic.depth is not None
    assert (stochastic.depth.schedule, stochastic.depth.final_survival_prob) == ("linear_decay", 0.5)
    assert quick(stochastic).data.image_size == small_form(stochastic).data.image_size == 64


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": {"num_layers": 20}}, "must be 18, 34, 50, 101 or 152 for imagenet, but is 20"),
        ({"model": {"shortcut": "pad"}}, "must be projection and he for imagenet"),
        ({"model": {"init": "authors"}}, "must be projection and he for imagenet"),
        ({"data": {"normalization": "pixel"}}, "must be channel for imagenet"),
        ({"data": {"image_size": 16}}, "data.image_size must be at least 32, but is 16"),
        ({"data": {"num_workers": -1}}, "data.num_workers must be at least 0, but is -1"),
        ({"data": {"dataset": "cifar10", "image_size": 64}}, "images of cifar10 have a fixed size"),
        ({"regularizers": {"filter_survival_prob": 0.5}}, "work only in the paper"),
    ],
    ids=json.dumps,
)
def test_what_it_does_not_have_is_refused(changes, match):
    experiment = find(PAIR[1])
    check(experiment)
    parts = {name: replace(getattr(experiment, name), **fields) for name, fields in changes.items()}
    with pytest.raises(ValueError, match=match):
        check(replace(experiment, **parts))


def test_after_training_it_is_cut_fine_tuned_and_exported(made_up_data_root, tmp_path):
    import safetensors.torch
    import torchvision

    run = tmp_path / "run"
    train(small("imagenet-152-stochastic"), run)
    assert main(["evaluate", str(run), "--subnetworks", "--points", "2", "--finetune-epochs", "1"]) == 0
    (cut,) = (run / "evaluation" / "finetuned").glob("*-4-blocks-seed-0")
    assert json.loads((cut / "config.json").read_text())["model"]["keep"] == [0, 1, 2, 3]
    for folder, blocks in ((run, 8), (cut, 4)):
        assert main(["export", str(folder), "--format", "safetensors", "--out", str(tmp_path / "weights")]) == 0
        weights = safetensors.torch.load_file(tmp_path / "weights")
        fresh = torchvision.models.resnet18(num_classes=3)
        if blocks == 8:
            fresh.load_state_dict(weights, strict=True)
        else:
            assert weights.keys() < fresh.state_dict().keys()
            assert {name.split(".")[0] for name in weights if ".conv" in name} == {"layer1", "layer2"}
