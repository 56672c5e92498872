"""The digits of scikit-learn: 1,797 real gray images of 8x8 pixels, in 10 classes, without a download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (CC BY 4.0); scikit-learn ships
its test set, so there is no published split. Ours keeps every class in proportion: 360 test images, always the same;
180 for validation, drawn with a seed; the other 1,257 for training.
"""

from typing import Any, cast

import numpy as np
import torch

from stochastic_depth_lab.data.draws import draw_per_class, generator, proportional
from stochastic_depth_lab.data.image_data import ImageData, Split
from stochastic_depth_lab.errors import DataError

NUM_TEST = 360
NUM_VALIDATION = 180


def load(validation: int | None, split_seed: int) -> ImageData:
    """The digits: uint8 (N, 1, 8, 8), gray levels 0..16.

    Args:
        validation: number of images for validation; None: 180.
        split_seed: seed of their draw.

    Raises:
        DataError: if `validation` leaves nothing to train on.

    Example:
        >>> digits = load(validation=None, split_seed=0)
        >>> len(digits.train), len(digits.validation), len(digits.test)
        (1257, 180, 360)
    """
    from sklearn.datasets import load_digits  # takes a second to import

    source = cast(Any, load_digits())  # its annotation allows a tuple too
    images = torch.from_numpy(source.images.astype(np.uint8))[:, None]  # whole numbers 0..16, stored as float64
    everything = Split(images, torch.from_numpy(source.target.astype(np.int64)))

    labels = everything.labels
    test, rest = draw_per_class(labels, proportional(labels, NUM_TEST), generator("digits", "test"))
    num_validation = NUM_VALIDATION if validation is None else validation
    if not 0 < num_validation < len(rest):
        raise DataError(f"digits: validation must be 1..{len(rest) - 1} images, but is {num_validation}.")
    drawn, kept = draw_per_class(
        labels[rest], proportional(labels[rest], num_validation), generator("digits", "validation", split_seed)
    )
    names = tuple(str(digit) for digit in range(10))
    return ImageData(
        "digits",
        10,
        names,
        everything[rest[kept]],
        everything[rest[drawn]],
        everything[test],
        tests_on_the_rest=True,
    )
