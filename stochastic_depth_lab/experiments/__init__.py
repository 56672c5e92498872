"""Named experiments: one constant per row of a table. The comment above each gives source, command and cost."""

import difflib

from stochastic_depth_lab.config import Experiment
from stochastic_depth_lab.experiments import cifar, digits, svhn

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (*digits.EXPERIMENTS, *cifar.EXPERIMENTS, *svhn.EXPERIMENTS)
}


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: if there is none; it names the nearest.

    Example:
        >>> find("cifar10-110-stochastic").depth.final_survival_prob
        0.5
        >>> find("cifar10-110-stochastik")
        Traceback (most recent call last):
        ValueError: there is no experiment 'cifar10-110-stochastik'. Nearest: cifar10-110-stochastic, ...
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}. {_nearest(name, list(EXPERIMENTS))}")
    return EXPERIMENTS[name]


def find_pair(name: str) -> tuple[Experiment, Experiment]:
    """The experiments `name-constant` and `name-stochastic`.

    Raises:
        ValueError: if there are none; it names the nearest.
    """
    pairs = [each.removesuffix("-constant") for each in EXPERIMENTS if each.endswith("-constant")]
    if name not in pairs:
        raise ValueError(f"there is no pair of experiments {name!r}. {_nearest(name, pairs)}")
    return EXPERIMENTS[f"{name}-constant"], EXPERIMENTS[f"{name}-stochastic"]


def _nearest(name: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"Nearest: {', '.join(nearest)}." if nearest else f"There are: {', '.join(names)}."
