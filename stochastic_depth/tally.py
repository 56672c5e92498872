"""Counts how often the gates of a model were open in this process, and reports scalars for loggers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """How often gates were open.

    Attributes:
        num_draws: number of draws, one per forward of the model in training mode.
        open: for each branch, the sum over all draws of the share of the samples for which its gate was open.
    """

    num_draws: int
    open: tuple[float, ...]

    @property
    def frequencies(self) -> list[float] | None:
        """For each branch, the mean share of the samples for which its gate was open; None without a draw."""
        return [each / self.num_draws for each in self.open] if self.num_draws else None


class Tally:
    """Counts the draws of a model, from any thread.

    Args:
        num_branches: number of gates in a draw.
    """

    def __init__(self, num_branches: int) -> None:
        self._lock = threading.Lock()
        self._count = self._reported = Count(0, (0.0,) * num_branches)

    def add(self, gates: Sequence[float]) -> None:
        """Count a draw.

        Args:
            gates: for each branch the share of the samples for which its gate is open.
        """
        with self._lock:
            opened = tuple([total + gate for total, gate in zip(self._count.open, gates, strict=True)])
            self._count = Count(self._count.num_draws + 1, opened)

    @property
    def count(self) -> Count:
        """The count so far."""
        return self._count

    def since_last_call(self) -> Count:
        """The count since the last call."""
        with self._lock:
            before, now = self._reported, self._count
            self._reported = now
        opened = tuple(total - then for total, then in zip(now.open, before.open, strict=True))
        return Count(now.num_draws - before.num_draws, opened)


def metrics(
    count: Count, names: Sequence[str], expected_depth: float, cost_share: Callable[[Sequence[float]], float] | None
) -> dict[str, float]:
    """See `Controller.metrics`.

    Args:
        count: how often the gates were open.
        names: names of the branches.
        expected_depth: expected number of branches that run in a training step.
        cost_share: maps frequencies to the share of the training FLOPs; None if the cost was not counted.
    """
    found = {"expected_depth": expected_depth}
    frequencies = count.frequencies
    if frequencies is not None:
        found["realized_depth"] = math.fsum(frequencies)
        if cost_share is not None:
            found["cost_share"] = cost_share(frequencies)
        for name, frequency in zip(names, frequencies, strict=True):
            found["frequency/" + name.replace("#", "/").replace("()", "/function")] = frequency
    return {f"stochastic_depth/{name}": value for name, value in found.items()}
