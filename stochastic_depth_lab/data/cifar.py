"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in colour.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html.
The folder that the authors' archive unpacks to (torchvision's layout) is read where it is there; otherwise the archive
itself, member by member, without unpacking it: nothing in it can be written anywhere.

The files are Python 2 pickles, and a pickle can run any code. They are read by `_ArrayUnpickler`, which knows arrays of
bytes and nothing else.
"""

import io
import math
import pickle
import pickletools
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from stochastic_depth_lab.data.image_data import ImageData, Split
from stochastic_depth_lab.data.partition import draw
from stochastic_depth_lab.data.published import PublishedFile, check_md5
from stochastic_depth_lab.data.seeding import generator
from stochastic_depth_lab.errors import DataError


@dataclass(frozen=True)
class CifarSource:
    """What one of the two sets consists of. Digests are MD5, by file name.

    Args:
        name: as the command line knows it.
        archive: the published archive.
        folder: the only folder in the archive.
        train_files: of the training images, in this order.
        test_files: of the test images.
        meta_file: of the class names.
        names_key: key of the class names in the meta file.
        labels_key: key of the labels in the other files.
        num_classes: number of classes.
        validation: images of the training files that are for validation.
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


_MAX_UNPACKED_BYTES = 1 << 30
"""Five times what the larger of the two archives unpacks to."""

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
    """One of the two sets: uint8 (N, 3, 32, 32).

    Args:
        source: `CIFAR10` or `CIFAR100`.
        data_root: holds the folder or the archive; a downloaded archive is put here.
        validation: images drawn at random from the training files; None: 5,000, as the paper.
        split_seed: which ones.
        download: whether a missing archive is downloaded.

    Raises:
        DataError: if a file is missing, or is not the published one, or its content is not what it should be.
    """
    contents = _contents(source, data_root, download=download)

    def read(files: Mapping[str, str]) -> Split:
        parts = [
            read_batch(contents[name], source.labels_key, source.num_classes, f"{source.name}, {name}")
            for name in files
        ]
        return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))

    train, test = read(source.train_files), read(source.test_files)
    num_validation = source.validation if validation is None else validation
    if not 0 < num_validation < len(train):
        raise DataError(f"{source.name}: validation must be 1..{len(train) - 1} images, but is {num_validation}.")
    drawn, kept = draw(len(train), num_validation, generator(source.name, "validation", split_seed))
    (meta,) = source.meta_file
    names = _read_names(contents[meta], source.names_key, f"{source.name}, {meta}")
    return ImageData(source.name, source.num_classes, names, train[kept], train[drawn], test)


def read_batch(content: bytes, labels_key: str, num_classes: int, where: str) -> Split:
    """The images and labels in one file of either set.

    Args:
        content: of the file: a pickled dictionary with `data`, uint8 (N, 3072), each row three planes of 32x32 pixels,
            and a list of N labels.
        labels_key: `"labels"` in CIFAR-10, `"fine_labels"` or `"coarse_labels"` in CIFAR-100.
        num_classes: labels are in 0..num_classes-1.
        where: opens the message of an error.

    Raises:
        DataError: if it is anything else.
    """
    batch = _unpickle(content, where)
    data, labels = batch.get("data"), batch.get(labels_key)
    if not isinstance(data, _Array) or len(data.shape) != 2 or data.shape[1] != 3 * 32 * 32 or not data.content:
        found = f"bytes {data.shape}" if isinstance(data, _Array) else type(data).__name__
        raise DataError(f"{where}: 'data' must be bytes (N, 3072), but is {found}: this is no CIFAR file.")
    if not isinstance(labels, list) or not all(type(label) is int for label in cast("list[object]", labels)):
        raise DataError(f"{where}: {labels_key!r} must be a list of integers: this is another data set's file.")
    if len(labels) != data.shape[0]:
        raise DataError(f"{where}: {data.shape[0]} images, but {len(labels)} labels: the file is damaged.")
    # Checked before they become int64, which cannot hold what is far out of range.
    if wrong := [index for index, label in enumerate(labels) if not 0 <= label < num_classes]:
        found = f"label {labels[wrong[0]]} of image {wrong[0]}"
        raise DataError(f"{where}: {found} is not in 0..{num_classes - 1}: the file is damaged.")
    images = torch.frombuffer(bytearray(data.content), dtype=torch.uint8).view(-1, 3, 32, 32)
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def _read_names(content: bytes, key: str, where: str) -> tuple[str, ...]:
    names = _unpickle(content, where).get(key)
    if not isinstance(names, list):
        raise DataError(f"{where}: {key!r} must be the list of the class names: this is another data set's file.")
    return tuple(_text(name) for name in cast("list[object]", names))


