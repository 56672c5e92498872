"""Runs of a block that leave no trace on the caller's autograd graph, autocast cache or random states."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from stochastic_depth.attribution import unclaimed_nodes
from stochastic_depth.retrofit.recording.quiet import quiet
from stochastic_depth.torch_private import (
    disable_current_modes,
    outside_transforms,
    top_saved_tensors_hooks,
    version_of,
    without_parametrizations_cached,
    without_torch_function,
)


@contextmanager
def private() -> Generator[None]:
    """Context without lasting effects on random states or on other code's autograd graphs."""
    grad = torch.is_grad_enabled()
    with (
        unclaimed_nodes(),
        outside_transforms(),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        disable_current_modes(),
        _without_saved_tensors_hooks(),
        _without_autocast_cache(),
        without_parametrizations_cached(),
        quiet(),
    ):
        yield


def _without_saved_tensors_hooks() -> AbstractContextManager[None]:
    # Code that uses torch.func allows no hooks at all.
    return nullcontext() if top_saved_tensors_hooks(True) is None else saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    with without_torch_function():  # It is no call of the block's code.
        return tensor.detach(), version_of(tensor)


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if version_of(tensor) != version:
        raise RuntimeError("a value that its backward needs was changed in place")
    return tensor


@contextmanager
def _without_autocast_cache() -> Generator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
