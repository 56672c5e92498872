"""Users' own PyTorch data sets, loaders and weights, in the same loop."""

from dataclasses import replace
from itertools import count

import pytest
import torch
from small_runs import CPU, Silent, assert_same, outcome, small, train
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from stochastic_depth_lab.after.evaluation import evaluate_run
from stochastic_depth_lab.data import DataError, ImageData, Split, load
from stochastic_depth_lab.experiments.config import Data
from stochastic_depth_lab.training.loop import Interrupted

OWN = replace(small(epochs=2), data=Data("my digits"))


def own_images(shift: int = 0) -> ImageData:
    """A hundred digits of each part, by way of a data set of floats in 0..1 and of a loader's batches."""
    digits = load("digits")
    train, validation, test = (
        TensorDataset((part.images[:100] + shift).float() / 255, part.labels[:100])
        for part in (digits.train, digits.validation, digits.test)
    )
    return ImageData(
        "my digits",
        10,
        tuple("0123456789"),
        train=Split.from_dataset(DataLoader(train, batch_size=7)),
        validation=Split.from_dataset(validation),
        test=Split.from_dataset(test),
    )


def test_own_images_train_as_the_named_ones_do(tmp_path):
    named, own = Silent(), Silent()
    train(small(epochs=2), tmp_path / "named", observer=named)
    result = train(OWN, tmp_path / "own", observer=own, data=own_images())
    assert [row["train_loss"] for row in own.rows] == [row["train_loss"] for row in named.rows]
    again = evaluate_run(tmp_path / "own", device=CPU, data=own_images())
    assert again["best"]["test"].error == result["test_error"]
    with pytest.raises(DataError, match="there is no data set 'my digits', only digits"):
        evaluate_run(tmp_path / "own", device=CPU)


def test_a_run_does_not_resume_with_other_images(tmp_path):
    questions = count()
    with pytest.raises(Interrupted):
        train(OWN, tmp_path / "run", data=own_images(), stop_requested=lambda: next(questions) > 9)
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(DataError, match="another mean or deviation than those that this run began with"):
        train(OWN, tmp_path / "run", data=own_images(shift=1), resume=True)
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before
    train(OWN, tmp_path / "run", data=own_images(), resume=True)
    train(OWN, tmp_path / "whole", data=own_images())
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_a_state_dict_goes_in_and_comes_out(tmp_path):
    """In: a run begins with it. Out: the best weights are those of a plain network of the library."""
    train(small(epochs=2), tmp_path / "first")
    best = tmp_path / "first" / "checkpoints" / "best.pt"
    net = sd.models.cifar_resnet(14, 10, in_channels=1)
    net.load_state_dict(torch.load(best, weights_only=True))

    # A rate so low that an epoch changes nothing: validation finds the weights that were given.
    still = small(None, epochs=1, learning_rate=1e-30, momentum=0.9, weight_decay=0.0)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    train(still, tmp_path / "second", weights=tmp_path / "weights.pt")
    ended = torch.load(tmp_path / "second" / "checkpoints" / "best.pt", weights_only=True)
    for name, parameter in net.named_parameters():
        assert torch.equal(ended[name], parameter), name

    with pytest.raises(ValueError, match=r"initial_weights: [0-9a-f]{64}, not none"):
        train(still, tmp_path / "second", resume=True)
    assert train(still, tmp_path / "second", weights=tmp_path / "weights.pt", resume=True)["epochs"] == 1


def test_weights_of_another_network_are_refused_before_anything_is_written(tmp_path):
    torch.save(sd.models.cifar_resnet(14, 100, in_channels=1).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt: 2 of its names or shapes .* fc.weight is \(100, 64\) there, "):
        train(small(), tmp_path / "run", weights=tmp_path / "weights.pt")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"best.pt: \d+ of its names or shapes .* conv.weight is absent there, "):
        train(small(), tmp_path / "run", weights=tmp_path / "best.pt")
    assert not (tmp_path / "run").exists()
