"""Schedules over depth: the number of blocks in, their survival probabilities out. Plain numbers, no tensors.

A `Schedule` is a function from the number of residual blocks L to a list of L survival probabilities, block 1
(nearest to the input) first. Papers and libraries agree on "linear" and disagree on its end points; each convention
has its name here, so that a recipe can be repeated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], list[float]]


def linear_decay(final_survival_prob: float) -> Schedule:
    """Survival that falls linearly with depth, from 1 at the input to `final_survival_prob`.

    Block l of L survives with probability p_l = 1 - (l / L) * (1 - p_L), l = 1..L
    (Huang et al. 2016, "linear decay"). Early blocks feed all later ones, so they are kept more often.

    Args:
        final_survival_prob: p_L, survival probability of the last block, in (0, 1].

    Raises:
        ValueError: if it is not in (0, 1].

    Example:
        >>> linear_decay(0.5)(4)
        [0.875, 0.75, 0.625, 0.5]
    """
    check_survival_prob(final_survival_prob, "final_survival_prob")

    def schedule(num_blocks: int) -> list[float]:
        check_num_blocks(num_blocks)
        return [1 - block / num_blocks * (1 - final_survival_prob) for block in range(1, num_blocks + 1)]

    return schedule


def uniform(survival_prob: float) -> Schedule:
    """The same survival probability for every block (Huang et al. 2016, "uniform"; DINOv2/3 and DeiT III use it).

    Args:
        survival_prob: the survival probability of each block, in (0, 1].

    Raises:
        ValueError: if it is not in (0, 1].

    Example:
        >>> uniform(0.8)(3)
        [0.8, 0.8, 0.8]
    """
    check_survival_prob(survival_prob, "survival_prob")

    def schedule(num_blocks: int) -> list[float]:
        check_num_blocks(num_blocks)
        return [survival_prob] * num_blocks

    return schedule


def timm(final_survival_prob: float) -> Schedule:
    """The linear decay of timm's transformers: the first block is never dropped, the last gets the full rate.

    Block l of L survives with probability p_l = 1 - l / (L - 1) * (1 - p_L), l = 0..L-1. A single block survives
    always, as it does in timm, where a linspace of one value starts at rate 0.

    Args:
        final_survival_prob: survival probability of the last block, in (0, 1]: 1 - `drop_path_rate`.

    Raises:
        ValueError: if it is not in (0, 1].

    Example:
        >>> timm(0.5)(3)
        [1.0, 0.75, 0.5]
    """
    check_survival_prob(final_survival_prob, "final_survival_prob")

    def schedule(num_blocks: int) -> list[float]:
        check_num_blocks(num_blocks)
        return [1 - block / max(num_blocks - 1, 1) * (1 - final_survival_prob) for block in range(num_blocks)]

    return schedule


convnext = timm
"""ConvNeXt's linear decay (its authors, timm and torchvision): the same numbers as `timm`."""


def efficientnet(final_survival_prob: float) -> Schedule:
    """EfficientNet's linear decay (timm, torchvision): the last block never gets the full rate.

    Block l of L survives with probability p_l = 1 - (l / L) * (1 - p), l = 0..L-1.

    Args:
        final_survival_prob: the survival probability p that the decay aims at, one block beyond the last, in (0, 1].

    Raises:
        ValueError: if it is not in (0, 1].

    Example:
        >>> efficientnet(0.5)(4)
        [1.0, 0.875, 0.75, 0.625]
    """
    check_survival_prob(final_survival_prob, "final_survival_prob")

    def schedule(num_blocks: int) -> list[float]:
        check_num_blocks(num_blocks)
        return [1 - block / num_blocks * (1 - final_survival_prob) for block in range(num_blocks)]

    return schedule


SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "linear_decay": linear_decay,
    "uniform": uniform,
    "timm": timm,
    "efficientnet": efficientnet,
    "convnext": convnext,
}
"""Every convention by its name, for configurations and command lines."""


def expected_depth(survival_probs: Sequence[float]) -> float:
    """Expected number of blocks that run in a training step, the sum of the survival probabilities, in blocks.

    For linear decay to p_L = 0.5 it is (3L - 1) / 4: 40.25 of the paper's 54 blocks.

    Args:
        survival_probs: one survival probability per block, each in (0, 1].

    Raises:
        ValueError: if one of them is not in (0, 1].

    Example:
        >>> expected_depth(linear_decay(0.5)(54))
        40.25
    """
    check_survival_probs(survival_probs)
    return math.fsum(survival_probs)


def check_survival_prob(survival_prob: float, name: str) -> None:
    """Raise unless `survival_prob` is a number in (0, 1].

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is outside (0, 1].
    """
    if isinstance(survival_prob, bool) or not isinstance(survival_prob, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], but is {survival_prob!r}.")
    if not 0 < survival_prob <= 1:
        raise ValueError(
            f"{name} must be in (0, 1], but is {survival_prob:g}. "
            "It is the chance to survive: a drop rate of 0.2 is a survival probability of 0.8."
        )


def check_survival_probs(survival_probs: Sequence[float]) -> None:
    """Raise unless every entry is a number in (0, 1].

    Raises:
        TypeError: if an entry is not a number.
        ValueError: if an entry is outside (0, 1].
    """
    for index, survival_prob in enumerate(survival_probs):
        check_survival_prob(survival_prob, f"survival_probs[{index}]")


def check_num_blocks(num_blocks: int) -> None:
    """Raise unless `num_blocks` is a whole number of at least 1.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is under 1.
    """
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int):
        raise TypeError(f"num_blocks must be a whole number of blocks, but is {num_blocks!r}.")
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, but is {num_blocks}.")
