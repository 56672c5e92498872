"""Street View House Numbers, cropped: 73,257 training, 531,131 extra and 26,032 test images of digits, 32x32, color.

Source: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011;
http://ufldl.stanford.edu/housenumbers. For non-commercial use. The MATLAB files lie in the data root itself, as
torchvision has them, and are verified before they are read. Training and extra images are used together (Huang et al.
2016): 604,388, of which 400 per class of the first and 200 per class of the second are for validation.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stochastic_depth_lab.data.draws import draw_per_class, generator
from stochastic_depth_lab.data.image_data import ImageData, Split
from stochastic_depth_lab.data.published import PublishedFile
from stochastic_depth_lab.errors import DataError

NUM_CLASSES = 10


@dataclass(frozen=True)
class SvhnSource:
    """The files of SVHN.

    Args:
        train: the training images.
        extra: more, easier training images.
        test: the test images.
        validation: number of images for validation: two thirds from `train`, one third from `extra`, the same number of
            each class.
    """

    train: PublishedFile
    extra: PublishedFile
    test: PublishedFile
    validation: int = 6000


_SERVER = "http://ufldl.stanford.edu/housenumbers"
SVHN = SvhnSource(
    train=PublishedFile(f"{_SERVER}/train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
    extra=PublishedFile(f"{_SERVER}/extra_32x32.mat", 1_329_278_602, "a93ce644f1a588dc4d68dda5feec44a7"),
    test=PublishedFile(f"{_SERVER}/test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
)


def load(source: SvhnSource, data_root: Path, validation: int | None, split_seed: int, *, download: bool) -> ImageData:
    """SVHN: uint8 (N, 3, 32, 32); label k is digit k. Takes 4 GB of memory while reading, 2 GB afterward.

    Args:
        source: `SVHN`.
        data_root: holds the three files; downloaded files are put here.
        validation: number of images for validation, a multiple of 30; None: 6,000, as in the paper.
        split_seed: seed of their draw.
        download: whether to download missing files.

    Raises:
        DataError: if a file is missing, or is not the published one, or a class has too few images.
    """
    num_validation = source.validation if validation is None else validation
    if num_validation < 1 or num_validation % (3 * NUM_CLASSES):
        raise DataError(
            f"svhn: validation must be a positive multiple of 30 images, but is {num_validation}: "
            "each of the 10 classes gives two from train for one from extra."
        )
    per_class = num_validation // (3 * NUM_CLASSES)
    # All files are there before the first one is read: an error comes early.
    paths = [file.in_folder(data_root, download=download) for file in (source.train, source.extra, source.test)]
    train_drawn, train_kept = _divide(paths[0], 2 * per_class, split_seed)
    extra_drawn, extra_kept = _divide(paths[1], per_class, split_seed)
    return ImageData(
        "svhn",
        NUM_CLASSES,
        tuple(str(digit) for digit in range(NUM_CLASSES)),
        train=_join(train_kept, extra_kept),
        validation=_join(train_drawn, extra_drawn),
        test=read_file(paths[2]),
    )


def read_file(path: Path) -> Split:
    """The images and labels of one file.

    The file holds `X`, uint8 (32, 32, 3, N): rows, columns, channels, images; and `y`, (N, 1), in 1..10, where 10
    stands for the digit 0.
    """
    from scipy.io import loadmat

    content = loadmat(path, variable_names=["X", "y"])
    images = torch.from_numpy(content["X"]).permute(3, 2, 0, 1).contiguous()
    return Split(images, torch.from_numpy(content["y"].reshape(-1).astype(np.int64) % 10))


def _divide(path: Path, per_class: int, split_seed: int) -> tuple[Split, Split]:
    """A file's images: `per_class` of each class, drawn at random, and the rest."""
    part = read_file(path)
    fewest = int(part.labels.bincount(minlength=NUM_CLASSES).min())
    if fewest <= per_class:
        raise DataError(
            f"{path}: a class has only {fewest} images, but validation takes {per_class} of each. Use fewer."
        )
    key = generator("svhn", path.name, "validation", split_seed)
    drawn, kept = draw_per_class(part.labels, [per_class] * NUM_CLASSES, key)
    return part[drawn], part[kept]


def _join(first: Split, second: Split) -> Split:
    return Split(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))
