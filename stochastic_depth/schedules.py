"""Schedules over depth, from the number of blocks to their survival probabilities. Plain numbers, no tensors.

A `Schedule` is a function from the number of residual blocks L to a list of L survival probabilities, block 1 (nearest
to the input) first. Papers and libraries agree on "linear" but not on its end points. Each convention has its own name
here, so that you can repeat a recipe exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

Schedule = Callable[[int], list[float]]


Values = Iterable[Any]
"""Numbers, in a list, a tuple, a numpy array or a torch tensor."""


@dataclass(frozen=True)
class NamedSchedule:
    """A schedule that prints as the call that made it.

    Attributes:
        name: the function that made it.
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
        """Survival probabilities of `num_blocks` blocks, the one nearest to the input first."""
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

    Block l of L survives with probability p_l = 1 - l / (L - 1) * (1 - p_L), l = 0..L-1. A single block always
    survives, as in timm, where a linspace of one value starts at rate 0.

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
        final_survival_prob: p, the survival probability that the decay would reach one block after the last, in (0, 1].

    Raises:
        ValueError: if it is not in (0, 1].

    Example:
        >>> efficientnet(0.5)(4)
        [1.0, 0.875, 0.75, 0.625]
    """
    return NamedSchedule("efficientnet", to_survival_prob(final_survival_prob, "final_survival_prob"), _efficientnet)


def _efficientnet(final: float, block: int, num_blocks: int) -> float:
    return 1 - (block - 1) / num_blocks * (1 - final)


@dataclass(frozen=True)
class LayerSchedule:
    """A schedule for whole layers, with its authors' change over time and scaling.

    Block l survives with probability 1 - s (1 - p_l), where p_l is the schedule over depth and s in [0, 1] the current
    strength. `Controller.set_progress` sets the progress of the training, which is 0 at first.

    Attributes:
        over_depth: survival over depth at full strength, such as `linear_decay(0.5)`.
        over_time: the strength, as a function of the share of the training that is done, in [0, 1]. None: always 1.
        rescale: default of `rescale` in `make_stochastic_`.

    Example:
        >>> schedule = LayerSchedule(linear_decay(0.5), over_time=lambda progress: progress)
        >>> schedule(2), schedule.at(0.5, 2), schedule.at(1.0, 2)
        ([1.0, 1.0], [0.875, 0.75], [0.75, 0.5])
    """

    over_depth: Schedule
    over_time: Callable[[float], float] | None = None
    rescale: Literal["eval", "train", "none"] = "none"

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            TypeError: if a function is none.
            ValueError: if there is no such scaling.
        """
        if not callable(self.over_depth):
            raise TypeError(f"over_depth must be a schedule, such as linear_decay(0.5), but is {self.over_depth!r}.")
        if self.over_time is not None and not callable(self.over_time):
            raise TypeError(f"over_time must be a function of the progress, or None, but is {self.over_time!r}.")
        if self.rescale not in ("eval", "train", "none"):
            raise ValueError(f"rescale must be one of 'eval', 'train', 'none', but is {self.rescale!r}.")

    def __call__(self, num_blocks: int) -> list[float]:
        """The survival probabilities at the start of the training."""
        return self.at(0.0, num_blocks)

    def at(self, progress: float, num_blocks: int) -> list[float]:
        """The survival probabilities after a share `progress` of the training, in [0, 1].

        Raises:
            TypeError: if `progress` is not a number.
            ValueError: if it, or the strength that `over_time` gives for it, is not in [0, 1].
        """
        return at_progress(self.over_depth(num_blocks), self.over_time, progress)


def at_progress(
    survival_probs: Sequence[float], over_time: Callable[[float], float] | None, progress: float
) -> list[float]:
    """Survival probabilities over time, see `LayerSchedule`.

    Args:
        survival_probs: those at full strength.
        over_time: the strength; None: always 1.
        progress: share of the training that is done, in [0, 1].

    Raises:
        TypeError: if `progress` is not a number.
        ValueError: if it, or the strength that `over_time` gives for it, is not in [0, 1].
    """
    _check_share(progress, "progress", "It is the share of the training that is done: step / (num_steps - 1).")
    strength = 1.0 if over_time is None else over_time(progress)
    _check_share(strength, f"over_time({progress:g})", "It is the share of the drop rates that counts.")
    return [1 - strength * (1 - survival_prob) for survival_prob in survival_probs]


