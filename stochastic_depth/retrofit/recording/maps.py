"""Attention maps, and their placeholders if the attention did not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NotComputedError(AttributeError, RuntimeError):
    """An attention map was used that was not computed."""


class NotComputed:
    """Placeholder for the attention map of a branch that did not run on all samples.

    Most callers ignore it. Using it raises.
    """

    def __getattr__(self, name: str) -> Any:
        raise _error()

    def __getitem__(self, index: Any) -> Any:
        raise _error()

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> Any:
        """No function of PyTorch takes it."""
        raise _error()


def _error() -> NotComputedError:
    return NotComputedError(
        "This attention map was not computed, because stochastic depth dropped its branch in this step. Use maps in "
        "evaluation, or exclude the branches whose maps you need with where=."
    )


def is_attention_map(value: Tensor) -> bool:
    """Whether a tensor (..., L, S) is one of probabilities over its last dimension."""
    is_dense = value.layout is torch.strided and not value.is_nested and value.device.type != "meta"
    if not is_dense or value.dim() < 3 or not value.is_floating_point() or value.numel() == 0:
        return False
    value = value.detach()
    sums = value.sum(-1, dtype=torch.float32)
    return bool((value >= 0).all()) and bool((sums - 1).abs().max() < 1e-2)
