"""Copies of modules for dry runs: without hooks and stochastic depth, and without data if shapes are enough."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stochastic_depth.torch_private import buffer_dict, hooks_of, keys_of_fsdp, parameter_dict, tree_leaves

Module = TypeVar("Module", bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks for its forward or backward."""
    return any(hooks_of(module))


def way_around(module: nn.Module) -> str:
    """What a call of a module runs besides its class's forward, and what calling that forward would miss.

    Returns:
        A description, empty if there is nothing. The library's own hooks do not count.
    """
    hooks = [hook for hooks in hooks_of(module) for hook in hooks.values()]
    if any(not (getattr(hook, "__module__", None) or "").startswith("stochastic_depth.") for hook in hooks):
        return "hooks"
    return "a forward of its own" if "forward" in module.__dict__ else ""


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without stochastic depth."""
    return getattr(type(module), "_plain_class", type(module))


def evaluating_(module: Module) -> Module:
    """Put a module and all its submodules into evaluation mode, and return it.

    The flags are set directly. A class's own `train` may return nothing, set only some of the flags, or do more, such
    as merging adapters into weights, which setting the flags back would not undo.
    """
    for part in module.modules():
        part.training = False
    return module


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without stochastic depth and without FSDP2's class."""
    kind = plain_class(module)
    if "torch.distributed.fsdp" in sys.modules:  # who has sharded something has imported it
        from torch.distributed.fsdp import FSDPModule

        while issubclass(kind, FSDPModule):
            kind = getattr(kind.__mro__[2], "_plain_class", kind.__mro__[2])
    return kind


def without_data(module: nn.Module) -> nn.Module:
    """A copy on the meta device, which computes shapes only."""
    return plain_copy(module, tensor_without_data, tensor_without_data)


def plain_copy(
    module: nn.Module, parameter_of: Callable[[Tensor], Tensor], buffer_of: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy with these parameters, which need no gradients, and buffers instead of the module's own."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for parameter in parameter_dict(part).values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter_of(parameter), False)
        for buffer in buffer_dict(part).values():
            if buffer is not None:
                memo[id(buffer)] = buffer_of(buffer)
        for value in tree_leaves(part.__dict__):
            if isinstance(value, Tensor) and not value.is_leaf:  # which refuses to be copied: a stored attention map
                memo[id(value)] = buffer_of(value.detach())
        for hooks in hooks_of(part):
            memo[id(hooks)] = OrderedDict[Any, Any]()
        own = part.__dict__.get("_stochastic_depth_branch")
        if own is not None:
            memo[id(own)] = None
    with _copyable(module, memo):
        made = copy.deepcopy(module, memo)
    for part in made.modules():
        object.__setattr__(part, "__class__", plain_class(part))  # which a stochastic class refuses to others
    return made


@contextmanager
def _copyable(module: nn.Module, memo: dict[int, Any]) -> Generator[None]:
    """Context in which submodules sharded by FSDP2 have their original classes, and FSDP2's state is not copied.

    A branch that is closed from the first step on runs for its shapes when it is already sharded.
    """
    sharded: list[tuple[nn.Module, type[nn.Module]]] = []
    if "torch.distributed.fsdp" in sys.modules:  # who has sharded something has imported it
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            for key in keys_of_fsdp():
                memo[id(part.__dict__.get(key))] = None
            if isinstance(part, FSDPModule):
                sharded.append((part, type(part)))
                part.__class__ = type(part).__mro__[2]  # FSDP's, FSDPModule, its own
    try:
        yield
    finally:
        for part, kind in sharded:
            part.__class__ = kind


def tensor_without_data(value: Any, num_samples: int | None = None) -> Any:
    """A tensor on the meta device of the same shape, or with `num_samples` samples; other values stay as they are."""
    if not isinstance(value, Tensor):
        return value
    shape = value.shape if num_samples is None else (num_samples, *value.shape[1:])
    return torch.empty(shape, dtype=value.dtype, device="meta")
