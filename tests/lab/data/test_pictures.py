"""ImageNet from a folder of pictures: the parts, the crops, and that they follow from a seed."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_data import write_pictures
from PIL import Image

from stochastic_depth_lab.data import Augmentation, DataError, Normalization, PictureSplit, batches, load


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "imagenet" / "train", pictures_per_class=6)
    write_pictures(tmp_path / "imagenet" / "val", pictures_per_class=3)
    return tmp_path


def small(root, **options):
    return load("imagenet", data_root=root, **{"validation": 5, "image_size": 32, **options})


def names(part: PictureSplit) -> list[str]:
    return ["/".join(part.paths[i].parts[-2:]) for i in part.indices]


def test_every_picture_is_in_one_part_with_the_label_of_its_folder(root):
    data = small(root)
    assert data.class_names == ("n01", "n02", "n03")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [13, 5, 9]
    every = [f"n0{label}/{number}.JPEG" for label in (1, 2, 3) for number in range(6)]
    assert sorted(names(data.train) + names(data.validation)) == every
    for part in (data.train, data.validation, data.test):
        assert [f"n0{label + 1}" for label in part.labels.tolist()] == [name.split("/")[0] for name in names(part)]
    assert all("val" in data.test.paths[i].parts for i in data.test.indices)
    # The first few are not all of the first class.
    assert len(set(data.train.first(6).labels.tolist())) == 3
    assert names(small(root).validation) == names(data.validation)
    assert sorted(names(small(root, split_seed=1).validation)) != sorted(names(data.validation))


def test_the_middle_of_a_picture_is_what_pillow_makes_of_it(root):
    test = small(root).test
    for index, read in enumerate(test.images):
        with Image.open(test.paths[test.indices[index]]) as file:
            picture = file.convert("RGB")
        width, height = picture.size
        short = 36  # 256/224 of 32
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        scaled = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        top, left = round((size[1] - 32) / 2), round((size[0] - 32) / 2)
        expected = scaled[top : top + 32, left : left + 32].transpose(2, 0, 1)
        assert np.array_equal(read.numpy(), expected)


def test_normalization_is_imagenets(root):
    normalization = small(root).normalization
    assert isinstance(normalization, Normalization)
    white = normalization(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white[0, :, 0, 0], expected)


def epoch(part: PictureSplit, batch_size: int = 4, **options):
    settings = {
        "normalization": Normalization(torch.zeros(1), torch.ones(1)),
        "augmentation": Augmentation(translation=0),
        "seed": 3,
        "epoch": 2,
    }
    return list(batches(part, batch_size, **{**settings, **options}))


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for (images, labels), (others, other_labels) in zip(left, right, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_crops_follow_from_seed_epoch_and_place_alone(root):
    train = small(root, validation=6).train
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = epoch(train)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_same_batches(epoch(train), whole)
    assert_same_batches(epoch(train, start=2), whole[2:])
    # Two halves of a batch, as two processes read them.
    halves = [epoch(train, rank=rank, num_ranks=2) for rank in (0, 1)]
    joined = [
        tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
        for first, second in zip(*halves, strict=True)
    ]
    assert_same_batches(joined, whole)
    # Of one and the same picture, so that its place in another order does not matter.
    one = replace(train, indices=torch.zeros_like(train.indices))
    assert len(set(brightness(epoch(one)))) == len(one)
    for other in ({"seed": 4}, {"epoch": 3}):
        assert not {*brightness(epoch(one, **other))} & {*brightness(epoch(one))}


def test_only_training_crops_at_random(root):
    train = small(root).train
    middles = [(train.images, train.labels)]
    assert brightness(epoch(train, augmentation=None)) == brightness(middles)
    assert brightness(epoch(train, augmentation=None, seed=None)) == brightness(middles)
    assert brightness(epoch(train)) != brightness(middles)


def brightness(batches) -> list[int]:
    """Of every image, whatever their order."""
    return sorted(int(image.sum()) for images, _ in batches for image in images)


def test_processes_that_read_change_nothing(root):
    before = torch.get_rng_state()
    read = epoch(small(root, num_workers=2).train)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_batches(read, epoch(small(root).train))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_picture_is_one_line_with_its_name(root, num_workers):
    path = root / "imagenet" / "val" / "n02" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    test = small(root, num_workers=num_workers).test
    with pytest.raises(DataError, match=r"val/n02/1\.JPEG is not a readable picture \(\w+\): download it again\.$"):
        list(batches(test, 4, normalization=Normalization(torch.zeros(1), torch.ones(1))))


def assert_refused(root, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        small(root, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_form_is_refused(root):
    assert_refused(root / "nowhere", r"138 GB.*train/CLASS/\*\.JPEG")
    assert_refused(root, r"validation must be 1\.\.17 pictures, but is 18", validation=18)
    shutil.rmtree(root / "imagenet" / "val" / "n03")
    assert_refused(root, r"train has 3 classes and val 2, 'n03' is in one only")
    shutil.rmtree(root / "imagenet" / "val")
    (root / "imagenet" / "val").mkdir()
    assert_refused(root, r"imagenet/val holds no folders of pictures .*ILSVRC2012_img_val\.tar \(6\.3 GB\)")
    (root / "imagenet" / "val" / "n01").mkdir()
    assert_refused(root, r"imagenet/val holds no folders of pictures .*n01")


def test_torchvision_that_is_not_there_is_one_line(root, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert_refused(root, r"run pip install '\.\[imagenet\]' in a clone of the project\.$")
