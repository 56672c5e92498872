"""Attention maps, and placeholders for what did not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochastic_depth.torch_private import tree_leaves


class NotComputedError(AttributeError, RuntimeError):
    """A value was used that was not computed."""


class NotComputed:
    """Placeholder for a value that stochastic depth did not compute for all samples.

    Most callers ignore such values. Using one raises.

    Args:
        reason: what it is, and what to do.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise NotComputedError(self.__dict__.get("reason", name))

    @classmethod
    def __torch_function__(cls, _func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """No function of PyTorch takes it."""
        leaves = tree_leaves((args, kwargs))
        raise NotComputedError(next(leaf.reason for leaf in leaves if isinstance(leaf, NotComputed)))


def _used(value: NotComputed, *_: Any) -> Any:
    raise NotComputedError(value.reason)


# Python looks for these on the type.
for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    setattr(NotComputed, f"__{_name}__", _used)
    setattr(NotComputed, f"__r{_name}__", _used)
for _name in ("getitem", "iter", "len", "bool", "float", "int", "neg", "lt", "le", "gt", "ge"):
    setattr(NotComputed, f"__{_name}__", _used)

MAP_REASON = (
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
