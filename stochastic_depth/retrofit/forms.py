"""The form of a block's call: all that may decide which way its code goes. Calls of one form do the same."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.rules import is_drop_path
from stochastic_depth.retrofit.trace import PLAIN_TYPES

_PLAIN = (*PLAIN_TYPES, bytes, complex, enum.Enum, torch.memory_format, torch.layout)
_MAX_DEPTH = 3


class Reads:
    """The values outside of a call's arguments that a block's code may read: few, so that each call can look at them.

    They are plain attributes of the block, of its children and of objects that it holds (a config), and plain global
    variables, whose names appear in the code of the block's class.
    """

    def __init__(self, block: nn.Module) -> None:
        names, functions = names_in_code(plain_class(block))
        held = {**block.__dict__, **block.__dict__["_modules"]}
        held.pop("_stochastic_depth_branch", None)
        self._nested = [
            (owner, name)
            for root, value in held.items()
            for owner, name in _plain_parts(value, names, _MAX_DEPTH if root in names else 0)
        ]
        self._globals = list(
            {
                (id(function.__globals__), name): (function.__globals__, name)
                for function in functions
                for name in names
                if isinstance(function.__globals__.get(name), _PLAIN) and not name.startswith("__")
            }.values()
        )
        self.children = tuple(block.__dict__["_modules"].values())

    def now(self, block: nn.Module) -> tuple[Any, ...]:
        """What the values are now."""
        state = block.__dict__
        plain = tuple([(name, value) for name, value in state.items() if _is_plain(value)])
        empty = tuple(
            [name for name, value in (*state["_parameters"].items(), *state["_buffers"].items()) if value is None]
        )
        nested = tuple(
            [value if _is_plain(value := getattr(owner, name, None)) else None for owner, name in self._nested]
        )
        return plain, empty, nested, tuple([space.get(name) for space, name in self._globals])


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (
        isinstance(value, (tuple, torch.Size)) and all(_is_plain(item) for item in cast("tuple[Any, ...]", value))
    )


def _plain_parts(value: Any, names: frozenset[str], depth: int) -> Iterator[tuple[Any, str]]:
    """Owner and name of the attributes within an object that code with these names in it may read."""
    if depth == 0 or isinstance(value, (Tensor, type, FunctionType, *_PLAIN)):
        return
    for name, part in getattr(value, "__dict__", {}).items():
        if name in names:
            yield value, name
            if not isinstance(part, nn.Module):
                yield from _plain_parts(part, names, depth - 1)


@functools.cache
def names_in_code(kind: type[nn.Module]) -> tuple[frozenset[str], tuple[FunctionType, ...]]:
    """All names in the code of a class, and its functions."""
    functions = tuple(
        function
        for part in kind.__mro__
        if issubclass(part, nn.Module) and part is not nn.Module
        for value in vars(part).values()
        if isinstance(function := getattr(value, "__wrapped__", getattr(value, "fget", None) or value), FunctionType)
    )
    pending: list[Any] = [function.__code__ for function in functions]
    names: set[str] = set()
    while pending:
        code = pending.pop()
        if isinstance(code, CodeType):
            names.update(code.co_names)
            pending += code.co_consts
    return frozenset(names), functions


def form_of_leaves(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What of the tensors and objects that a call is given may decide its way, besides their values."""
    return tuple(
        [
            (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad, leaf.is_contiguous())
            if type(leaf) is Tensor or type(leaf) is nn.Parameter
            else _form_of(leaf)
            for leaf in leaves
        ]
    )


def _form_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return type(leaf), tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, (nn.Module, FunctionType, type)):
        return id(leaf)
    parts = getattr(leaf, "__dict__", None)
    if parts is None:
        return type(leaf)
    return type(leaf), tuple(
        [
            (name, value if _is_plain(value) else _form_of(value) if isinstance(value, Tensor) else type(value))
            for name, value in cast("dict[str, Any]", parts).items()
        ]
    )


def settings(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Gradient mode and autocast, which code may ask for."""
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    if device == "meta":
        return torch.is_grad_enabled(), None
    enabled = torch.is_autocast_enabled(device)
    return torch.is_grad_enabled(), torch.get_autocast_dtype(device) if enabled else None


def fingerprint(block: nn.Module) -> tuple[Any, ...]:
    """What makes two blocks the same code with the same configuration, whatever their weights are."""
    return tuple(
        (
            path,
            plain_class(module),
            # The rates of drop paths rise from block to block; the gates stand for them.
            () if is_drop_path(module) else _configuration(module),
            tuple((n, None if p is None else (tuple(p.shape), p.dtype, p.requires_grad)) for n, p in _tensors(module)),
        )
        for path, module in block.named_modules()
    )


def _configuration(module: nn.Module) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((n, _identity_of(v)) for n, v in module.__dict__.items() if n not in _NOT_CONFIGURATION))


_NOT_CONFIGURATION = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks",
    "_is_full_backward_hook", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_stochastic_depth_branch", "_stochastic_depth",
    "training", "_compiled_call_impl",
}  # fmt: skip


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]


def _identity_of(value: Any) -> str:
    if _is_plain(value):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(_identity_of, cast('list[Any]', value)))})"
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return f"dict({','.join(f'{_identity_of(key)}:{_identity_of(item)}' for key, item in items)})"
    return f"{type(value).__name__}@{id(value)}"
