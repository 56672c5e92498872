"""Splits: what they accept, how they read PyTorch's data sets, and which images are in which part."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stochastic_depth_lab.data import DataError, ImageData, Split, load
from stochastic_depth_lab.data.draws import draw_per_class, proportional

IMAGES = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


class Pairs(Dataset):  # type: ignore[type-arg]
    """A map-style data set that, as many do, never raises IndexError."""

    def __init__(self, images: list[object], labels: list[object]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, object]:
        return self.images[index % len(self)], self.labels[index % len(self)]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        yield from zip(IMAGES, LABELS.tolist(), strict=True)


def channels_last() -> list[np.ndarray]:
    return [image.permute(1, 2, 0).numpy() for image in IMAGES]


@pytest.mark.parametrize(
    "source",
    [
        TensorDataset(IMAGES, LABELS),
        Pairs(list(IMAGES), LABELS.tolist()),
        Pairs([Image.fromarray(image) for image in channels_last()], LABELS.tolist()),
        Pairs(list(channels_last()), list(LABELS.numpy())),
        Pairs([image.float() / 255 for image in IMAGES], LABELS.tolist()),
        Stream(),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
    ],
    ids=["tensors", "map style", "PIL", "numpy", "ToTensor", "iterable", "DataLoader"],
)
def test_any_data_set_of_pairs_becomes_a_split(source: Dataset | DataLoader) -> None:  # type: ignore[type-arg]
    split = Split.from_dataset(source)
    assert torch.equal(split.images, IMAGES)
    assert torch.equal(split.labels, LABELS)


def test_gray_images_get_a_channel() -> None:
    gray = [Image.fromarray(image[0].numpy()) for image in IMAGES]
    assert torch.equal(Split.from_dataset(Pairs([*gray], LABELS.tolist())).images, IMAGES[:, :1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([torch.randn(3, 4, 5)], [0], "image 0 is a float tensor .* seems to be normalized"),
        ([torch.full((3, 4, 5), 1.5)], [0], "image 0 is a float tensor"),
        ([torch.full((3, 4, 5), torch.nan)], [0], "image 0 is a float tensor"),
        (
            [torch.zeros(3, 4, 5, dtype=torch.int32)],
            [0],
            r"image 0 must be uint8 .* but is torch.int32 of shape \(3, 4, 5\)",
        ),
        (["cat.png"], [0], "image 0 must be"),
        ([object()], [0], "image 0 must be .* but is object"),
        ([IMAGES[0], IMAGES[0, :, :2]], [0, 1], r"image 1 is \(3, 2, 5\) and image 0 is \(3, 4, 5\)"),
        ([IMAGES[0]], ["cat"], "label 0 must be an integer class index, but is str"),
        ([IMAGES[0]], [1.0], "label 0 must be an integer"),
        ([IMAGES[0]], [torch.tensor([0, 1])], r"label 0 must be .* shape \(2,\)"),
        ([], [], "holds no image"),
    ],
    ids=["normalized", "over 1", "nan", "int32", "text", "object", "sizes", "named", "float", "one-hot", "empty"],
)
def test_other_images_and_labels_are_refused(images: list[object], labels: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Split.from_dataset(Pairs(images, labels))


def test_examples_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="example 0 must be a pair"):
        Split.from_dataset(TensorDataset(IMAGES))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.float(), LABELS, "images must be uint8"),
        (IMAGES[0], LABELS, r"\(N, C, H, W\)"),
        (IMAGES, LABELS.int(), "labels must be int64"),
        (IMAGES, LABELS[:5], "6 images and 5 labels"),
        (IMAGES, LABELS.to("meta"), "share a device"),
    ],
    ids=["float", "one image", "int32", "count", "device"],
)
def test_split_checks_its_tensors(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Split(images, labels)


@pytest.mark.parametrize(
    ("num_classes", "test", "message"),
    [
        (2, Split(IMAGES, LABELS), r"made up, train part: label 2 of image 2 is not in 0\.\.1"),
        (3, Split(IMAGES, LABELS - 1), "test part: label -1 of image 0"),
        (3, Split(IMAGES[:0], LABELS[:0]), "test part is empty"),
        (3, Split(IMAGES[:, :1], LABELS), r"images are \(1, 4, 5\) in the test part"),
    ],
    ids=["too large", "negative", "empty", "shape"],
)
def test_image_data_checks_its_parts(num_classes: int, test: Split, message: str) -> None:
    split = Split(IMAGES, LABELS)
    with pytest.raises(DataError, match=message):
        ImageData("made up", num_classes, ("a", "b", "c")[:num_classes], split, split, test)


def test_drawing_per_class_is_a_partition() -> None:
    labels = torch.arange(100) % 7
    drawn, rest = draw_per_class(labels, [3] * 7, torch.Generator().manual_seed(0))
    assert sorted([*drawn.tolist(), *rest.tolist()]) == list(range(100))
    assert labels[drawn].bincount().tolist() == [3] * 7


@pytest.mark.parametrize("num_drawn", range(0, 38, 5))
def test_proportional_counts_sum_up_and_stay_within_one(num_drawn: int) -> None:
    labels = torch.tensor([0] * 20 + [1] * 11 + [2] * 5 + [3])
    counts = proportional(labels, num_drawn)
    assert sum(counts) == num_drawn
    assert all(abs(count - size * num_drawn / 37) < 1 for count, size in zip(counts, (20, 11, 5, 1), strict=True))


def test_digits_are_all_there_once_and_in_proportion() -> None:
    digits = load("digits")
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert int(digits.train.images.max()) == 16
    for part in parts:  # 1,797 images, 174 to 183 of each class
        share = part.labels.bincount() / len(part)
        assert float((share - 0.1).abs().max()) < 0.01
    from sklearn.datasets import load_digits

    source = load_digits()
    theirs = sorted(zip(source.data.astype(np.uint8).tolist(), source.target.tolist(), strict=True))
    ours = [
        (image, label)
        for part in parts
        for image, label in zip(part.images.flatten(1).tolist(), part.labels.tolist(), strict=True)
    ]
    assert sorted(ours) == theirs


def test_split_seed_changes_the_validation_part_but_never_the_test_part() -> None:
    first, second = load("digits", split_seed=0), load("digits", split_seed=1)
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.validation.images, second.validation.images)
    assert torch.equal(load("digits", split_seed=1).validation.images, second.validation.images)


def test_digits_do_not_change_between_versions() -> None:
    """A silently changed division would make results incomparable; these sums are from 2026-11-21."""
    digits = load("digits")
    sums = [
        int(part.images.flatten(1).long().sum(1).mul(torch.arange(len(part))).sum())
        for part in (digits.train, digits.test)
    ]
    assert sums == [246370973, 20100884]


@pytest.mark.parametrize("validation", [0, -5, 1437], ids=str)
def test_validation_must_leave_something_to_train_on(validation: int) -> None:
    with pytest.raises(DataError, match=rf"digits: validation must be 1\.\.1436 images, but is {validation}"):
        load("digits", validation=validation)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no data set 'cifar-10', only digits, .* Did you mean 'cifar10'\?"):
        load("cifar-10")
