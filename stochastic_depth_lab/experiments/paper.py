"""The paper's experiments (Huang et al. 2016), each with constant and with stochastic depth.

The comment above a pair gives the published result, our cost, and the command. Hours are for constant and stochastic
depth on one core of an AMD EPYC, extrapolated from the median process time of 2 to 8 steps (PyTorch 2.13, fp32). They
have not been timed on a GPU. Where no result is given, none is published.
"""

from dataclasses import replace
from typing import Any

from stochastic_depth_lab.experiments.config import Data, Depth, Experiment, Model, Published, Recipe

Pair = tuple[Experiment, Experiment]
SOURCE = "Huang et al. 2016, table of results, as given by public summaries"
LATER_SOURCE = "Huang et al. 2016, as quoted by later papers"


def pair(
    name: str,
    title: str,
    data: Data,
    recipe: Recipe,
    model: Model,
    *,
    stochastic_recipe: Recipe | None = None,
    published: tuple[float, float] | None = None,
    hours: tuple[float, float] | None = None,
    source: str = SOURCE,
) -> Pair:
    """`name-constant` and `name-stochastic`, which has linear decay to 0.5 (Huang et al. 2016).

    Args:
        name: common part of their names.
        title: common part of their titles.
        data: the images.
        recipe: how both are trained.
        model: the network.
        stochastic_recipe: recipe of stochastic depth, if it differs.
        published: test errors in percent, constant and stochastic.
        hours: published hours of training on one Titan X, constant and stochastic.
        source: where these are published.
    """
    constant, stochastic = (
        Published(published[i], source, hours[i] if hours else None) if published else None for i in (0, 1)
    )
    return (
        Experiment(f"{name}-constant", f"{title}, constant depth", data, model, None, recipe, published=constant),
        Experiment(
            f"{name}-stochastic",
            f"{title}, stochastic depth",
            data,
            model,
            Depth(),
            stochastic_recipe or recipe,
            published=stochastic,
        ),
    )


# CIFAR: 45,000 images to train on, 500 epochs, flipped and shifted unless the name says otherwise.
RECIPE = Recipe(epochs=500)


def _cifar(dataset: str, num_layers: int, recipe: Recipe = RECIPE, **published: Any) -> Pair:
    name, title = f"{dataset}-{num_layers}", f"{dataset.upper().replace('CIFAR', 'CIFAR-')}, {num_layers} layers"
    return pair(name, title, Data(dataset, translation=4, flip=True), recipe, Model(num_layers), **published)


def _unaugmented(dataset: str, num_layers: int, recipe: Recipe = RECIPE, **published: Any) -> Pair:
    name = f"{dataset}-unaugmented-{num_layers}"
    title = f"{dataset.upper().replace('CIFAR', 'CIFAR-')}, {num_layers} layers, no augmentation"
    return pair(name, title, Data(dataset), recipe, Model(num_layers), source=LATER_SOURCE, **published)


# Here: about 13 h and 10 h on one core. Command: stochastic-depth reproduce cifar10-20 --out runs/cifar10-20
CIFAR10_20 = _cifar("cifar10", 20)
# Here: about 24 h and 19 h on one core. Command: stochastic-depth reproduce cifar10-32 --out runs/cifar10-32
CIFAR10_32 = _cifar("cifar10", 32)
# Here: about 29 h and 23 h on one core. Command: stochastic-depth reproduce cifar10-44 --out runs/cifar10-44
CIFAR10_44 = _cifar("cifar10", 44)
# Here: about 38 h and 30 h on one core. Command: stochastic-depth reproduce cifar10-56 --out runs/cifar10-56
CIFAR10_56 = _cifar("cifar10", 56)
# Published: 6.41 % constant, 5.23 % stochastic (the authors' page: 5.25); 20 h 42 and 15 h 7 on one Titan X.
# Here: about 68 h and 55 h on one core. Command: stochastic-depth reproduce cifar10-110 --out runs/cifar10-110
CIFAR10_110 = _cifar("cifar10", 110, published=(6.41, 5.23), hours=(20 + 42 / 60, 15 + 7 / 60))
# Published: 6.72 % constant, 4.91 % stochastic; no time.
# Here: about 790 h and 630 h on one core. Command: stochastic-depth reproduce cifar10-1202 --out runs/cifar10-1202
CIFAR10_1202 = _cifar("cifar10", 1202, replace(RECIPE, warmup_epochs=10), published=(6.72, 4.91))
# Later papers: 13.63 % constant, 11.66 % stochastic. Here: about 68 h and 55 h on one core.
# Command: stochastic-depth reproduce cifar10-unaugmented-110 --out runs/cifar10-unaugmented-110
CIFAR10_UNAUGMENTED_110 = _unaugmented("cifar10", 110, published=(13.63, 11.66))
# Not in the paper: 20 epochs, for a CPU. Here: about 100 and 75 minutes on one thread.
# Command: stochastic-depth reproduce cifar10-unaugmented-32 --out runs/cifar10-unaugmented-32
CIFAR10_UNAUGMENTED_32 = _unaugmented("cifar10", 32, replace(RECIPE, epochs=20, num_threads=1))

