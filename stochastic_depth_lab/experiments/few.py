"""Few images, no augmentation, enough steps to memorise them: where a regulariser can help, in seconds to minutes.

Networks and optimiser are the paper's; the images are the digits (8x8, 20 of each class to learn from unless a name
says otherwise) or CIFAR-10 (100 of each class). Each seed draws other training images; a pair of one seed shares them.
Test errors are those after the last step: no image chooses an epoch. 180 digits (1,000 images of CIFAR-10) that are
neither trained nor tested on choose the learning rate, for each method from the same grid, on seeds that are not
reported: the study `learning-rates`.

Times are process time of training on one thread of an AMD EPYC that other work shared.
"""

from dataclasses import replace

from stochastic_depth_lab.config import Data, Depth, Experiment, Model, Recipe, Regularisers
from stochastic_depth_lab.experiments.pairs import pair

Pair = tuple[Experiment, Experiment]
RATES = (0.02, 0.05, 0.1, 0.2)
"""The grid that both methods choose from."""
BATCH_SIZE = 50


def digits(
    name: str,
    num_layers: int = 56,
    *,
    images_per_class: int = 20,
    steps: int = 300,
    epochs: int = 5,
    rates: tuple[float, float],
    **recipe: object,
) -> Pair:
    """A pair on few digits.

    Args:
        name: common part of their names.
        num_layers: 6n + 2.
        images_per_class: training images of each class.
        steps: of 50 images each.
        epochs: evaluations over the run.
        rates: learning rates of constant and of stochastic depth.
        recipe: other fields of the recipe.
    """
    # One thread: on images this small two are slower than one.
    passes, rest = divmod(steps * BATCH_SIZE, 10 * images_per_class * epochs)
    assert not rest, f"{name}: {steps} steps are no whole number of passes in each of {epochs} epochs"
    common = Recipe(
        epochs=epochs, epoch_passes=passes, batch_size=BATCH_SIZE, lr_schedule="one_cycle", num_threads=1
    )
    constant, stochastic = (replace(common, learning_rate=rate, **recipe) for rate in rates)  # pyright: ignore[reportArgumentType]
    return pair(
        name,
        f"Digits, {num_layers} layers",
        Data("digits", images_per_class=images_per_class),
        constant,
        stochastic_recipe=stochastic,
        model=Model(num_layers),
    )
