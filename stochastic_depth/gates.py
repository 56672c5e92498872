"""Draws the gates of one forward pass: pure functions of (seed, counter, branch) and, optionally, the rank.

There is no state, and global random generators are not used: ranks agree without communication, a resumed run
continues, and the draw does not depend on the order of the data. The streams are Python's `random.Random` seeded with a
string, which it hashes (SHA-512): neighboring counters are unrelated, and seeds of any size differ, which 32-bit
generators do not promise. Only `random()` is used, the one method that Python keeps stable.

A gate is drawn as a *count*: the number of the N samples of a batch for which the branch runs. One gate for a whole
mini-batch is the case N = 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Draw = Literal["bernoulli", "equal_cost"]


def draw_counts(
    survival_probs: Sequence[float],
    num_samples: int,
    *,
    seed: int,
    counter: int,
    draw: Draw = "bernoulli",
    costs: Sequence[float] | None = None,
    rank: int | None = None,
) -> list[int]:
    """The number of samples of a batch for which each branch runs: floor or ceil of p * N, with mean exactly p * N.

    With `num_samples=1` this is a Bernoulli gate for the whole mini-batch (Huang et al. 2016).

    Args:
        survival_probs: one survival probability per branch, in (0, 1].
        num_samples: N, the number of separately gated samples.
        seed: the user's seed.
        counter: the number of the draw.
        draw: "bernoulli" rounds each branch independently; "equal_cost" rounds them together, so that the total cost
            stays within one largest branch of its expectation (for equal costs: its floor or ceil).
        costs: for "equal_cost", the cost of one sample of each branch, in any unit; None: equal costs.
        rank: None draws the same on every rank, a number decorrelates it. With "equal_cost" and equal costs, the total
            is the same on every rank in either case.

    Returns:
        One count in 0..N per branch.
    """
    means = [survival_prob * num_samples for survival_prob in survival_probs]
    counts = [math.floor(mean) for mean in means]
    fractions = [mean - count for mean, count in zip(means, counts, strict=True)]
    stream = _stream(seed, counter, "gates", rank)
    if draw == "bernoulli":
        extras = [int(stream.random() < fraction) for fraction in fractions]
    else:
        last = _stream(seed, counter, "last", None).random()
        extras = _round_at_equal_cost(fractions, costs or [1.0] * len(fractions), stream, last)
    return [count + extra for count, extra in zip(counts, extras, strict=True)]


def draw_order(num_branches: int, num_samples: int, *, seed: int, counter: int, rank: int | None = None) -> Tensor:
    """A random order of the samples for each branch; the first `count` of its row have an open gate.

    Args:
        num_branches: number of rows.
        num_samples: N, number of samples in the batch.
        seed: the user's seed.
        counter: the number of the draw.
        rank: None orders the same on every rank, a number decorrelates it.

    Returns:
        (num_branches, N) int64 on the CPU. Each row is a permutation; all are equally likely.
    """
    stream = _stream(seed, counter, "samples", rank)
    generator = torch.Generator().manual_seed(int(stream.random() * 2**32))
    # Double precision: with 24-bit keys, ties would visibly favor the first samples of large batches. Not torch.rand,
    # which `retrofit.quiet` replaces.
    keys = torch.empty(num_branches, num_samples, dtype=torch.float64).uniform_(generator=generator)
    return keys.argsort(dim=1)


def _stream(seed: int, counter: int, purpose: str, rank: int | None) -> random.Random:
    return random.Random(f"{seed}:{counter}:{purpose}" if rank is None else f"{seed}:{counter}:{purpose}:{rank}")


def _round_at_equal_cost(
    fractions: Sequence[float], costs: Sequence[float], stream: random.Random, last: float
) -> list[int]:
    """Round each fraction to 0 or 1 and keep its mean; the total cost changes by at most one largest branch.

    The pivotal method (Deville and Tillé 1998), along the line of constant cost: two undecided branches, in random
    order, exchange probability at constant total cost until one of them is decided. Each exchange preserves the means.
    Only the last undecided branch changes the total, and `last` decides it.
    """
    rounded = [0] * len(fractions)
    undecided = [index for index, fraction in enumerate(fractions) if fraction > 0]
    undecided.sort(key=lambda _: stream.random())
    probs = list(fractions)
    current: int | None = None
    for other in undecided:
        if current is None:
            current = other
            continue
        ratio = costs[current] / costs[other]
        up = min(1 - probs[current], probs[other] / ratio)
        down = min(probs[current], (1 - probs[other]) / ratio)
        step = up if stream.random() * (up + down) < down else -down
        probs[current] += step
        probs[other] -= step * ratio
        # Rounding errors of 1e-17 must not leave a decided branch undecided.
        first, second = (_decided(probs[index]) for index in (current, other))
        if first is not None:
            rounded[current] = first
            current = other if second is None else None
        if second is not None:
            rounded[other] = second
    if current is not None:
        rounded[current] = int(last < probs[current])
    return rounded


def _decided(prob: float) -> int | None:
    if prob < 1e-12:
        return 0
    return 1 if prob > 1 - 1e-12 else None
