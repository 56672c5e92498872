"""ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation pictures of 1,000 classes, of many sizes.

Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015; https://image-net.org. Download
it by hand, after registration. It is read like torchvision's `ImageFolder`: `imagenet/train/CLASS/PICTURE.JPEG` and
`imagenet/val/CLASS/PICTURE.JPEG` in the data root; any other folder of that form works too. The pictures in `val` are
the test part, since the challenge's own test labels are not public; validation pictures are drawn from `train`.
"""

from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth_lab.data.draws import draw, generator
from stochastic_depth_lab.data.image_data import ImageData
from stochastic_depth_lab.data.normalization import Normalization
from stochastic_depth_lab.data.pictures import PictureSplit, import_torchvision
from stochastic_depth_lab.errors import DataError

FOLDER = "imagenet"
NUM_VALIDATION = 10_000
IMAGE_SIZE = 224

# Of all training pictures, relative to full brightness, as in fb.resnet.torch.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def load(
    data_root: Path, validation: int | None, split_seed: int, *, image_size: int | None, num_workers: int
) -> ImageData:
    """The pictures of a folder, in a random order that is always the same. Only names are read yet.

    Args:
        data_root: holds the folder.
        validation: number of pictures drawn at random from those for training; None: 10,000.
        split_seed: seed of their draw.
        image_size: width and height after cropping and scaling; None: 224.
        num_workers: number of processes that read them.

    Raises:
        DataError: if the folder is missing or of another form.
    """
    train_paths, train_labels, classes = _list_pictures(data_root, "train")
    test_paths, test_labels, test_classes = _list_pictures(data_root, "val")
    if test_classes != classes:
        different = sorted({*classes} ^ {*test_classes})
        raise DataError(
            f"imagenet: train has {len(classes)} classes and val {len(test_classes)}, {different[0]!r} is in "
            "one only: both must have the same folders."
        )
    num_validation = NUM_VALIDATION if validation is None else validation
    if not 0 < num_validation < len(train_paths):
        raise DataError(
            f"imagenet: validation must be 1..{len(train_paths) - 1} pictures, but is {num_validation}: choose it with "
            "--data.num-validation."
        )
    drawn, kept = draw(len(train_paths), num_validation, generator(FOLDER, "validation", split_seed))

    def part(paths: tuple[Path, ...], labels: Tensor, indices: Tensor, name: str) -> PictureSplit:
        # The folders are sorted by class: --data.limit must take some of each.
        indices = indices[torch.randperm(len(indices), generator=generator(FOLDER, "order", name))]
        return PictureSplit(paths, indices, labels[indices], image_size or IMAGE_SIZE, num_workers)

    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return ImageData(
        "imagenet",
        len(classes),
        tuple(classes),
        train=part(train_paths, train_labels, kept, "train"),
        validation=part(train_paths, train_labels, drawn, "validation"),
        test=part(test_paths, test_labels, torch.arange(len(test_paths)), "test"),
        normalization=Normalization(mean, std),
    )


def _list_pictures(data_root: Path, part: str) -> tuple[tuple[Path, ...], Tensor, list[str]]:
    """Paths, labels and class names of one part."""
    folder = data_root / FOLDER / part
    try:
        next(folder.iterdir(), None)  # missing pictures are reported before a missing torchvision
        found = import_torchvision("torchvision.datasets").ImageFolder(folder)
    except FileNotFoundError as error:  # no folder, no class, or a class without a picture
        raise DataError(
            f"{folder} holds no folders of pictures ({error}). Register at https://image-net.org, download "
            "ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB) and ILSVRC2012_devkit_t12.tar.gz into "
            f"{data_root / FOLDER}, and let torchvision.datasets.ImageNet unpack them into train/CLASS/*.JPEG and "
            "val/CLASS/*.JPEG."
        ) from None
    return tuple(Path(path) for path, _ in found.samples), torch.tensor(found.targets), list(found.classes)
