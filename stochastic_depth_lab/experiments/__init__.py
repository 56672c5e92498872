"""Named experiments: one constant per row of a table. The comment above each gives source, command and cost."""

import difflib

from stochastic_depth_lab.config import Experiment
from stochastic_depth_lab.experiments import cifar, digits, svhn

EXPERIMENTS: dict[str, Experiment] = {
    constant.name: constant
    for module in (digits, cifar, svhn)
    for constant in vars(module).values()
    if isinstance(constant, Experiment)
}
"""All of them by name: every experiment that is a constant of one of these files."""


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: if there is none; it names the nearest.

    Example:
        >>> find("cifar10-110-stochastic").recipe.epochs
        500
        >>> find("digit-constant")
        Traceback (most recent call last):
        ValueError: there is no experiment 'digit-constant'. Nearest: digits-constant, ...
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
