"""What other methods make of the same images, so that an error has something to be compared with."""

from typing import Any

from stochastic_depth_lab.build import load_images
from stochastic_depth_lab.config import Experiment
from stochastic_depth_lab.data import DataError, Split


def yardsticks(experiment: Experiment) -> dict[str, float]:
    """Test errors in percent of scikit-learn's nearest neighbor and support vector machine, with its defaults.

    They learn from the experiment's training images as the network sees them, normalized and flattened.

    Raises:
        DataError: if the images are missing, or lie in files.
    """
    import torch
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    images = load_images(experiment, torch.device("cpu"))
    parts: list[tuple[Any, Any]] = []
    for split in (images.data.train, images.data.test):
        if not isinstance(split, Split):
            raise DataError(f"{experiment.data.dataset}: yardsticks are for images in memory.")
        parts.append((images.normalisation(split.images).flatten(1).numpy(), split.labels.numpy()))
    (inputs, labels), (test_inputs, test_labels) = parts
    methods = {"nearest neighbor": KNeighborsClassifier(1), "SVM (RBF)": SVC()}
    return {
        name: 100 * (1 - float(method.fit(inputs, labels).score(test_inputs, test_labels)))
        for name, method in methods.items()
    }
