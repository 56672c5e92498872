"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in color.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html. The unpacked folder (torchvision's layout) is read if it exists, otherwise
the archive, without unpacking it to disk. Every file is verified before it is read.
"""

import io
import pickle
import tarfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stochastic_depth_lab.data.draws import draw, generator
from stochastic_depth_lab.data.image_data import ImageData, Split
from stochastic_depth_lab.data.published import PublishedFile, check_md5
from stochastic_depth_lab.errors import DataError


@dataclass(frozen=True)
class CifarSource:
    """One of the two data sets. Digests are MD5, by file name.

    Args:
        name: on the command line.
        archive: the published archive.
        folder: the folder in the archive.
        train_files: files of the training images, in this order.
        test_files: files of the test images.
        meta_file: file of the class names.
        names_key: key of the class names in the meta file.
        labels_key: key of the labels in the other files.
        num_classes: number of classes.
        validation: number of training images for validation.
    """

    name: str
    archive: PublishedFile
    folder: str
    train_files: Mapping[str, str]
    test_files: Mapping[str, str]
    meta_file: Mapping[str, str]
    names_key: str
    labels_key: str
    num_classes: int
    validation: int = 5000


CIFAR10 = CifarSource(
    name="cifar10",
    archive=PublishedFile(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a"
    ),
    folder="cifar-10-batches-py",
    train_files={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test_files={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta_file={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    names_key="label_names",
    labels_key="labels",
    num_classes=10,
)

CIFAR100 = CifarSource(
    name="cifar100",
    archive=PublishedFile(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85"
    ),
    folder="cifar-100-python",
    train_files={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test_files={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta_file={"meta": "7973b15100ade9c7d40fb424638fde48"},
    names_key="fine_label_names",
    labels_key="fine_labels",
    num_classes=100,
)


def load(source: CifarSource, data_root: Path, validation: int | None, split_seed: int, *, download: bool) -> ImageData:
    """One of the two data sets: uint8 (N, 3, 32, 32).

    Args:
        source: `CIFAR10` or `CIFAR100`.
        data_root: holds the folder or the archive; a downloaded archive is put here.
        validation: number of images drawn at random from the training files; None: 5,000, as in the paper.
        split_seed: seed of that draw.
        download: whether to download a missing archive.

    Raises:
        DataError: if a file is missing, or is not the published one.
    """
    contents = _contents(source, data_root, download=download)

    def read(files: Mapping[str, str]) -> Split:
        parts = [read_batch(contents[name], source.labels_key) for name in files]
        return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))

    train, test = read(source.train_files), read(source.test_files)
    num_validation = source.validation if validation is None else validation
    if not 0 < num_validation < len(train):
        raise DataError(f"{source.name}: validation must be 1..{len(train) - 1} images, but is {num_validation}.")
    drawn, kept = draw(len(train), num_validation, generator(source.name, "validation", split_seed))
    names = tuple(unpickle(contents[next(iter(source.meta_file))])[source.names_key])
    return ImageData(source.name, source.num_classes, names, train[kept], train[drawn], test)


def _contents(source: CifarSource, data_root: Path, *, download: bool) -> dict[str, bytes]:
    """The verified content of every file of the source, by name."""
    digests = {**source.train_files, **source.test_files, **source.meta_file}
    folder = data_root / source.folder
    if not folder.is_dir():
        with tarfile.open(source.archive.in_folder(data_root, download=download), "r:gz") as tar:
            wanted = {f"{source.folder}/{name}": name for name in digests}
            members = [(member, wanted[member.name]) for member in tar if member.name in wanted]
            return {name: file.read() for member, name in members if (file := tar.extractfile(member))}
    remedy = f"Unpack {source.archive.name} again, or remove the folder to download it."
    if missing := [name for name in digests if not (folder / name).is_file()]:
        raise DataError(f"{folder} has no file {', '.join(missing)}. {remedy}")
    for name, md5 in digests.items():
        check_md5(folder / name, md5, remedy)
    return {name: (folder / name).read_bytes() for name in digests}


def read_batch(content: bytes, labels_key: str) -> Split:
    """The images and labels of one file.

    Args:
        content: a pickled dictionary with `data`, uint8 (N, 3072), each row three planes of 32x32 pixels, and a list of
            N labels.
        labels_key: `"labels"` in CIFAR-10, `"fine_labels"` or `"coarse_labels"` in CIFAR-100.
    """
    batch = unpickle(content)
    return Split(torch.from_numpy(batch["data"]).view(-1, 3, 32, 32), torch.tensor(batch[labels_key]))


def unpickle(content: bytes) -> dict[str, Any]:
    """A pickled dictionary of numpy arrays and plain values.

    Raises:
        UnpicklingError: if the pickle contains anything else, which could run code.
    """
    with warnings.catch_warnings():
        # Python 2's numpy wrote the alignment of an array's type as a number.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


class _ArraysOnly(pickle.Unpickler):
    """A second line of defense: the digests already ensure that the files are the published ones."""

    def find_class(self, module: str, name: str) -> object:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return super().find_class(module, name)
            case "numpy", "ndarray" | "dtype":
                return super().find_class(module, name)
            case _:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run foreign code")
