"""Digits: 1,797 real images of 8x8 pixels, which come with scikit-learn. Not of the paper: the demo."""

from stochastic_depth_lab.experiments import few

# 20 images of each class to train on, 300 steps of 50: both memorize their 200 images, one of them less blindly.
# stochastic-depth reproduce digits --out runs/digits
DIGITS_CONSTANT, DIGITS_STOCHASTIC = few.few("digits", few.digits(), 56, steps=300, epochs=15, rates=few.DIGITS_RATES)
