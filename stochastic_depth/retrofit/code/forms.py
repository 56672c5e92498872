"""The form of a block's call: everything that may decide which path its code takes. Calls of one form do the same."""

from __future__ import annotations

import enum
import functools
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.retrofit.code.signatures import PLAIN_TYPES
from stochastic_depth.torch_private import MODULE_ATTRIBUTES

PLAIN = (*PLAIN_TYPES, bytes, complex, enum.Enum, torch.memory_format, torch.layout)
_MAX_DEPTH = 6


class Same:
    """Wraps an object that counts by identity in a form, and keeps it alive so that its id is not reused."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value


def form_of(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """The part of a value that may decide the path of code that uses it; hashable.

    For tensors, this is everything except the values; for structures and objects that hold data, their content; other
    objects count by identity.
    """
    kind = type(value)
    if isinstance(value, PLAIN):
        return kind, value or repr(value)  # 0.0 is not -0.0
    if isinstance(value, Tensor):
        form = kind, value.shape, value.dtype, value.device, value.requires_grad
        if value.layout is torch.strided and depth:
            form = (*form, value.is_contiguous() or value.stride())
        return (*form, form_of(vars(value), depth - 1)) if vars(value) and depth else form
    if isinstance(value, (nn.Module, FunctionType, type, ModuleType)) or depth == 0:
        return Same(value)
    if isinstance(value, MethodType):
        return Same(value.__func__), Same(value.__self__)
    if isinstance(value, functools.partial):
        part = cast("functools.partial[Any]", value)
        return kind, form_of(part.func), form_of(part.args, depth - 1), form_of(part.keywords, depth - 1)
    if isinstance(value, (slice, range)):
        return kind, repr(value)
    if isinstance(value, Mapping):
        items = items_of(cast("Mapping[Any, Any]", value))
        own = form_of(vars(value), depth - 1) if hasattr(value, "__dict__") else None
        return kind, tuple([(form_of(key, depth - 1), form_of(item, depth - 1)) for key, item in items]), own
    if isinstance(value, (tuple, list, deque)):
        own = form_of(vars(value), depth - 1) if hasattr(value, "__dict__") else None
        return kind, tuple([form_of(item, depth - 1) for item in cast("list[Any]", value)]), own
    if isinstance(value, (set, frozenset)):
        return kind, frozenset([form_of(item, depth - 1) for item in cast("set[Any]", value)])
    if kind.__module__ == "numpy" and hasattr(value, "tobytes"):
        return kind, str(value.dtype), getattr(value, "shape", ()), value.tobytes()
    attributes = dict(getattr(value, "__dict__", {}))
    for part in kind.__mro__:
        slots = part.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                attributes[name] = getattr(value, name)
    if not attributes or callable(value):
        return Same(value)
    return kind, tuple([(name, form_of(item, depth - 1)) for name, item in attributes.items()])


def items_of(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """What a mapping holds; a subclass of dict may make other values as they are read, and not every time the same."""
    return list(dict.items(mapping) if isinstance(mapping, dict) else mapping.items())


def is_plain(value: Any) -> bool:
    """Whether a value counts by its value: a number, a string, a type, or a tuple of these."""
    return isinstance(value, PLAIN) or (
        isinstance(value, (tuple, torch.Size)) and all(is_plain(item) for item in cast("tuple[Any, ...]", value))
    )


def form_of_leaves(leaves: Sequence[Any], called: Collection[type] = ()) -> tuple[Any, ...]:
    """The parts of a call's tensors and objects that may decide its path, besides their values.

    Args:
        leaves: the tensors and objects.
        called: classes of objects whose methods code calls without reading their content.

    Raises:
        RuntimeError: if one is a nested tensor, which has no sizes.
    """
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in leaves):
        raise RuntimeError(
            "A block with gated branches is given a nested tensor. nn.TransformerEncoder makes one of a padded batch "
            "in evaluation without gradients: set encoder.use_nested_tensor = False, or use layers=."
        )
    return tuple(
        [
            (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad, leaf.is_contiguous() or leaf.stride())
            if type(leaf) is Tensor and not leaf.__dict__
            else (type(leaf), tuple([(n, v) for n, v in vars(leaf).items() if is_plain(v)]))
            if type(leaf) in called
            else form_of(leaf)
            for leaf in leaves
        ]
    )


def form_of_any_size(leaves: Sequence[Any], form: tuple[Any, ...], num_rows: int) -> tuple[Any, ...]:
    """The form of a call's leaves for code that does not ask for sizes.

    What is left of the sizes is which are 0 and 1, as values are broadcast from these, and how many rows an argument
    has for each row of another one.

    Args:
        leaves: the tensors and objects.
        form: from `form_of_leaves`.
        num_rows: up to how many rows their number counts.
    """
    alike: list[Any] = []
    lengths: list[int] = []
    for leaf, exact in zip(leaves, form, strict=True):
        if type(leaf) is Tensor and not leaf.__dict__:
            # As text, which no shape is equal to.
            few = str([size if size < 2 else "many" for size in leaf.shape])
            alike.append((few, *exact[1:-1], leaf.is_contiguous() or tuple(sorted(range(leaf.dim()), key=leaf.stride))))
            lengths += leaf.shape[:1]
        else:
            alike.append(exact)
    rows = [(a // b if b and a % b == 0 else None) for a in lengths for b in lengths]
    return (*alike, tuple(rows), tuple([min(length, num_rows) for length in lengths]))


def identities(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Which of the tensors and objects that a call is given are the same; empty where none are."""
    ids = [id(leaf) for leaf in leaves]
    return () if len(set(ids)) == len(ids) else tuple([ids.index(each) for each in ids])


def settings(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Gradient mode and autocast settings, which code may read."""
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    if device == "meta":
        return torch.is_grad_enabled(), None, torch.is_inference_mode_enabled()
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if enabled else None
    return torch.is_grad_enabled(), dtype, torch.is_inference_mode_enabled()


NOT_CONFIGURATION = {*MODULE_ATTRIBUTES, "_stochastic_depth_branch", "_stochastic_depth"}
