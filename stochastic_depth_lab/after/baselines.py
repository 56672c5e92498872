"""Test errors of other methods on the same images, for comparison."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stochastic_depth_lab.data import DataError, Split
from stochastic_depth_lab.experiments.config import Experiment
from stochastic_depth_lab.training.setup import load_images


def baselines(experiments: Iterable[Experiment], data_root: Path | None = None) -> dict[str, list[float]]:
    """Test errors in percent of scikit-learn's nearest neighbor and support vector machine, one for each seed.

    Both use scikit-learn's defaults, and train on the network's training images, normalized and flattened.

    Args:
        experiments: the first one of each seed determines the images.
        data_root: folder of the data sets.

    Raises:
        DataError: if the images are missing, or are not in memory.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    errors: dict[str, list[float]] = {"nearest neighbor": [], "SVM (RBF)": []}
    for experiment in {each.seed: each for each in experiments}.values():
        images = load_images(experiment, torch.device("cpu"), data_root)
        parts: list[tuple[Any, Any]] = []
        for split in (images.data.train, images.data.test):
            if not isinstance(split, Split):
                raise DataError(f"{experiment.data.dataset}: baselines are for images in memory.")
            parts.append((images.normalization(split.images).flatten(1).numpy(), split.labels.numpy()))
        (inputs, labels), (test_inputs, test_labels) = parts
        for name, method in (("nearest neighbor", KNeighborsClassifier(1)), ("SVM (RBF)", SVC())):
            right = float(method.fit(inputs, labels).score(test_inputs, test_labels))
            errors[name].append(100 * (1 - right))
    return errors
