"""A data set and its parts in memory, as bytes, on the training device."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stochastic_depth_lab.data.draws import draw_per_class, generator
from stochastic_depth_lab.data.normalization import Normalization
from stochastic_depth_lab.data.pictures import PictureSplit
from stochastic_depth_lab.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set (training, validation or test), all of it on one device.

    CIFAR-10 takes 184 MB, SVHN 1.9 GB: both fit on the device, and no worker process has to feed it.

    Args:
        images: uint8, (N, C, H, W).
        labels: int64, (N,), class indices from 0.

    Raises:
        DataError: for another type or shape, or if the numbers of images and labels differ.

    Example:
        >>> split = Split(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.arange(5))
        >>> len(split), split[torch.tensor([4, 0])].labels.tolist()
        (5, [4, 0])
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(f"images must be uint8 of shape (N, C, H, W), but are {_describe(images)}.")
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise DataError(f"labels must be int64 of shape (N,), but are {_describe(labels)}.")
        if len(images) != len(labels):
            raise DataError(
                f"every image needs one label, but there are {len(images)} images and {len(labels)} labels."
            )
        if images.device != labels.device:
            raise DataError(f"images and labels must share a device, but are on {images.device} and {labels.device}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Device of images and labels."""
        return self.labels.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def first(self, num_images: int) -> "Split":
        """The first N images, or all if there are fewer."""
        return Split(self.images[:num_images], self.labels[:num_images])

    def read(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each batch: uint8, (B, C, H, W), of indices, int64 (B,)."""
        for batch in batches:
            yield self.images[batch]

    def __getitem__(self, indices: Tensor) -> "Split":
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> "Split":
        """The same part on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    @classmethod
    def from_dataset(cls, source: Dataset[Any] | DataLoader[Any]) -> "Split":
        """Read any PyTorch data set of pairs (image, label) into a split, once, in its order.

        Each image is read once, so a random transform is frozen. Leave augmentation and normalization to `Augmentation`
        and `Normalization`, which work on batches on the device.

        Args:
            source: a map-style or iterable data set, or a `DataLoader`, whose batches are taken apart. An image is
                a PIL image, a uint8 array (H, W) or (H, W, C), a uint8 tensor (C, H, W) or (H, W), or what
                torchvision's `ToTensor` makes of those: a float tensor of multiples of 1/255. All have the same
                size. A label is an integer.

        Raises:
            DataError: if an image or a label is something else; it names the example.
        """
        images: list[Tensor] = []
        labels: list[int] = []
        for index, example in enumerate(_examples(source)):
            try:
                image, label = example
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"example {index} must be a pair (image, label), but is {_describe(example)}."
                ) from error
            images.append(_as_bytes(image, index))
            labels.append(_as_label(label, index))
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"all images must have the same size, but image {index} is {tuple(images[-1].shape)} and image 0 "
                    f"is {tuple(images[0].shape)}: resize or crop them in the data set."
                )
        if not images:
            raise DataError("the data set holds no image.")
        return cls(torch.stack(images), torch.tensor(labels))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification: its classes and its three parts.

    Args:
        name: on the command line, `"cifar10"`.
        num_classes: number of classes.
        class_names: one per class, in the order of the labels.
        train: trains the network, and determines the normalization.
        validation: chooses the epoch whose test error is reported.
        test: gives the reported error.
        normalization: if it comes with the data set. None: fitted on the training part.
        tests_on_the_rest: whether `few` adds the remaining training images to the test part, for data sets without
            published test images.

    Raises:
        DataError: if names, labels or image sizes disagree.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    train: Split | PictureSplit
    validation: Split | PictureSplit
    test: Split | PictureSplit
    normalization: Normalization | None = None
    tests_on_the_rest: bool = False

    def __post_init__(self) -> None:
        if len(self.class_names) != self.num_classes:
            raise DataError(f"{self.name}: {self.num_classes} classes, but {len(self.class_names)} class names.")
        for part in ("train", "validation", "test"):
            split = cast("Split | PictureSplit", getattr(self, part))
            if not len(split):
                raise DataError(f"{self.name}: the {part} part is empty.")
            if split.image_shape != self.train.image_shape:
                raise DataError(
                    f"{self.name}: images are {split.image_shape} in the {part} part, {self.train.image_shape} in "
                    "training."
                )
            check_labels(split.labels, self.num_classes, f"{self.name}, {part} part")

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on another device."""
        train, validation, test = (part.to(device) for part in (self.train, self.validation, self.test))
        normalization = self.normalization and self.normalization.to(device)
        return replace(self, train=train, validation=validation, test=test, normalization=normalization)

    def few(self, images_per_class: int, seed: int) -> "ImageData":
        """The same data with few training images, drawn at random. Validation images are never trained on.

        Args:
            images_per_class: number of training images of each class.
            seed: seed of the draw.

        Raises:
            DataError: if a class has fewer.
        """
        train, test = self.train, self.test
        if not isinstance(train, Split) or not isinstance(test, Split):
            raise DataError(f"{self.name}: images_per_class is for images in memory.")
        class_sizes: list[int] = train.labels.bincount(minlength=self.num_classes).tolist()
        if min(class_sizes) < images_per_class:
            smallest = class_sizes.index(min(class_sizes))
            raise DataError(
                f"{self.name}: images_per_class must be 1..{min(class_sizes)}, the training images of class "
                f"{self.class_names[smallest]!r}, but is {images_per_class}."
            )
        drawn, rest = draw_per_class(
            train.labels.cpu(), [images_per_class] * self.num_classes, generator("few", self.name, seed)
        )
        if self.tests_on_the_rest:
            left = train[rest.to(train.device)]
            test = Split(torch.cat([test.images, left.images]), torch.cat([test.labels, left.labels]))
        return replace(self, train=train[drawn.to(train.device)], test=test)

    def limited(self, num_images: int) -> "ImageData":
        """The same data with only the first N images of each part."""
        train, validation, test = (part.first(num_images) for part in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Raise DataError unless all labels, int64 (N,), are in 0..num_classes-1; `where` starts the message."""
    wrong = (labels < 0) | (labels >= num_classes)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise DataError(
            f"{where}: label {int(labels[index])} of image {index} is not in 0..{num_classes - 1}: "
            "the file is damaged, or belongs to a data set with other classes."
        )


