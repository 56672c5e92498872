"""The form of a block's call: all that may decide which way its code goes. Calls of one form do the same."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import enum
import functools
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.rules import is_drop_path
from stochastic_depth.retrofit.trace import PLAIN_TYPES
from stochastic_depth.torch_private import MODULE_ATTRIBUTES, buffer_dict, child_dict, parameter_dict

_PLAIN = (*PLAIN_TYPES, bytes, complex, enum.Enum, torch.memory_format, torch.layout)
_MAX_DEPTH = 3


class _Same:
    """Stands in a form for an object that counts as itself, and keeps it alive, so that no other takes its identity."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


def form_of(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """What of a value decides the way of code that is given it or reads it; hashable.

    Of tensors that is all but the values, of structures and of objects that hold data it is their content, and anything
    else counts as itself.
    """
    kind = type(value)
    if isinstance(value, _PLAIN):
        return kind, value
    if isinstance(value, Tensor):
        return kind, value.shape, value.dtype, value.device, value.requires_grad
    if isinstance(value, (nn.Module, FunctionType, type, ModuleType)) or depth == 0:
        return _Same(value)
    if isinstance(value, MethodType):
        return _Same(value.__func__), _Same(value.__self__)
    if isinstance(value, functools.partial):
        part = cast("functools.partial[Any]", value)
        return kind, form_of(part.func), form_of(part.args, depth - 1), form_of(part.keywords, depth - 1)
    if isinstance(value, (slice, range)):
        return kind, repr(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return kind, tuple([(form_of(key, depth - 1), form_of(item, depth - 1)) for key, item in items])
    if isinstance(value, (tuple, list, deque)):
        return kind, tuple([form_of(item, depth - 1) for item in cast("list[Any]", value)])
    if isinstance(value, (set, frozenset)):
        return kind, frozenset([form_of(item, depth - 1) for item in cast("set[Any]", value)])
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # of numpy
        return kind, str(value.dtype), getattr(value, "shape", ()), value.tobytes()
    attributes = dict(getattr(value, "__dict__", {}))
    for part in kind.__mro__:
        slots = part.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                attributes[name] = getattr(value, name)
    if not attributes or callable(value):
        return _Same(value)
    return kind, tuple([(name, form_of(item, depth - 1)) for name, item in attributes.items()])


class Reads:
    """The values outside of a call's arguments that a block's code may read: few, so that each call can look at them.

    They are what has a name that appears in the code of the block's class, or of functions that it calls: attributes of
    the block and of its class, of its children and of objects that it holds (a config), and global variables.
    """

    def __init__(self, block: nn.Module, inlined: Collection[str] = ()) -> None:
        kinds = [plain_class(module) for module in _with_inlined(block, inlined)]
        names, functions = code_of(block, inlined)
        self._own = [
            name
            for name, value in block.__dict__.items()
            if name in names and name not in _NOT_CONFIGURATION and not _is_plain(value)
        ]
        held = {name: block.__dict__[name] for name in self._own}
        children = {name: child for name, child in child_dict(block).items() if child is not None}
        self._nested = [
            pair for value in (*held.values(), *children.values()) for pair in _parts_that_are_read(value, names)
        ]
        self._class = [
            (part, name)
            for kind in kinds
            for part in kind.__mro__
            if issubclass(part, nn.Module) and part is not nn.Module
            for name in vars(part)
            if name == "forward" or (name in names and not name.startswith("__"))
        ]
        found: dict[Any, tuple[Any, str]] = {}
        for function in functions:
            for name in names:
                value = function.__globals__.get(name)
                if value is None or name.startswith("__") or isinstance(value, (ModuleType, type)):
                    continue
                found[id(function.__globals__), name] = function.__globals__, name
        self._globals = list(found.values())
        self._of_globals = [
            pair
            for space, name in self._globals
            if not isinstance(space[name], (*_PLAIN, FunctionType, Tensor)) and not callable(space[name])
            for pair in _parts_that_are_read(space[name], names)
        ]
        self._environment = "environ" in names or "getenv" in names
        self._inlined = inlined
        self.children = self.children_now(block)

    def children_now(self, block: nn.Module) -> tuple[nn.Module | None, ...]:
        """The modules whose calls the block's code makes, and the inlined ones."""
        own = child_dict(block).values()
        if not self._inlined:
            return tuple(own)
        return tuple([child for part in _with_inlined(block, self._inlined) for child in child_dict(part).values()])

    def now(self, block: nn.Module) -> tuple[Any, ...]:
        """What the values are now."""
        state = block.__dict__
        plain = tuple([(name, value) for name, value in state.items() if _is_plain(value)])
        empty = tuple([name for name, value in _tensors(block) if value is None])
        parameters = [id(value) for value in parameter_dict(block).values()]
        return (
            plain,
            empty,
            len(parameters) - len(set(parameters)),  # how many are tied
            tuple([_quick(state.get(name)) for name in self._own]),
            tuple([_quick(getattr(owner, name, None)) for owner, name in self._nested]),
            tuple([_quick(vars(owner).get(name)) for owner, name in self._class]),
            tuple([_quick(space.get(name)) for space, name in self._globals]),
            tuple([_quick(getattr(owner, name, None)) for owner, name in self._of_globals]),
            tuple(os.environ.items()) if self._environment else (),
        )


def _quick(value: Any) -> Any:
    """`form_of` for what is read with every call: objects count as themselves, what is read of them is looked at."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple, dict, set)):
        return form_of(value, 2)
    return id(value) if isinstance(value, (Tensor, nn.Module)) else _Same(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (
        isinstance(value, (tuple, torch.Size)) and all(_is_plain(item) for item in cast("tuple[Any, ...]", value))
    )


def _parts_that_are_read(value: Any, names: frozenset[str], depth: int = _MAX_DEPTH) -> Iterator[tuple[Any, str]]:
    """Owner and name of the attributes within an object that code with these names in it may read."""
    if depth == 0 or isinstance(value, (Tensor, type, FunctionType, MethodType, ModuleType, *_PLAIN)):
        return
    if isinstance(value, nn.Module):
        for name, part in value.__dict__.items():
            if name in names and name not in _NOT_CONFIGURATION | {"training"} and not isinstance(part, nn.Module):
                yield value, name
        if "training" in names:
            yield value, "training"
        for child in value.children():
            yield from _parts_that_are_read(child, names, depth - 1)
        return
    if isinstance(value, (list, tuple, dict)):
        items = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else cast("list[Any]", value)
        for item in items:
            yield from _parts_that_are_read(item, names, depth - 1)
        return
    for name, part in getattr(value, "__dict__", {}).items():
        if name in names:
            yield value, name
            yield from _parts_that_are_read(part, names, depth - 1)


def code_of(block: nn.Module, inlined: Collection[str] = ()) -> tuple[frozenset[str], tuple[FunctionType, ...]]:
    """All names in the code of a block's class and of the plain functions that it calls or holds, and the functions.

    The code of its `inlined` children counts as its own.
    """
    names: set[str] = set()
    functions: dict[FunctionType, None] = {}
    for module in _with_inlined(block, inlined):
        held = (value for value in module.__dict__.values() if isinstance(value, FunctionType))
        own = names_in_code(plain_class(module), *(each for each in held if not each.__module__.startswith("torch")))
        names |= own[0]
        functions.update(dict.fromkeys(own[1]))
    return frozenset(names), tuple(functions)


def _with_inlined(block: nn.Module, inlined: Collection[str]) -> list[nn.Module]:
    return [block, *(block.get_submodule(path) for path in inlined)]


@functools.cache
def names_in_code(kind: type[nn.Module], *held: FunctionType) -> tuple[frozenset[str], tuple[FunctionType, ...]]:
    """All names in the code of a class and of the plain functions that it calls by them, and these functions."""
    pending = [*held, *_functions_of(kind)]
    functions: dict[FunctionType, None] = {}
    names: set[str] = set()
    while pending and len(functions) < _MAX_FUNCTIONS:
        function = pending.pop()
        if function in functions:
            continue
        functions[function] = None
        own = _names_of(function.__code__)
        names |= own
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        for value in (*(function.__globals__.get(name) for name in own), *cells):
            called = getattr(value, "__wrapped__", value)
            if isinstance(called, FunctionType) and not (called.__module__ or "").startswith("torch"):
                pending.append(called)
    return frozenset(names), tuple(functions)


_MAX_FUNCTIONS = 256


def _functions_of(kind: type[nn.Module]) -> list[FunctionType]:
    return [
        function
        for part in kind.__mro__
        if issubclass(part, nn.Module) and part is not nn.Module
        for value in vars(part).values()
        if isinstance(function := getattr(value, "__wrapped__", getattr(value, "fget", None) or value), FunctionType)
    ]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _names_of(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_of(constant)
    return names


def form_of_leaves(leaves: Sequence[Any], called: Collection[type] = ()) -> tuple[Any, ...]:
    """What of the tensors and objects that a call is given may decide its way, besides their values.

    Args:
        leaves: the tensors and objects.
        called: classes of objects that code calls, and does not look into.
    """
    return tuple(
        [
            (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad, leaf.is_contiguous() or leaf.stride())
            if type(leaf) is Tensor or type(leaf) is nn.Parameter
            else (type(leaf), tuple([(n, v) for n, v in vars(leaf).items() if _is_plain(v)]))
            if type(leaf) in called
            else form_of(leaf)
            for leaf in leaves
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
    left_out = _NOT_CONFIGURATION | _POSITIONS
    return tuple(sorted((n, _identity_of(v)) for n, v in module.__dict__.items() if n not in left_out))


# The number of a layer in its model, as caches want it, makes no other kind of layer.
_POSITIONS = {"layer_idx", "layer_id", "layer_index", "layer_number"}


_NOT_CONFIGURATION = {*MODULE_ATTRIBUTES, "_stochastic_depth_branch", "_stochastic_depth"}


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*parameter_dict(module).items(), *buffer_dict(module).items()]


def _identity_of(value: Any) -> str:
    if _is_plain(value):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(_identity_of, cast('list[Any]', value)))})"
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return f"dict({','.join(f'{_identity_of(key)}:{_identity_of(item)}' for key, item in items)})"
    return f"{type(value).__name__}@{id(value)}"
