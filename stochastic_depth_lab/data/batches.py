"""From a split to the batches of an epoch: order, augmentation and normalization."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stochastic_depth_lab.data.augmentation import Augmentation
from stochastic_depth_lab.data.draws import generator
from stochastic_depth_lab.data.image_data import Split
from stochastic_depth_lab.data.normalization import Normalization
from stochastic_depth_lab.data.pictures import PictureSplit


def num_batches(num_images: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Number of batches in an epoch, counting a shorter last one unless it is dropped.

    Example:
        >>> num_batches(45_000, 128), num_batches(45_000, 128, drop_last=True)
        (352, 351)
    """
    return num_images // batch_size if drop_last else math.ceil(num_images / batch_size)


def batches(
    split: Split | PictureSplit,
    batch_size: int,
    *,
    normalization: Normalization,
    augmentation: Augmentation | None = None,
    seed: int | None = None,
    epoch: int = 0,
    passes: int = 1,
    start: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch, on the split's device: inputs, float32 (B, C, H, W), and labels, int64 (B,).

    With a seed the images come in random order. Order and augmentation are drawn up front and depend only on (seed,
    epoch) and the position in the epoch, not on the device, the batch size, or what was read before. A run that stopped
    after k batches resumes with `start=k`, bit for bit. Global random state is not used.

    Args:
        split: the part to read.
        batch_size: images in a batch; the last batch of an epoch may be shorter.
        normalization: fitted on the training part.
        augmentation: for training; needs a seed. Pictures in files are cropped at random with it.
        seed: of the run. None: all images in their order, for evaluation.
        epoch: number of the epoch. Each has its own order and augmentation.
        passes: number of passes over the images in an epoch, each in a new order; more than one need a seed. A batch
            may begin in one pass and end in the next.
        start: number of batches to skip.
        drop_last: leave out a last batch that is shorter. (The authors keep it.)
        rank: which part of each batch to yield, if several processes share it.
        num_ranks: number of parts. If a batch in random order has fewer images, the empty parts yield its first image,
            to be counted with weight 0: every process must take the step.

    Raises:
        ValueError: if the batch size is not positive, `start` is negative or beyond the epoch, or augmentation or
            several passes have no seed.
    """
    end = num_batches(len(split) * passes, max(batch_size, 1), drop_last=drop_last)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    if not 0 <= start <= end:
        raise ValueError(f"start must be in 0..{end}, the batches of this epoch, but is {start}: another batch size?")
    if augmentation is not None and seed is None:
        raise ValueError("augmentation is random and needs a seed: give both, or neither for evaluation.")
    if passes != 1 and seed is None:
        raise ValueError(f"passes must be 1 without a seed, for evaluation, but is {passes}.")
    indices, part = range(start, end), (rank, num_ranks)
    return _batches(split, batch_size, normalization, augmentation, seed, epoch, passes, indices, part)


def part_of_batch(num_images: int, rank: int, num_ranks: int) -> range:
    """The positions in a batch that belong to one process. All parts together are the batch.

    Example:
        >>> part_of_batch(5, 0, 2), part_of_batch(5, 1, 2)
        (range(0, 2), range(2, 5))
    """
    return range(num_images * rank // num_ranks, num_images * (rank + 1) // num_ranks)


def _batches(
    split: Split | PictureSplit,
    batch_size: int,
    normalization: Normalization,
    augmentation: Augmentation | None,
    seed: int | None,
    epoch: int,
    passes: int,
    indices: range,
    part: tuple[int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    device = split.device
    normalization = normalization.to(device)
    order = torch.arange(len(split))
    draws = crop_seeds = None
    if seed is not None:  # drawn on the CPU: every device sees the same epoch
        draw = generator("order", seed, epoch)
        order = torch.cat([torch.randperm(len(split), generator=draw) for _ in range(passes)])
        if augmentation is not None:
            draws = augmentation.draw(len(order), generator("augmentation", seed, epoch)).to(device)
            crop_seeds = torch.randint(1 << 32, (len(order),), generator=generator("crop", seed, epoch))
    places = [_own_places(len(order), batch_size, index, part, random=seed is not None) for index in indices]
    if isinstance(split, PictureSplit):
        seeds = None if crop_seeds is None else [crop_seeds[each] for each in places]
        images = split.read([order[each] for each in places], seeds)
    else:
        images = split.read(map(order.to(device).__getitem__, places))
    labels = split.labels[order.to(device)]
    for own, batch in zip(places, images, strict=True):
        inputs = normalization(batch)
        if augmentation is not None and draws is not None:
            inputs = augmentation(inputs, draws[own])
        yield inputs, labels[own]


def _own_places(num_images: int, batch_size: int, index: int, part: tuple[int, int], *, random: bool) -> slice:
    """Which positions of an epoch's order belong to one process, in the batch of that index."""
    first, num_images = index * batch_size, min(batch_size, num_images - index * batch_size)
    own = part_of_batch(num_images, *part)
    if random and not own:
        own = range(1)
    return slice(first + own.start, first + own.stop)