def _examples(source: Dataset[Any] | DataLoader[Any]) -> Iterator[Any]:
    if isinstance(source, DataLoader):
        for batch in source:
            yield from zip(*batch, strict=True)
    elif hasattr(source, "__len__"):
        # Not iter(): many map-style data sets never raise the IndexError that ends it.
        for index in range(len(cast(Any, source))):
            yield source[index]
    else:
        yield from cast(Any, source)


def _as_bytes(image: object, index: int) -> Tensor:
    """Image as a uint8 tensor (C, H, W)."""
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        if tensor.is_floating_point():
            levels = tensor.double() * 255
            tensor = levels.round().to(torch.uint8)
            if not math.isclose(float((levels - tensor).abs().max()), 0, abs_tol=1e-3):
                raise DataError(
                    f"image {index} is a float tensor with values that are not multiples of 1/255 in 0..1: "
                    "it seems to be normalized or augmented. Use the data set without that transform."
                )
    else:
        array = np.array(image)  # PIL images and arrays: channels last
        if array.dtype != np.uint8:
            raise DataError(f"image {index} must be a uint8 tensor, array or PIL image, but is {_describe(image)}.")
        tensor = torch.from_numpy(array)
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    if tensor.dtype != torch.uint8 or tensor.ndim not in (2, 3):
        raise DataError(f"image {index} must be uint8 with 2 or 3 dimensions, but is {_describe(image)}.")
    return tensor.reshape(-1, *tensor.shape[-2:])


def _as_label(label: object, index: int) -> int:
    value = label.item() if isinstance(label, Tensor | np.generic) and np.ndim(cast(Any, label)) == 0 else label
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"label {index} must be an integer class index, but is {_describe(label)}.")
    return value


def _describe(value: object) -> str:
    """A short description: `torch.float32 of shape (3, 32, 32)`, or the type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{cast(Any, value).dtype} of shape {tuple(cast(Any, value).shape)}"
    return type(value).__name__
