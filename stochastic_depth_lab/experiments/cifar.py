"""CIFAR-10 and CIFAR-100 as in Huang et al. 2016: 45,000 images to learn from, flipped and moved, 500 epochs.

Hours are for 500 epochs, constant and stochastic depth, on one core of an AMD EPYC: extrapolated from the median
process time of 2 to 8 steps at constant depth (PyTorch 2.13, fp32), of which stochastic depth took 0.80. On a GPU they
have not been timed. Where no result is given none is published: He et al.'s other depths.
"""

from dataclasses import replace

from stochastic_depth_lab.experiments.config import Data, Experiment, Model, Recipe
from stochastic_depth_lab.experiments.pairs import LATER_SOURCE, pair

RECIPE = Recipe(epochs=500)
RECIPE_1202 = replace(RECIPE, warmup_epochs=10)
CIFAR10 = Data("cifar10", translation=4, flip=True)
CIFAR100 = Data("cifar100", translation=4, flip=True)


def _cifar(
    data: Data,
    num_layers: int,
    recipe: Recipe = RECIPE,
    *,
    published: tuple[float, float] | None = None,
    published_h: tuple[float, float] | tuple[None, None] = (None, None),
) -> tuple[Experiment, Experiment]:
    name, title = (
        f"{data.dataset}-{num_layers}",
        f"{data.dataset.upper().replace('CIFAR', 'CIFAR-')}, {num_layers} layers",
    )
    if data.flip:
        return pair(name, title, data, recipe, model=Model(num_layers), published=published, published_h=published_h)
    name, title = name.replace("-", "-unaugmented-"), f"{title}, no augmentation"
    return pair(name, title, data, recipe, model=Model(num_layers), published=published, source=LATER_SOURCE)


# Here: about 13 h and 10 h on one core.
# stochastic-depth reproduce cifar10-20 --out runs/cifar10-20
CIFAR10_20_CONSTANT, CIFAR10_20_STOCHASTIC = _cifar(CIFAR10, 20)

# Here: about 24 h and 19 h on one core.
# stochastic-depth reproduce cifar10-32 --out runs/cifar10-32
CIFAR10_32_CONSTANT, CIFAR10_32_STOCHASTIC = _cifar(CIFAR10, 32)

# Here: about 29 h and 23 h on one core.
# stochastic-depth reproduce cifar10-44 --out runs/cifar10-44
CIFAR10_44_CONSTANT, CIFAR10_44_STOCHASTIC = _cifar(CIFAR10, 44)

# Here: about 38 h and 30 h on one core.
# stochastic-depth reproduce cifar10-56 --out runs/cifar10-56
CIFAR10_56_CONSTANT, CIFAR10_56_STOCHASTIC = _cifar(CIFAR10, 56)

# Huang et al. 2016: 6.41 % constant, 5.23 % stochastic (the authors' page: 5.25); 20 h 42 and 15 h 7 on one Titan X.
# Here: about 68 h and 55 h on one core.
# stochastic-depth reproduce cifar10-110 --out runs/cifar10-110
CIFAR10_110_CONSTANT, CIFAR10_110_STOCHASTIC = _cifar(
    CIFAR10, 110, published=(6.41, 5.23), published_h=(20 + 42 / 60, 15 + 7 / 60)
)

# Huang et al. 2016: 6.72 % constant, 4.91 % stochastic; no time is given.
# Here: about 790 h and 630 h on one core.
# stochastic-depth reproduce cifar10-1202 --out runs/cifar10-1202
CIFAR10_1202_CONSTANT, CIFAR10_1202_STOCHASTIC = _cifar(CIFAR10, 1202, RECIPE_1202, published=(6.72, 4.91))

# Later papers: 13.63 % constant, 11.66 % stochastic, without augmentation.
# Here: about 68 h and 55 h on one core.
# stochastic-depth reproduce cifar10-unaugmented-110 --out runs/cifar10-unaugmented-110
CIFAR10_UNAUGMENTED_110_CONSTANT, CIFAR10_UNAUGMENTED_110_STOCHASTIC = _cifar(
    Data("cifar10"), 110, published=(13.63, 11.66)
)

# Not of the paper: all of CIFAR-10 without augmentation, 30 epochs, for a CPU. Here: about 4 h and 3 h on one thread.
# stochastic-depth reproduce cifar10-unaugmented-32 --out runs/cifar10-unaugmented-32
CIFAR10_UNAUGMENTED_32_CONSTANT, CIFAR10_UNAUGMENTED_32_STOCHASTIC = _cifar(
    Data("cifar10"), 32, replace(RECIPE, epochs=30, num_threads=1)
)

# Here: about 13 h and 10 h on one core.
# stochastic-depth reproduce cifar100-20 --out runs/cifar100-20
CIFAR100_20_CONSTANT, CIFAR100_20_STOCHASTIC = _cifar(CIFAR100, 20)

# Here: about 24 h and 19 h on one core.
# stochastic-depth reproduce cifar100-32 --out runs/cifar100-32
CIFAR100_32_CONSTANT, CIFAR100_32_STOCHASTIC = _cifar(CIFAR100, 32)

# Here: about 29 h and 23 h on one core.
# stochastic-depth reproduce cifar100-44 --out runs/cifar100-44
CIFAR100_44_CONSTANT, CIFAR100_44_STOCHASTIC = _cifar(CIFAR100, 44)

# Here: about 38 h and 30 h on one core.
# stochastic-depth reproduce cifar100-56 --out runs/cifar100-56
CIFAR100_56_CONSTANT, CIFAR100_56_STOCHASTIC = _cifar(CIFAR100, 56)

# Huang et al. 2016: 27.22 % constant, 24.58 % stochastic; 20 h 51 and 15 h 20 on one Titan X.
# Here: about 68 h and 55 h on one core.
# stochastic-depth reproduce cifar100-110 --out runs/cifar100-110
CIFAR100_110_CONSTANT, CIFAR100_110_STOCHASTIC = _cifar(
    CIFAR100, 110, published=(27.22, 24.58), published_h=(20 + 51 / 60, 15 + 20 / 60)
)

# Here: about 790 h and 630 h on one core.
# stochastic-depth reproduce cifar100-1202 --out runs/cifar100-1202
CIFAR100_1202_CONSTANT, CIFAR100_1202_STOCHASTIC = _cifar(CIFAR100, 1202, RECIPE_1202)

# Later papers: 44.74 % constant, 37.80 % stochastic, without augmentation.
# Here: about 68 h and 55 h on one core.
# stochastic-depth reproduce cifar100-unaugmented-110 --out runs/cifar100-unaugmented-110
CIFAR100_UNAUGMENTED_110_CONSTANT, CIFAR100_UNAUGMENTED_110_STOCHASTIC = _cifar(
    Data("cifar100"), 110, published=(44.74, 37.80)
)
