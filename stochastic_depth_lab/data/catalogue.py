"""The data sets by name."""

import difflib
import os
from pathlib import Path
from typing import Literal, get_args

import pooch

from stochastic_depth_lab.data import cifar, digits, imagenet, svhn
from stochastic_depth_lab.data.image_data import ImageData
from stochastic_depth_lab.errors import DataError

Name = Literal["digits", "cifar10", "cifar100", "svhn", "imagenet"]


def default_data_root() -> Path:
    """Where data lie unless told otherwise: the folder in STOCHASTIC_DEPTH_DATA, else one in the user's cache."""
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
    """A data set on the CPU, whole but for imagenet, whose pictures stay in their files; `.to(device)` moves it.

    Args:
        name: `"digits"`, `"cifar10"`, `"cifar100"`, `"svhn"` or `"imagenet"`.
        data_root: folder of the authors' files, and of what is downloaded. None: `default_data_root()`.
        validation: images for validation. None: the paper's number, 5,000 of CIFAR and 6,000 of SVHN; 180 digits;
            10,000 of ImageNet.
        split_seed: which images these are; the test images are always the same.
        download: whether missing files are downloaded.
        image_size: of imagenet's pictures. None: 224.
        num_workers: processes that read imagenet's pictures.

    Raises:
        DataError: if there is no such data set, or its files are missing, damaged or altered; one line with the remedy.

    Example:
        >>> load("digits").train.images.shape
        torch.Size([1257, 1, 8, 8])
    """
    try:
        root = default_data_root() if data_root is None else data_root
        if name == "imagenet":
            return imagenet.load(root, validation, split_seed, image_size=image_size, num_workers=num_workers)
        return _load(name, root, validation, split_seed, download)
    except OSError as error:
        raise DataError(f"{name}: {error.filename} cannot be read: {error.strerror}.") from error


def _load(name: str, root: Path, validation: int | None, split_seed: int, download: bool) -> ImageData:
    match name:
        case "digits":
            return digits.load(validation, split_seed)
        case "cifar10":
            return cifar.load(cifar.CIFAR10, root, validation, split_seed, download=download)
        case "cifar100":
            return cifar.load(cifar.CIFAR100, root, validation, split_seed, download=download)
        case "svhn":
            return svhn.load(svhn.SVHN, root, validation, split_seed, download=download)
        case _:
            nearest = difflib.get_close_matches(name, get_args(Name), n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise DataError(f"there is no data set {name!r}, only {', '.join(get_args(Name))}.{hint}")
