"""Few images, no augmentation, enough steps to memorize them: where a regularizer can help, in seconds to minutes.

Network and optimizer are the paper's; the images are digits or CIFAR-10. Each seed draws its own training images; the
two runs of a pair and a seed share them, the initial weights and the order of the images. Test errors are those after
the last step: no image chooses an epoch. Learning rates are chosen for each method from the same grid, by the error on
validation images, on seeds that are not reported: the study `learning-rates`.
"""

from dataclasses import replace
from typing import Any

from stochastic_depth_lab.experiments.config import Data, Experiment, Model, Recipe
from stochastic_depth_lab.experiments.pairs import pair

Pair = tuple[Experiment, Experiment]
BATCH_SIZE = 50
DIGITS_RATES = (0.1, 0.05)
"""Constant and stochastic depth, 56 layers, 300 steps: see `learning-rates`."""
CIFAR10_RATES = (0.1, 0.1)
"""Constant and stochastic depth: the paper's, not tuned yet."""


def few(
    name: str,
    data: Data,
    num_layers: int,
    *,
    steps: int,
    epochs: int,
    rates: tuple[float, float],
    **recipe: Any,
) -> Pair:
    """A pair that is trained for a number of steps, not epochs.

    Args:
        name: common part of their names.
        data: this many images of each of ten classes.
        num_layers: 6n + 2.
        steps: of 50 images each.
        epochs: how often the run is evaluated.
        rates: learning rates of constant and of stochastic depth.
        recipe: other fields of the recipe.

    Raises:
        ValueError: if that many steps are no whole number of passes over the images in each epoch.
    """
    num_images = 10 * (data.images_per_class or 0)
    passes, rest = divmod(steps * BATCH_SIZE, num_images * epochs)
    if rest or not passes:
        raise ValueError(f"{name}: {steps} steps in {epochs} epochs are no whole passes over {num_images} images.")
    # One thread: on images this small two are slower than one.
    common = Recipe(epochs, epoch_passes=passes, batch_size=BATCH_SIZE, lr_schedule="one_cycle", num_threads=1)
    constant, stochastic = (replace(common, learning_rate=rate, **recipe) for rate in rates)
    title = f"{'Digits' if data.dataset == 'digits' else 'CIFAR-10'}, {num_layers} layers"
    return pair(name, title, data, constant, model=Model(num_layers), stochastic_recipe=stochastic)


def digits(images_per_class: int = 20) -> Data:
    """Few digits: the rest, less 180 for validation, are test images (1,417 if 20 of each class are trained on)."""
    return Data("digits", images_per_class=images_per_class)


def cifar10(images_per_class: int = 100) -> Data:
    """Few images of CIFAR-10, 1,000 for validation, half of the test images: evaluation takes time too."""
    return Data("cifar10", images_per_class=images_per_class, num_validation=1000, num_test=5000)


def titled(experiments: Pair, words: str) -> Pair:
    """A pair whose titles say what is special about it."""
    return (
        replace(experiments[0], title=f"{experiments[0].title}, {words}"),
        replace(experiments[1], title=f"{experiments[1].title}, {words}"),
    )


# Not of the paper: 110 layers on 200 digits.
# stochastic-depth reproduce digits-110 --out runs/digits-110
DIGITS_110_CONSTANT, DIGITS_110_STOCHASTIC = few("digits-110", digits(), 110, steps=300, epochs=5, rates=DIGITS_RATES)

# Not of the paper: 1,000 images of CIFAR-10, 3,000 steps.
# stochastic-depth reproduce cifar10-few-32 --out runs/cifar10-few-32
CIFAR10_FEW_32_CONSTANT, CIFAR10_FEW_32_STOCHASTIC = few(
    "cifar10-few-32", cifar10(), 32, steps=3000, epochs=10, rates=CIFAR10_RATES
)
