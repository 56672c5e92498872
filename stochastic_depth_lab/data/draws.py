"""Random draws that depend on a seed and a purpose, not on earlier draws."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor


def seed(*key: int | str) -> int:
    """A seed, the same for the same key on every machine: `seed("dropout", seed, epoch, step)`.

    The key is hashed: a CPU generator keeps only 32 bits of its seed (`manual_seed(5)` equals
    `manual_seed(5 + 2**32)`), so that seeds combined by arithmetic would collide.

    Example:
        >>> seed("order", 0, 1) == seed("order", 0, 1), seed("order", 0, 1) == seed("order", 1, 0)
        (True, False)
    """
    return random.Random(":".join(map(str, key))).getrandbits(32)


def generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU with that `seed`: `generator("order", seed, epoch)`."""
    return torch.Generator().manual_seed(seed(*key))


def draw(num_images: int, num_drawn: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of `num_drawn` of `num_images` images, drawn at random, and of the rest; both ascending, int64.

    Example:
        >>> drawn, rest = draw(5, 2, torch.Generator().manual_seed(0))
        >>> len(drawn), len(rest), sorted(drawn.tolist() + rest.tolist())
        (2, 3, [0, 1, 2, 3, 4])
    """
    order = torch.randperm(num_images, generator=generator)
    return order[:num_drawn].sort().values, order[num_drawn:].sort().values


def draw_per_class(labels: Tensor, num_drawn: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Like `draw`, with `num_drawn[c]` images of each class c.

    Args:
        labels: int64, (N,).
        num_drawn: one count per class, at most as many as the class has.
        generator: on the CPU.

    Example:
        >>> labels = torch.tensor([0, 1, 1, 0, 1])
        >>> drawn, rest = draw_per_class(labels, [1, 2], torch.Generator().manual_seed(0))
        >>> labels[drawn].bincount().tolist(), labels[rest].bincount().tolist()
        ([1, 2], [1, 1])
    """
    is_drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(num_drawn):
        members = (labels == label).nonzero().squeeze(1)
        is_drawn[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return is_drawn.nonzero().squeeze(1), (~is_drawn).nonzero().squeeze(1)


def proportional(labels: Tensor, num_drawn: int) -> list[int]:
    """`num_drawn` divided among the classes in proportion to their sizes, by largest remainders.

    Example:
        >>> proportional(torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]), 4)
        [2, 2, 0]
    """
    class_sizes: list[int] = labels.bincount().tolist()
    shares = [size * num_drawn / len(labels) for size in class_sizes]
    counts = [int(share) for share in shares]
    remainders = [share - count for share, count in zip(shares, counts, strict=True)]
    by_remainder = sorted(range(len(shares)), key=remainders.__getitem__, reverse=True)
    for label in by_remainder[: num_drawn - sum(counts)]:
        counts[label] += 1
    return counts
