"""Few training images: as many of each class as requested, and nothing held out is ever trained on."""

import pytest
import torch

from stochastic_depth_lab.data import DataError, ImageData, Normalization, Split, batches, load

DIGITS = load("digits")


def rows(split: Split) -> set[bytes]:
    return {bytes(image.numpy().tobytes()) for image in split.images}


@pytest.mark.parametrize("images_per_class", [1, 20, 100])
def test_n_images_of_each_class_and_the_other_digits_are_for_testing(images_per_class):
    few = DIGITS.few(images_per_class, seed=3)
    assert few.train.labels.bincount().tolist() == [images_per_class] * 10
    assert len(few.test) == len(DIGITS.test) + len(DIGITS.train) - 10 * images_per_class
    # The digits hold no image twice, so that sets of their bytes tell the parts apart.
    parts = [rows(part) for part in (few.train, few.validation, few.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    assert rows(few.validation) == rows(DIGITS.validation)
    assert rows(few.test) >= rows(DIGITS.test)


def test_each_seed_draws_its_own():
    assert rows(DIGITS.few(20, seed=0).train) == rows(DIGITS.few(20, seed=0).train)
    assert rows(DIGITS.few(20, seed=0).train) != rows(DIGITS.few(20, seed=1).train)


def test_published_test_images_stay_as_they_are():
    published = ImageData("x", 10, DIGITS.class_names, DIGITS.train, DIGITS.validation, DIGITS.test)
    assert rows(published.few(5, seed=0).test) == rows(DIGITS.test)


def test_too_many_images_per_class_is_one_line():
    smallest = int(DIGITS.train.labels.bincount().min())
    assert len(DIGITS.few(smallest, seed=0).train) == 10 * smallest
    with pytest.raises(DataError, match=rf"^digits: images_per_class must be 1..{smallest}, the training images of cl"):
        DIGITS.few(smallest + 1, seed=0)


def test_each_pass_of_an_epoch_shows_every_image_in_a_new_order():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    split = Split(images, torch.arange(10))
    plain = Normalization(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    labels = [labels for _, labels in batches(split, 4, normalization=plain, seed=0, epoch=1, passes=3)]
    assert [len(batch) for batch in labels] == [4] * 7 + [2]
    passes = torch.cat(labels).view(3, 10).tolist()
    assert [sorted(each) for each in passes] == [list(range(10))] * 3
    assert len({tuple(each) for each in passes}) == 3
    (first,) = batches(split, 10, normalization=plain, seed=0, epoch=1)
    assert first[1].tolist() == passes[0]
    rest = [labels for _, labels in batches(split, 4, normalization=plain, seed=0, epoch=1, passes=3, start=5)]
    assert torch.equal(torch.cat(rest), torch.cat(labels[5:]))
    with pytest.raises(ValueError, match="passes must be 1 without a seed"):
        batches(split, 4, normalization=plain, passes=2)
