"""SVHN as in Huang et al. 2016: 604,388 images of house numbers, no augmentation, 50 epochs."""

from stochastic_depth_lab.experiments.config import Data, Model, Recipe
from stochastic_depth_lab.experiments.pairs import pair

# Huang et al. 2016: 2.01 % constant, 1.75 % stochastic; 33 h 43 and 25 h 33 on one Titan X.
# Here: about 125 h and 100 h on one core of an AMD EPYC, extrapolated from steps as in cifar.py.
# stochastic-depth reproduce svhn-152 --out runs/svhn-152
SVHN_152_CONSTANT, SVHN_152_STOCHASTIC = pair(
    "svhn-152",
    "SVHN, 152 layers",
    Data("svhn"),
    Recipe(epochs=50, lr_drops=(0.6, 0.7), validate_every=200),
    model=Model(152),
    published=(2.01, 1.75),
    published_h=(33 + 43 / 60, 25 + 33 / 60),
)
