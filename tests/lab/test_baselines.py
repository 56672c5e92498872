"""The baselines of the demo: the same images as the network's, and nearest neighbor computed by hand."""

from dataclasses import replace

import pytest
import torch
from small_runs import CPU, small

from stochastic_depth_lab.after.baselines import baselines
from stochastic_depth_lab.experiments.config import Data
from stochastic_depth_lab.training.setup import load_images


def test_one_error_for_each_seed_and_the_nearest_neighbor_by_hand():
    experiments = [replace(small(), data=Data("digits", images_per_class=5), seed=seed) for seed in (0, 1, 1)]
    errors = baselines(experiments)
    assert {name: len(values) for name, values in errors.items()} == {"nearest neighbor": 2, "SVM (RBF)": 2}
    for experiment, error in zip(experiments, errors["nearest neighbor"], strict=False):
        images = load_images(experiment, CPU)
        train, test = (
            images.normalization(part.images).flatten(1).double() for part in (images.data.train, images.data.test)
        )
        nearest = images.data.train.labels[torch.cdist(test, train).argmin(1)]
        assert error == pytest.approx(100 * (nearest != images.data.test.labels).double().mean().item())
    assert errors["SVM (RBF)"][0] < 30  # chance is 90
