"""Street View House Numbers, cropped: 73,257 training, 531,131 extra and 26,032 test images of digits, 32x32, colour.

Source: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011;
http://ufldl.stanford.edu/housenumbers. For non-commercial use. The MATLAB files lie in the data root itself, as
torchvision has them. Training and extra images are used together (Huang et al. 2016): 604,388, of which 400 per class
of the first and 200 per class of the second are for validation.
"""

import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from stochastic_depth_lab.data.image_data import ImageData, Split
from stochastic_depth_lab.data.partition import draw_per_class
from stochastic_depth_lab.data.published import PublishedFile
from stochastic_depth_lab.data.seeding import generator
from stochastic_depth_lab.errors import DataError

NUM_CLASSES = 10


@dataclass(frozen=True)
class SvhnSource:
    """What SVHN consists of.

    Args:
        train: the training images.
        extra: the further, easier training images.
        test: the test images.
        validation: images for validation, two thirds of them from `train`, one from `extra`, as many of each class.
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
    """SVHN: uint8 (N, 3, 32, 32); label k is digit k. Takes 4 GB of memory while reading, 2 GB afterwards.

    Args:
        source: `SVHN`.
        data_root: holds the three files; those that are missing are downloaded here.
        validation: images for validation, a multiple of 30; None: 6,000, as the paper.
        split_seed: which ones.
        download: whether missing files are downloaded.

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
    # All files are there before the first one is read, so that nobody waits for an error.
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
    """The images and labels in one of the files, or in a part of one.

    The file holds `X`, uint8 (32, 32, 3, N): rows, columns, channels, images; and `y`, (N, 1), in 1..10, where 10
    stands for the digit 0.

    Raises:
        DataError: if it is anything else.
    """
    from scipy.io import loadmat, whosmat  # scipy is for this one format

    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    try:
        _check_elements(path)
        shapes = {
            name: tuple(shape) for name, shape, _ in cast("Sequence[tuple[str, Sequence[int], str]]", whosmat(path))
        }
        _check_shapes(shapes, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of some damage, a variable that occurs twice, scipy only warns
            content: dict[str, Any] = loadmat(path, variable_names=["X", "y"])
    except DataError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise DataError(
            f"{path}: not read, {type(error).__name__}: {error}. It is truncated or no MATLAB 5 file."
        ) from error

    pixels, digits = np.asarray(content["X"]), np.asarray(content["y"])
    if pixels.dtype != np.uint8 or digits.dtype.kind not in "uif":
        raise DataError(f"{path}: X must be uint8 and y numbers, but they are {pixels.dtype} and {digits.dtype}.")
    digits = digits.reshape(-1).astype(np.int64)
    if not bool(((digits >= 1) & (digits <= NUM_CLASSES)).all()):
        wrong = int(np.flatnonzero((digits < 1) | (digits > NUM_CLASSES))[0])
        raise DataError(f"{path}: label {digits[wrong]} of image {wrong} is not in 1..10: the file is damaged.")
    images = torch.from_numpy(pixels).permute(3, 2, 0, 1).contiguous()
    return Split(images, torch.from_numpy(digits % 10))


_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1, 2, 3, 4, 5, 6, 7, 9, 12, 13}
"""Types of elements that hold numbers."""
_HEAD_BYTES = 1024


def _check_elements(path: Path) -> None:
    """Raises DataError unless the file is a sequence of real numeric arrays, compressed or not, in MATLAB's format 5.

    scipy 1.17 looks up an element's type in a table without looking at its end: a wrong byte kills the process.
    """

    def damaged(what: str) -> DataError:
        return DataError(f"{path}: {what}: it is truncated or no MATLAB 5 file of numbers.")

    with path.open("rb") as file:
        if file.read(128)[124:] != b"\x00\x01IM":
            raise damaged("its header is not that of the format")
        while tag := file.read(8):
            if len(tag) < 8:
                raise damaged("an element's tag is cut off")
            kind, num_bytes = struct.unpack("<II", tag)
            start = file.tell()
            head = file.read(min(num_bytes, _HEAD_BYTES))
            if kind == _COMPRESSED:
                head = zlib.decompressobj().decompress(head, _HEAD_BYTES)
                kind, head = int.from_bytes(head[:4], "little"), head[8:]
            kinds = _element_kinds(head)
            if kind != _MATRIX or kinds[0] != 6 or kinds[1] != 5 or kinds[2] != 1 or kinds[3] not in _NUMBERS:
                raise damaged(f"an element has the types {kind}: {kinds}")
            (flags,) = struct.unpack_from("<I", head, 8)
            if not 6 <= flags & 0xFF <= 15 or flags & 0xFF00:
                raise damaged(f"a variable is no array of real numbers (flags {flags:#x})")
            file.seek(start + num_bytes)


def _element_kinds(head: bytes) -> list[int]:
    """Types of the four parts of an array: flags, dimensions, name, numbers."""
    kinds: list[int] = []
    place = 0
    for _ in range(4):
        word, num_bytes = struct.unpack_from("<II", head, place)
        small = word >> 16  # up to four bytes stand in the tag itself
        kinds.append(word & 0xFFFF if small else word)
        place += 8 if small else 8 + (num_bytes + 7) // 8 * 8
    return kinds


def _check_shapes(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises DataError unless the variables, read from the headers alone, are those of an SVHN file."""
    pixels, labels = shapes.get("X", ()), shapes.get("y", ())
    if len(pixels) != 4 or pixels[:3] != (32, 32, 3) or labels != (pixels[3], 1):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        raise DataError(
            f"{path}: X must be (32, 32, 3, N) and y (N, 1), but it holds {found}: no SVHN file of cropped digits."
        )
    # zlib packs a thousand times at best: a header that promises more is made up, and is not given memory.
    if np.prod(pixels, dtype=object) > 1032 * path.stat().st_size:
        raise DataError(f"{path}: promises {pixels[3]:,} images, more than its size can hold: the file is damaged.")


def _divide(path: Path, per_class: int, split_seed: int) -> tuple[Split, Split]:
    """A file's images: `per_class` of each class, drawn at random, and the rest."""
    part = read_file(path)
    fewest = int(part.labels.bincount(minlength=NUM_CLASSES).min())
    if fewest <= per_class:
        raise DataError(
            f"{path}: a class has only {fewest} images, but validation takes {per_class} of each: ask for fewer."
        )
    drawn, kept = draw_per_class(
        part.labels, [per_class] * NUM_CLASSES, generator("svhn", path.name, "validation", split_seed)
    )
    return part[drawn], part[kept]


def _join(first: Split, second: Split) -> Split:
    return Split(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))
