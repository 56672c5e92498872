"""Named experiments: one pair per row of a table. The comment above each gives source, command and cost."""

import difflib

from stochastic_depth_lab.experiments import few, paper, studies
from stochastic_depth_lab.experiments.config import Experiment, Study
from stochastic_depth_lab.experiments.scales import small

PAIRS: dict[str, paper.Pair] = {
    pair[0].name.removesuffix("-constant"): pair
    for module in (few, paper)
    for name, pair in vars(module).items()
    if name.isupper() and isinstance(pair, tuple) and isinstance(pair[0], Experiment)
}
"""Constant and stochastic depth, by the common part of their names: every pair that is a constant of these files."""
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for pair in PAIRS.values() for experiment in pair}
"""All experiments by name."""
STUDIES: dict[str, Study] = {
    constant.name: constant for constant in vars(studies).values() if isinstance(constant, Study)
}
"""Tables and figures by name."""


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: if there is none; it names the nearest.

    Example:
        >>> find("cifar10-110-stochastic").recipe.epochs
        500
        >>> find("digit-constant")
        Traceback (most recent call last):
        ValueError: Unknown experiment 'digit-constant'. Did you mean 'digits-constant'?
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"Unknown experiment {name!r}. {_nearest(name, list(EXPERIMENTS))}")
    return EXPERIMENTS[name]


def find_pair(name: str) -> paper.Pair:
    """The experiments `name-constant` and `name-stochastic`.

    Raises:
        ValueError: if there are none; it names the nearest, tables and figures among them.
    """
    if name not in PAIRS:
        raise ValueError(f"Unknown pair of experiments, table or figure {name!r}. {_nearest(name, [*PAIRS, *STUDIES])}")
    return PAIRS[name]


def find_study(name: str) -> Study:
    """The table or figure of that name, or a pair as a table.

    Raises:
        ValueError: if there is none; it names the nearest.

    Example:
        >>> [each.name for each in find_study("gradients").experiments]
        ['cifar10-110-constant', 'cifar10-110-stochastic']
        >>> find_study("cifar10-20").small_experiments[1].model.num_layers
        32
    """
    if name in STUDIES:
        return STUDIES[name]
    pair = find_pair(name)
    title = pair[0].title.removesuffix(", constant depth")
    return Study(name, title, "", pair, tuple(map(small, pair)), figures=("curves", "gradient"))


def _nearest(name: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {nearest[0]!r}?" if nearest else f"Choose from {', '.join(names)}."
