"""Digits: 1,797 real images of 8x8 pixels, which come with scikit-learn. Not of the paper: the three-minute demo."""

from stochastic_depth_lab.config import Data, Recipe
from stochastic_depth_lab.experiments.pairs import pair

# stochastic-depth reproduce digits --out runs/digits
DIGITS_CONSTANT, DIGITS_STOCHASTIC = pair(
    "digits",
    "Digits, 110 layers",
    Data("digits"),
    Recipe(epochs=20, batch_size=64, learning_rate=0.03, lr_schedule="one_cycle"),
    num_layers=110,
)