def _contents(source: CifarSource, data_root: Path, *, download: bool) -> dict[str, bytes]:
    """Content of every file of the source, by name, with the published digests."""
    digests = {**source.train_files, **source.test_files, **source.meta_file}
    folder = data_root / source.folder
    if folder.is_dir():
        place, remedy = folder, f"Unpack {source.archive.name} again, or remove the folder to have it downloaded."
        contents = {name: (folder / name).read_bytes() for name in digests if (folder / name).is_file()}
    else:
        place = source.archive.in_folder(data_root, download=download)
        remedy = "Remove the archive to have it downloaded again."
        contents = _members(place, {f"{source.folder}/{name}": name for name in digests})
    if missing := [name for name in digests if name not in contents]:
        raise DataError(f"{place} has no file {', '.join(missing)}. {remedy}")
    for name, content in contents.items():
        check_md5(content, digests[name], f"{place / name}", remedy)
    return contents


def _members(archive: Path, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Content of the wanted members of a .tar.gz, which must be regular files; nothing is unpacked to disk.

    Raises:
        DataError: if it is damaged, or unpacks to more than any published archive.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.offset_data + member.size > _MAX_UNPACKED_BYTES:
                    raise DataError(
                        f"{archive} unpacks to more than {_MAX_UNPACKED_BYTES:,} bytes: it is no archive of CIFAR."
                    )
                if member.name in wanted and member.isfile() and (file := tar.extractfile(member)):
                    contents[wanted[member.name]] = file.read()
    except DataError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise DataError(f"{archive} is no readable .tar.gz ({error}): it is damaged. Remove it.") from error
    return contents


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    """The pickled dictionary, which holds numpy arrays, lists, text and numbers and nothing else."""
    try:
        _refuse_far_memo(content)
        loaded: object = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(
            f"{where}: not read, {type(error).__name__}: {error}. Published CIFAR files hold arrays only."
        ) from error
    if not isinstance(loaded, dict):
        raise DataError(f"{where}: holds a {type(loaded).__name__} instead of a dictionary: this is no CIFAR file.")
    return {_text(key): value for key, value in cast("dict[object, object]", loaded).items()}


def _refuse_far_memo(content: bytes) -> None:
    """Python makes room for all places of its memo up to the highest that a pickle names: a byte can ask for 64 GB."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and cast(int, argument) > number:
            raise pickle.UnpicklingError(f"it puts its operation {number} at place {argument} of the memo")


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits the names by which numpy 1 and 2 pickle an array, without numpy's objects: a pickle could change those."""

    def find_class(self, module: str, name: str) -> object:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return _Array
            case "numpy", "ndarray":
                return _Array
            case "numpy", "dtype":
                return _ByteType
            case _:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run foreign code")


class _ByteType:
    """What stands in a pickle for the type of an array's elements: unsigned bytes."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array is of type {code!r} instead of unsigned bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which bytes don't have."""


class _Array:
    """What stands in a pickle for an array of unsigned bytes."""

    def __init__(self, *_: object) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.content = b""

    def __setstate__(self, state: object) -> None:
        """Numpy's own form: version, shape, type, whether in Fortran order, content."""
        match state:
            case (1, tuple(shape), _ByteType(), 0, bytes(content)) if math.prod(cast(Any, shape)) == len(content):
                self.shape, self.content = cast("tuple[int, ...]", shape), content
            case _:
                raise pickle.UnpicklingError("an array is not pickled as numpy does it")
