"""The data sets by name."""

import difflib
import os
from pathlib import Path

import pooch

from stochastic_depth_lab.data import cifar, digits, imagenet, svhn
from stochastic_depth_lab.data.image_data import ImageData
from stochastic_depth_lab.errors import DataError

NAMES = ("digits", "cifar10", "cifar100", "svhn", "imagenet")


def default_data_root() -> Path:
    """The default folder of the data sets: the one in STOCHASTIC_DEPTH_DATA, else one in the user's cache."""
    return Path(os.environ.get("STOCHASTIC_DEPTH_DATA") or pooch.os_cache("stochastic-depth")).expanduser()


def load(
    name: str,
    *,
    data_root: Path | None = None,
    validation: int | None = None,
    split_seed: int = 0,
    download: bool = True,
    image_size: int | None = None,
    num_workers: int = 0,
) -> ImageData:
    """A data set in memory, except imagenet, whose pictures stay in their files. `.to(device)` moves it.

    Args:
        name: `"digits"`, `"cifar10"`, `"cifar100"`, `"svhn"` or `"imagenet"`.
        data_root: folder of the authors' files, and of downloads. None: `default_data_root()`.
        validation: number of images for validation. None: the paper's, 5,000 of CIFAR and 6,000 of SVHN; 180 digits;
            10,000 of ImageNet.
        split_seed: seed of their draw. The test images are always the same.
        download: whether to download missing files.
        image_size: of imagenet's pictures. None: 224.
        num_workers: number of processes that read imagenet's pictures.

    Raises:
        DataError: if there is no such data set, or its files are missing, damaged or altered.

    Example:
        >>> load("digits").train.images.shape
        torch.Size([1257, 1, 8, 8])
    """
    root = default_data_root() if data_root is None else data_root
    try:
        match name:
            case "digits":
                return digits.load(validation, split_seed)
            case "cifar10" | "cifar100":
                source = cifar.CIFAR10 if name == "cifar10" else cifar.CIFAR100
                return cifar.load(source, root, validation, split_seed, download=download)
            case "svhn":
                return svhn.load(svhn.SVHN, root, validation, split_seed, download=download)
            case "imagenet":
                return imagenet.load(root, validation, split_seed, image_size=image_size, num_workers=num_workers)
            case _:
                nearest = difflib.get_close_matches(name, NAMES, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise DataError(f"there is no data set {name!r}, only {', '.join(NAMES)}.{hint}")
    except OSError as error:
        raise DataError(f"{name}: {error.filename} cannot be read: {error.strerror}.") from error
