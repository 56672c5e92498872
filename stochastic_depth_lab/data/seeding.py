"""Random generators that are a function of what they are for, so that nothing depends on what was drawn before."""

import random

import torch


def seed(*key: int | str) -> int:
    """A seed, the same for the same key on every machine: `seed("dropout", seed, epoch, step)`.

    A CPU generator keeps only 32 bits of its seed (`manual_seed(5)` equals `manual_seed(5 + 2**32)`), so seeds
    combined by arithmetic collide; the key is hashed instead.

    Example:
        >>> seed("order", 0, 1) == seed("order", 0, 1), seed("order", 0, 1) == seed("order", 1, 0)
        (True, False)
    """
    return random.Random(":".join(map(str, key))).getrandbits(32)


def generator(*key: int | str) -> torch.Generator:
    """Generator on the CPU of that `seed`: `generator("order", seed, epoch)`.

    Example:
        >>> a, b = generator("order", 0, 1), generator("order", 0, 1)
        >>> bool((torch.randperm(9, generator=a) == torch.randperm(9, generator=b)).all())
        True
    """
    return torch.Generator().manual_seed(seed(*key))
