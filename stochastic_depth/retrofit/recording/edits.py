"""Changes of single calls in a run of a block's own code, which make it the plain reference with gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """A change of one call in a run, which turns a block's own code into the plain reference with gates.

    Attributes:
        operand: the argument of the call to multiply; None for its result.
        weights: a number, or (N,) weights of the samples, or a function that returns them for a value.
    """

    operand: int | None
    weights: float | Tensor | Callable[[Tensor], float | Tensor]

    def of(self, value: Any) -> Any:
        """A value (N, ...) times the weights."""
        weights = self.weights if isinstance(self.weights, (float, int, Tensor)) else self.weights(value)
        once = _once(value)
        if isinstance(weights, Tensor):
            weights = weights.to(value.device, value.dtype)
            if value.shape[:1] != weights.shape:
                weights = weights.repeat_interleave(value.shape[0] // weights.shape[0])
            product = once * weights.view(-1, *[1] * (value.dim() - 1))
        else:
            # Infinite values times zero are NaN, but a branch that does not run has no such values.
            product = once * weights if weights or once.isfinite().all() else torch.zeros_like(once)
        return product if once is value else product.expand(value.shape)


def _once(value: Tensor) -> Tensor:
    """What is repeated in an expanded tensor: if it stays expanded, a sum lies in memory in the shortcut's order."""
    if value.layout is not torch.strided or value.is_nested or all(value.stride()):
        return value
    return value[tuple(slice(1) if stride == 0 else slice(None) for stride in value.stride())]


Edits = Mapping[int, Sequence[Edit]]
"""Changes of calls, by the number of the call; parallel branches may be two operands of one call."""