# Here: about 13 h and 10 h on one core. Command: stochastic-depth reproduce cifar100-20 --out runs/cifar100-20
CIFAR100_20 = _cifar("cifar100", 20)
# Here: about 24 h and 19 h on one core. Command: stochastic-depth reproduce cifar100-32 --out runs/cifar100-32
CIFAR100_32 = _cifar("cifar100", 32)
# Here: about 29 h and 23 h on one core. Command: stochastic-depth reproduce cifar100-44 --out runs/cifar100-44
CIFAR100_44 = _cifar("cifar100", 44)
# Here: about 38 h and 30 h on one core. Command: stochastic-depth reproduce cifar100-56 --out runs/cifar100-56
CIFAR100_56 = _cifar("cifar100", 56)
# Published: 27.22 % constant, 24.58 % stochastic; 20 h 51 and 15 h 20 on one Titan X.
# Here: about 68 h and 55 h on one core. Command: stochastic-depth reproduce cifar100-110 --out runs/cifar100-110
CIFAR100_110 = _cifar("cifar100", 110, published=(27.22, 24.58), hours=(20 + 51 / 60, 15 + 20 / 60))
# Here: about 790 h and 630 h on one core. Command: stochastic-depth reproduce cifar100-1202 --out runs/cifar100-1202
CIFAR100_1202 = _cifar("cifar100", 1202, replace(RECIPE, warmup_epochs=10))
# Later papers: 44.74 % constant, 37.80 % stochastic. Here: about 68 h and 55 h on one core.
# Command: stochastic-depth reproduce cifar100-unaugmented-110 --out runs/cifar100-unaugmented-110
CIFAR100_UNAUGMENTED_110 = _unaugmented("cifar100", 110, published=(44.74, 37.80))

# SVHN: 604,388 images of house numbers, no augmentation, 50 epochs.
# Published: 2.01 % constant, 1.75 % stochastic; 33 h 43 and 25 h 33 on one Titan X.
# Here: about 125 h and 100 h on one core. Command: stochastic-depth reproduce svhn-152 --out runs/svhn-152
SVHN_152 = pair(
    "svhn-152",
    "SVHN, 152 layers",
    Data("svhn"),
    Recipe(epochs=50, lr_drops=(0.6, 0.7), validate_every=200),
    Model(152),
    published=(2.01, 1.75),
    hours=(33 + 43 / 60, 25 + 33 / 60),
)

# ImageNet: crops and batches of 256 as in fb.resnet.torch, without its color jitter and lighting noise. 90 epochs, 30
# more for stochastic depth. 10,000 training pictures are for validation; the 50,000 of `val` are the test part.
# Published: 21.78 % constant, 21.98 % stochastic with 30 more epochs and one more drop; no time.
# Here: about 21,500 h each on one core, extrapolated from three steps of 8 pictures.
# Command: stochastic-depth reproduce imagenet-152 --out runs/imagenet-152 --data-root FOLDER
_IMAGENET = Recipe(epochs=90, batch_size=256, lr_drops=(1 / 3, 2 / 3))
IMAGENET_152 = pair(
    "imagenet-152",
    "ImageNet, 152 layers",
    Data("imagenet", flip=True),
    _IMAGENET,
    Model(152, family="imagenet", shortcut="projection"),
    stochastic_recipe=replace(_IMAGENET, epochs=120, lr_drops=(0.25, 0.5, 0.75)),
    published=(21.78, 21.98),
)
