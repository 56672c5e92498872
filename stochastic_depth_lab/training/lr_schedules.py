"""The learning rate over time, as pure functions of epoch and step: a resumed run has nothing to restore."""

import math

from stochastic_depth_lab.experiments.config import Recipe

_RISING_SHARE = 0.3
"""Of the steps of one cycle, as in PyTorch's `OneCycleLR`, whose other constants these are too."""
_FIRST_DIVISOR = 25.0
_LAST_DIVISOR = 25.0 * 1e4


def learning_rate(recipe: Recipe, epoch: int, step: int, num_steps: int) -> float:
    """The rate of one optimiser step.

    "step_text" (Huang et al. 2016, the text): lowered *after* so many epochs, 250 and 375 of 500.
    "step_code" (the authors' `main.lua`): lowered when `epoch < 250` stops being true, epochs counted from 1: 249
    epochs at the first rate, 125 at the second. "one_cycle" (Smith & Topin 2017): a cosine up, a longer cosine down.

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
        return _one_cycle(recipe, (epoch - 1) * num_steps + step, recipe.epochs * num_steps)
    completed = epoch - 1 if recipe.lr_schedule == "step_text" else epoch
    # Rounded, as 0.7 times a number of epochs may miss the whole number by a hair.
    num_drops = sum(completed >= round(share * recipe.epochs, 6) for share in recipe.lr_drops)
    return recipe.learning_rate / 10**num_drops


def _one_cycle(recipe: Recipe, step: int, num_steps: int) -> float:
    peak = recipe.learning_rate
    rising = max(_RISING_SHARE * num_steps - 1, 1.0)
    falling = num_steps - 1 - rising
    if step <= rising:
        return _cosine(peak / _FIRST_DIVISOR, peak, step / rising)
    return _cosine(peak, peak / _LAST_DIVISOR, (step - rising) / falling)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
