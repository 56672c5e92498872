"""Cost of preprocessing an image: crop, flip, normalize and batch, one by one or a batch at once.

    python benchmarks/input_pipeline.py

Torchvision's transforms on PIL pictures and on tensors, in a `DataLoader` of the same process, beside `batches` of the
laboratory, which augments a whole batch of bytes in memory. Process time per image, median of interleaved rounds.
"""

from __future__ import annotations

import torchvision_schemas  # noqa: F401

# isort: split
import argparse
import functools
import statistics
from collections.abc import Callable, Iterable

import torch
from protocol import interleaved, write_table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from stochastic_depth_lab.data import Augmentation, Normalization, Split, batches

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
NORMALIZATION = Normalization(*(255 * torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD)))
"""The same for both pipelines."""


class Augmented(Dataset[tuple[Tensor, int]]):
    """Pictures of bytes, transformed one by one.

    Args:
        split: the pictures.
        transform: of one picture.
    """

    def __init__(self, split: Split, transform: Callable[[object], Tensor]) -> None:
        self.pictures = [v2.functional.to_pil_image(image) for image in split.images]
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def augmented_one_by_one(split: Split, batch_size: int) -> DataLoader[tuple[Tensor, int]]:
    """The usual way: torchvision's transforms on PIL pictures, in a `DataLoader`."""
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(Augmented(split, transform), batch_size, shuffle=True)


def augmented_at_once(split: Split, batch_size: int, epoch: int = 1, seed: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
    """The laboratory's way."""
    return batches(
        split,
        batch_size,
        normalization=NORMALIZATION,
        augmentation=Augmentation(translation=4, flip=True),
        seed=seed,
        epoch=epoch,
    )


def read(make: Callable[[], Iterable[tuple[Tensor, object]]]) -> None:
    """An epoch without a network."""
    for _ in make():
        pass


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = Split(torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (args.images,)))
    loader = augmented_one_by_one(split, args.batch_size)
    times = interleaved(
        {
            "torchvision, one by one": functools.partial(read, lambda: loader),
            "stochastic_depth_lab, a batch at once": functools.partial(
                read, lambda: augmented_at_once(split, args.batch_size)
            ),
        },
        rounds=args.rounds,
        warm_up=2,
    )
    slowest = statistics.median(times["torchvision, one by one"])
    rows = [
        [name, f"{statistics.median(values) / args.images * 1e6:.1f}", f"{statistics.median(values) / slowest:.3f}"]
        for name, values in times.items()
    ]
    write_table(
        "input_pipeline",
        "Shuffle, crop with 4 pixels of padding, flip, normalize and batch: CIFAR's pictures",
        ["pipeline", "process time per image, µs (median)", "ratio"],
        rows,
        f"{args.images} pictures of random bytes, batches of {args.batch_size}, in memory, in the process that trains; "
        f"n = {args.rounds} interleaved rounds.",
    )


if __name__ == "__main__":
    main()
