"""Few images, no augmentation, enough steps to memorize them: seconds to minutes. Not in the paper.

Network and optimizer are the paper's; the images are CIFAR-10, or the digits that come with scikit-learn (1,797 real
images of 8x8 pixels). Each seed draws its own training images. The two runs of a pair with one seed share them, the
initial weights and the order of the images. Test errors are those after the last step: no image chooses an epoch.
Learning rates are chosen for each method from the same grid, by the error on validation images, with seeds that are not
reported: see the study `learning-rates`.
"""

from dataclasses import replace
from typing import Any

from stochastic_depth_lab.experiments.config import Data, Model, Recipe
from stochastic_depth_lab.experiments.paper import Pair, pair

BATCH_SIZE = 50
DIGITS_RATES = {100: (0.05, 0.02), 300: (0.1, 0.05), 1000: (0.4, 0.05), 3000: (0.8, 0.02)}
"""By steps, constant and stochastic depth, 56 layers: see `learning-rates`; of two that tie, the lower one."""
CIFAR10_RATES = {100: (0.02, 0.05), 300: (0.1, 0.02), 1000: (0.1, 0.1), 3000: (0.4, 0.2)}
"""By steps, constant and stochastic depth, 32 layers: see `learning-rates-cifar10`; those for 3,000 steps by the errors
of the same trials on more images (benchmarks/further_validation.py)."""
DEEPER_RATES = {20: (0.2, 0.1), 56: (0.4, 0.05), 110: (0.2, 0.02), 302: (0.05, 0.005), 1202: (0.002, 0.002)}
"""By layers, constant and stochastic depth, 2,000 steps: see `learning-rates-deeper`. Those of 1202 layers are
from trials with a tenth of the steps."""


def few(
    name: str, data: Data, num_layers: int, *, steps: int, epochs: int, rates: tuple[float, float], **recipe: Any
) -> Pair:
    """A pair that is trained for a number of steps, not epochs.

    Args:
        name: common part of their names.
        data: `images_per_class` images of each of ten classes.
        num_layers: 6n + 2.
        steps: number of steps, of 50 images each.
        epochs: number of evaluations.
        rates: learning rates of constant and of stochastic depth.
        recipe: other fields of the recipe. A warm-up is at a tenth of the learning rate, as in the paper.

    Raises:
        ValueError: if the steps do not make whole passes over the images in each epoch.
    """
    num_images = 10 * (data.images_per_class or 0)
    passes, rest = divmod(steps * BATCH_SIZE, num_images * epochs)
    if rest or not passes:
        raise ValueError(f"{name}: {steps} steps in {epochs} epochs are not whole passes over {num_images} images.")
    # One thread: on images this small, two are slower.
    common = Recipe(epochs, epoch_passes=passes, batch_size=BATCH_SIZE, lr_schedule="one_cycle", num_threads=1)

    def with_rate(rate: float) -> Recipe:
        warmup = {"warmup_learning_rate": rate / 10} if "warmup_epochs" in recipe else {}
        return replace(common, learning_rate=rate, **recipe, **warmup)

    constant, stochastic = map(with_rate, rates)
    title = f"{'Digits' if data.dataset == 'digits' else 'CIFAR-10'}, {num_layers} layers"
    return pair(name, title, data, constant, Model(num_layers), stochastic_recipe=stochastic)


def digits(images_per_class: int = 20) -> Data:
    """Few digits: all others, except 180 for validation, are test images."""
    return Data("digits", images_per_class=images_per_class)


def cifar10(images_per_class: int = 100) -> Data:
    """Few images of CIFAR-10, 1,000 for validation, half of the test images: evaluation takes time too."""
    return Data("cifar10", images_per_class=images_per_class, num_validation=1000, num_test=5000)


def titled(experiments: Pair, words: str) -> Pair:
    """A pair with words added to its titles."""
    constant, stochastic = (replace(each, title=f"{each.title}, {words}") for each in experiments)
    return constant, stochastic


# The demo: 20 images of each class, 300 steps of 50. Both networks memorize their 200 images.
# Command: stochastic-depth reproduce digits --out runs/digits
DIGITS = few("digits", digits(), 56, steps=300, epochs=15, rates=DIGITS_RATES[300])
# 1,000 images of CIFAR-10, 3,000 steps. Command: stochastic-depth reproduce cifar10-few-32 --out runs/cifar10-few-32
CIFAR10_FEW_32 = few("cifar10-few-32", cifar10(), 32, steps=3000, epochs=10, rates=CIFAR10_RATES[3000])
