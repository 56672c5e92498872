"""Learning rate and survival over time, as pure functions of epoch and step: a resumed run has nothing to restore."""

import math
from collections.abc import Sequence

from stochastic_depth_lab.experiments.config import Depth, Recipe

# Of PyTorch's `OneCycleLR`: the share of steps in which the rate rises, and what the highest rate is divided by for the
# first and for the last step.
_RISING_SHARE, _FIRST_DIVISOR, _LAST_DIVISOR = 0.3, 25.0, 25.0 * 1e4


def learning_rate(recipe: Recipe, epoch: int, step: int, num_steps: int) -> float:
    """The rate of one optimizer step.

    "step_text" (Huang et al. 2016, the text): the rate drops *after* 250 and 375 of 500 epochs. "step_code" (the
    authors' `main.lua`): it drops when `epoch < 250` becomes false, with epochs counted from 1: 249 epochs at the first
    rate, 125 at the second. "one_cycle" (Smith & Topin 2017): a cosine up, a longer cosine down.

    Args:
        recipe: the recipe.
        epoch: from 1.
        step: step within the epoch, from 0.
        num_steps: steps of an epoch.

    Example:
        >>> [learning_rate(Recipe(epochs=500), epoch, 0, 352) for epoch in (250, 251, 376)]
        [0.1, 0.01, 0.001]
    """
    if epoch <= recipe.warmup_epochs:
        return recipe.warmup_learning_rate
    if recipe.lr_schedule == "one_cycle":
        return _one_cycle(recipe.learning_rate, (epoch - 1) * num_steps + step, recipe.epochs * num_steps)
    completed = epoch - 1 if recipe.lr_schedule == "step_text" else epoch
    # Rounded, as 0.7 times a number of epochs may miss the whole number by a hair.
    num_drops = sum(completed >= round(share * recipe.epochs, 6) for share in recipe.lr_drops)
    return recipe.learning_rate / 10**num_drops


def _one_cycle(peak: float, step: int, num_steps: int) -> float:
    rising = max(_RISING_SHARE * num_steps - 1, 1.0)
    falling = num_steps - 1 - rising
    if step <= rising:
        return _cosine(peak / _FIRST_DIVISOR, peak, step / rising)
    return _cosine(peak, peak / _LAST_DIVISOR, (step - rising) / falling)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def survival_probs(over_depth: Sequence[float], depth: Depth, epoch: int, epochs: int) -> list[float]:
    """The survival probabilities of one epoch: block l survives with 1 - s (1 - p_l), where s is `strength`.

    Args:
        over_depth: p_l, of the schedule over depth.
        depth: how they change over time.
        epoch: from 1.
        epochs: number of epochs of the run.

    Example:
        >>> survival_probs([0.75, 0.5], Depth(over_time="early", turn=0.5), 3, 8)
        [0.875, 0.75]
    """
    share = strength(depth, (epoch - 1) / epochs)
    return [1 - share * (1 - prob) for prob in over_depth]


def mean_survival_probs(over_depth: Sequence[float], depth: Depth, epochs: int) -> list[float]:
    """Mean over the epochs of a run, to compare a block's realized frequency with."""
    by_epoch = [survival_probs(over_depth, depth, epoch, epochs) for epoch in range(1, epochs + 1)]
    return [math.fsum(probs) / epochs for probs in zip(*by_epoch, strict=True)]


def strength(depth: Depth, progress: float) -> float:
    """The share of the drop rates that applies, in [0, 1]: 1 is the schedule over depth, 0 is constant depth.

    Args:
        depth: `over_time` names the schedule; `turn` is the share of the run after which it turns.
        progress: share of the epochs that are done, in [0, 1).

    Example:
        >>> [round(strength(Depth(over_time="plateau", turn=0.5), e / 8), 2) for e in range(8)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.5]
    """
    turn = depth.turn
    match depth.over_time:
        case "constant":
            return 1.0
        case "warm_up":
            return min(progress / turn, 1.0)
        case "early":
            return max(1 - progress / turn, 0.0)
        case "late":
            return float(progress >= turn)
        case "exponential":
            # DeepSpeed's progressive layer drop: theta(t) = (1 - theta) exp(-gamma t) + theta; 99 % of it at the turn.
            return 1 - 100 ** (-progress / turn)
        case "plateau":
            lowest = (1 + turn) / 2
            return 1.0 if progress < turn else abs(progress - lowest) / (lowest - turn)
