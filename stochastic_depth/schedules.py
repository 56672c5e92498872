"""Schedules over depth: the number of blocks in, their survival probabilities out. Plain numbers, no tensors.

A `Schedule` is a function from the number of residual blocks L to a list of L survival probabilities, block 1
(nearest to the input) first. Papers and libraries agree on "linear" and disagree on its end points; each convention
has its name here, so that a recipe can be repeated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Schedule = Callable[[int], list[float]]


Values = Iterable[Any]
"""Numbers, in a list, a tuple, a numpy array or a torch tensor."""


@dataclass(frozen=True)
class NamedSchedule:
    """A schedule that prints as the call that made it.

    Attributes:
        name: the function of this module that made it.
        survival_prob: the argument of that function.
        formula: survival probability of a block, from `survival_prob`, the block 1..L and L.

    Example:
        >>> linear_decay(0.5)
        linear_decay(0.5)
    """

    name: str
    survival_prob: float
    formula: Callable[[float, int, int], float]

    def __call__(self, num_blocks: int) -> list[float]:
        """The survival probabilities of `num_blocks` blocks, the one nearest to the input first."""
        num_blocks = to_num_blocks(num_blocks)
        return [self.formula(self.survival_prob, block, num_blocks) for block in range(1, num_blocks + 1)]

    def __repr__(self) -> str:
        return f"{self.name}({self.survival_prob!r})"


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
    return NamedSchedule("linear_decay", to_survival_prob(final_survival_prob, "final_survival_prob"), _linear_decay)


def _linear_decay(final: float, block: int, num_blocks: int) -> float:
    return 1 - block / num_blocks * (1 - final)


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
    return NamedSchedule("uniform", to_survival_prob(survival_prob, "survival_prob"), _uniform)


def _uniform(survival_prob: float, _block: int, _num_blocks: int) -> float:
    return survival_prob


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
    return NamedSchedule("timm", to_survival_prob(final_survival_prob, "final_survival_prob"), _timm)


def _timm(final: float, block: int, num_blocks: int) -> float:
    return 1 - (block - 1) / max(num_blocks - 1, 1) * (1 - final)


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
    return NamedSchedule("efficientnet", to_survival_prob(final_survival_prob, "final_survival_prob"), _efficientnet)


def _efficientnet(final: float, block: int, num_blocks: int) -> float:
    return 1 - (block - 1) / num_blocks * (1 - final)


SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "linear_decay": linear_decay,
    "uniform": uniform,
    "timm": timm,
    "efficientnet": efficientnet,
    "convnext": convnext,
}
"""Every convention by its name, for configurations and command lines."""


def expected_depth(survival_probs: Values) -> float:
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
    return math.fsum(to_survival_probs(survival_probs))


def to_survival_prob(value: Any, name: str) -> float:
    """A number in (0, 1] as a float; numpy's and torch's single numbers are numbers.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is outside (0, 1].
    """
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], but is {value!r}.")
    if not 0 < number <= 1:
        raise ValueError(
            f"{name} must be in (0, 1], but is {number:g}. "
            "It is the chance to survive: a drop rate of 0.2 is a survival probability of 0.8."
        )
    return float(number)


def to_survival_probs(values: Values) -> list[float]:
    """Numbers in (0, 1], in a list, a tuple, a numpy array or a torch tensor, as a list of floats.

    Raises:
        TypeError: if an entry is not a number.
        ValueError: if an entry is outside (0, 1].
    """
    return [to_survival_prob(entry, f"survival_probs[{index}]") for index, entry in enumerate(values)]


def to_num_blocks(value: Any) -> int:
    """A whole number of at least 1 as an int.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is under 1.
    """
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"num_blocks must be a whole number of blocks, but is {value!r}.")
    if number < 1:
        raise ValueError(f"num_blocks must be at least 1, but is {number}.")
    return number


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value
