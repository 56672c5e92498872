"""Pictures in files: torchvision reads, crops and scales them in separate processes while the network trains.

The crops are those of fb.resnet.torch, which the paper used for ImageNet. Training: a random part of the picture, 8 to
100 % of its area, scaled to the network's size. Evaluation: the center of the picture, with its shorter side scaled to
256/224 of that size.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stochastic_depth_lab.errors import DataError


def import_torchvision(module: str = "torchvision") -> Any:
    """Import torchvision, an optional package, or one of its modules.

    Raises:
        DataError: if it is not installed, or was built for another PyTorch.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise DataError("imagenet needs torchvision: pip install 'stochastic-depth[imagenet]'") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise DataError(f"torchvision was built for another PyTorch than {torch.__version__}: {error}") from error


@dataclass(frozen=True, eq=False)
class PictureSplit:
    """One part of a data set whose pictures stay in their files. `Split` is for those that fit into memory.

    Args:
        paths: paths of the pictures, including those of other parts.
        indices: int64, (N,), the part's pictures among the paths.
        labels: int64, (N,), class indices from 0, on the device that trains.
        image_size: width and height after cropping and scaling.
        num_workers: number of processes that read them; 0: this process. Does not affect the images.
    """

    paths: tuple[Path, ...]
    indices: Tensor
    labels: Tensor
    image_size: int
    num_workers: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Device of the labels, and of the images once read."""
        return self.labels.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, self.image_size, self.image_size

    @property
    def images(self) -> Tensor:
        """All images, cropped as for evaluation: uint8, (N, C, H, W). Use it for a few only, see `first`."""
        return next(self.read([torch.arange(len(self))]))

    def first(self, num_images: int) -> "PictureSplit":
        """The first N pictures, or all if there are fewer."""
        return replace(self, indices=self.indices[:num_images], labels=self.labels[:num_images])

    def to(self, device: torch.device | str) -> "PictureSplit":
        """The same part for another device."""
        return replace(self, labels=self.labels.to(device))

    def read(self, batches: Iterable[Tensor], crop_seeds: Iterable[Tensor] | None = None) -> Iterator[Tensor]:
        """The images of each batch: uint8, (B, C, H, W), on the device.

        Args:
            batches: indices of the images, int64 (B,).
            crop_seeds: seeds of their random crops, int64 (B,). None: the center.

        Raises:
            DataError: if a file is not a readable picture.
        """
        if crop_seeds is None:
            asked = [[(int(self.indices[i]), None) for i in batch.tolist()] for batch in batches]
        else:
            asked = [
                [(int(self.indices[i]), seed) for i, seed in zip(batch.tolist(), seeds.tolist(), strict=True)]
                for batch, seeds in zip(batches, crop_seeds, strict=True)
            ]
        loader: DataLoader[Any] = DataLoader(
            _Pictures(self.paths, self.image_size),
            batch_sampler=asked,
            num_workers=min(self.num_workers, len(asked)),
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or each epoch would draw from PyTorch's global state
        )
        for images in loader:
            if isinstance(images, str):
                raise DataError(images)
            yield images.to(self.device, non_blocking=True)


class _Pictures(Dataset[Any]):
    """Pictures by (index, seed of the crop), as bytes (C, H, W); or an error message."""

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        v2 = import_torchvision("torchvision.transforms.v2")
        self._paths = paths
        self._random = v2.Compose([v2.RandomResizedCrop(image_size), v2.PILToTensor()])
        self._middle = v2.Compose([v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size), v2.PILToTensor()])

    def __getitem__(self, asked: tuple[int, int | None]) -> Tensor | str:
        from PIL import Image

        index, seed = asked
        try:
            with Image.open(self._paths[index]) as file:
                picture = file.convert("RGB")
        except Exception as error:  # a damaged picture can fail in any way
            return f"{self._paths[index]} is not a readable picture ({type(error).__name__}): download it again."
        if seed is None:
            return self._middle(picture)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's global state
            torch.default_generator.manual_seed(seed)
            return self._random(picture)


def _stack(read: list[Tensor | str]) -> Tensor | str:
    """A batch, or its first error message: an exception would carry the worker's traceback."""
    images = [each for each in read if not isinstance(each, str)]
    return torch.stack(images) if len(images) == len(read) else next(each for each in read if isinstance(each, str))