def layerskip(
    max_drop_rate: float, *, over_time: Literal["constant", "linear", "exponential"] = "constant"
) -> LayerSchedule:
    """LayerSkip: drop rates that rise exponentially with depth, for models that are to exit early.

    Layer l of L is dropped with rate S(t) D(l) p_max, where D(l) = exp(l ln 2 / (L - 1)) - 1, l = 0..L-1
    (Elhoushi et al. 2024, "LayerSkip", section 4.1.1). The first layer is never dropped, the last with the rate p_max.
    Over time S(t) is 1 ("constant", for training that begins with a trained model), exp(t ln 2 / (T - 1)) - 1
    ("exponential", for training from random weights), t = 0..T-1, or t / (T - 1) ("linear"). There is no scaling.

    Args:
        max_drop_rate: p_max, drop rate of the last layer at the end of the training, in [0, 1). The authors use 0.1 and
            0.2. It is a drop rate, as in the paper, not a survival probability.
        over_time: S(t); other than "constant", call `Controller.set_progress` in every step.

    Raises:
        ValueError: if the rate is not in [0, 1), or there is no such curriculum.

    Example:
        >>> [round(p, 3) for p in layerskip(0.2)(5)]
        [1.0, 0.962, 0.917, 0.864, 0.8]
        >>> [round(layerskip(0.2, over_time="exponential").at(t, 5)[-1], 3) for t in (0.0, 0.5, 1.0)]
        [1.0, 0.917, 0.8]
    """
    _check_drop_rate(max_drop_rate, "max_drop_rate")
    strengths: dict[str, Callable[[float], float] | None] = {
        "constant": None,
        "linear": _identity,
        "exponential": _exponential,
    }
    if over_time not in strengths:
        raise ValueError(f"over_time must be one of {', '.join(map(repr, strengths))}, but is {over_time!r}.")

    def schedule(num_blocks: int) -> list[float]:
        num_blocks = to_num_blocks(num_blocks)
        return [1 - max_drop_rate * _exponential(block / max(num_blocks - 1, 1)) for block in range(num_blocks)]

    return LayerSchedule(schedule, strengths[over_time])


def layerdrop(drop_rate: float) -> LayerSchedule:
    """LayerDrop: the same drop rate for every layer, without scaling (Fan et al. 2020).

    Args:
        drop_rate: in [0, 1). The authors use 0.2, and 0.5 for models that are to lose half of their layers. It is a
            drop rate, as in the paper: `layerdrop(0.2)` is `uniform(0.8)` with `rescale="none"`.

    Raises:
        ValueError: if it is not in [0, 1).

    Example:
        >>> layerdrop(0.2)(3)
        [0.8, 0.8, 0.8]
    """
    _check_drop_rate(drop_rate, "drop_rate")
    return LayerSchedule(uniform(1 - drop_rate))


def progressive_layer_dropping(final_survival_prob: float = 0.5, *, gamma: float = 100.0) -> LayerSchedule:
    """Progressive layer dropping: survival that falls linearly with depth and exponentially over time.

    In step t of T layer l of L survives with probability 1 - (l / L) * (1 - theta(t)), l = 0..L-1, where
    theta(t) = (1 - theta) * exp(-gamma t / T) + theta. A layer counts 1/p times in training (Zhang and He 2020,
    algorithm 1; DeepSpeed's `progressive_layer_drop`). Call `Controller.set_progress` in every step.

    Args:
        final_survival_prob: theta, which survival in the last layer aims at, in (0, 1].
        gamma: how fast: after a share 1 / gamma of the training 63 % of the drop rates count. The authors use 100. In
            DeepSpeed's configuration it is divided by the number of steps.

    Raises:
        ValueError: if `final_survival_prob` is not in (0, 1], or `gamma` is not positive.

    Example:
        >>> schedule = progressive_layer_dropping(0.5)
        >>> schedule(4), [round(p, 3) for p in schedule.at(0.02, 4)]
        ([1.0, 1.0, 1.0, 1.0], [1.0, 0.892, 0.784, 0.676])
    """
    final_survival_prob = to_survival_prob(final_survival_prob, "final_survival_prob")
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be a positive number, but is {gamma!r}.")
    return LayerSchedule(efficientnet(final_survival_prob), partial(_saturating, gamma), "train")


def _identity(progress: float) -> float:
    return progress


def _exponential(progress: float) -> float:
    return 2**progress - 1  # exp(ln 2 * progress) - 1


def _saturating(gamma: float, progress: float) -> float:
    return 1 - math.exp(-gamma * progress)


def _check_share(share: float, name: str, meaning: str) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], but is {share!r}.")
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be in [0, 1], but is {share:g}. {meaning}")


def _check_drop_rate(drop_rate: float, name: str) -> None:
    if isinstance(drop_rate, bool) or not isinstance(drop_rate, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), but is {drop_rate!r}.")
    if not 0 <= drop_rate < 1:
        raise ValueError(
            f"{name} must be in [0, 1), but is {drop_rate:g}. It is the chance to be dropped: a survival "
            "probability of 0.8 is a drop rate of 0.2."
        )


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
    if not hasattr(values, "__iter__") or isinstance(values, (str, bytes, AbstractSet, Mapping)):
        raise TypeError(f"survival_probs must be a sequence of one number per block, but is {values!r}.")
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
