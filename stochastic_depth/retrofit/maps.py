"""Attention maps: what attention may give beside its output, and what stands for them where it did not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NotComputedError(AttributeError, RuntimeError):
    """An attention map is used that was not computed."""


class NotComputed:
    """Stands for the attention map of a branch that did not run on all samples.

    Most callers pass it by. Whatever uses it raises.
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
        "An attention map is used of a branch that did not run in this step: stochastic depth dropped it. Use maps in "
        "evaluation, or leave the branches whose maps are needed out by where=."
    )


def is_attention_map(value: Tensor) -> bool:
    """Whether a tensor (..., L, S) is one of probabilities over its last dimension."""
    is_dense = value.layout is torch.strided and not value.is_nested and value.device.type != "meta"
    if not is_dense or value.dim() < 3 or not value.is_floating_point() or value.numel() == 0:
        return False
    value = value.detach()
    sums = value.sum(-1, dtype=torch.float32)
    return bool((value >= 0).all()) and bool((sums - 1).abs().max() < 1e-2)
