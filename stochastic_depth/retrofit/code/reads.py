"""Finds the values that a block's code reads besides its arguments: attributes, globals, closures, classes.

Values are found by name: everything reachable whose name appears in the code of the block's class, or in functions and
methods that this code calls.
"""

from __future__ import annotations

import builtins
import enum
import functools
import os
import sys
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.code_names import (
    COMPUTED,
    code_of,
    contents_of_value,
    globals_of,
    imports_of,
    is_users,
    is_users_module,
    names_in_code,
    with_inlined,
)
from stochastic_depth.retrofit.code.for_now import remembered
from stochastic_depth.retrofit.code.forms import NOT_CONFIGURATION, PLAIN, Same, form_of, is_plain
from stochastic_depth.retrofit.code.itself import asks_for_itself
from stochastic_depth.retrofit.code.places import (
    Place,
    attribute_of,
    content_of,
    default_of,
    in_context,
    item_of,
    named_in,
    number_in,
    own_of,
)
from stochastic_depth.torch_private import buffer_dict, parameter_dict

_MAX_DEPTH = 8
_MAX_DEPTH_OF_CONTENT = 4
_Cached = type(functools.cache(len))


class Reads:
    """The values besides a call's arguments that a block's code may read: few, so that each call can check them.

    Attributes:
        names: all names in the code.
        places: their places.
        children: the modules that the block's code calls.
        asks_for_itself: whether the code asks which module it runs on.
        may_cache: whether any of them is a cached function (`functools.cache`).
    """

    def __init__(self, block: nn.Module, inlined: Collection[str] = (), arguments: Collection[Any] = ()) -> None:
        names, functions = code_of(block, inlined, arguments)
        modules = with_inlined(block, inlined)
        self.names = names
        self.asks_for_itself = any(asks_for_itself(module, names) for module in modules)
        walk = _Walk(names)
        # A name that code computes at run time may be any name.
        is_any = COMPUTED in names
        self._own = tuple(
            [
                name
                for name, value in block.__dict__.items()
                if (is_any or name in names) and name not in NOT_CONFIGURATION and not is_plain(value)
            ]
        )
        self._gives_tensors = is_any or not names.isdisjoint(_GIVING_TENSORS)
        for name in self._own:
            walk.enter(block.__dict__[name])
        for name, value in (*parameter_dict(block).items(), *buffer_dict(block).items()):
            if name in names:
                walk.enter(value)
        for value in arguments:
            if isinstance(value, nn.Module) or callable(value):
                walk.enter(value)
        for child in block.children():
            walk.enter(child)
        for module in modules:
            walk.enter_class(plain_class(module))
        for function in functions:
            walk.enter_function(function)
        self.places = tuple(walk.found)
        self.may_cache = any(isinstance(place(), _Cached) for place in self.places)
        self._environment = "environ" in names or "getenv" in names
        self._flags = tuple([flag for name, flag in _FLAGS.items() if name in names])
        self._inlined = inlined
        self.children = self.children_now(block)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reads) and (self._own, self.places, self._flags, self._environment) == (
            other._own,
            other.places,
            other._flags,
            other._environment,
        )

    def __hash__(self) -> int:
        return hash(self.places)

    def children_now(self, block: nn.Module) -> tuple[nn.Module | None, ...]:
        """The modules that the block's code calls, and the inlined ones."""
        children: list[nn.Module | None] = []
        pending: list[nn.Module] = with_inlined(block, self._inlined) if self._inlined else [block]
        while pending:
            for child in pending.pop().__dict__["_modules"].values():
                children.append(child)
                if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                    pending.append(child)
        return tuple(children)

    def now(self, block: nn.Module) -> tuple[Any, ...]:
        """The current values."""
        state = block.__dict__
        plain = tuple([(name, type(value), value) for name, value in state.items() if is_plain(value)])
        names, is_any = self.names, self._gives_tensors
        tensors = tuple(
            [
                (name, None if value is None else _quick(value) if is_any or name in names else ())
                for name, value in (*state["_parameters"].items(), *state["_buffers"].items())
            ]
        )
        parameters = [id(value) for value in state["_parameters"].values()]
        return (
            plain,
            tensors,
            len(parameters) - len(set(parameters)),  # number of tied parameters
            len(state),
            tuple([_quick(state.get(name)) for name in self._own]),
            tuple([_quick(place()) for place in self.places]),
            tuple([_quick(tensor) for tensor in (*block.parameters(), *block.buffers())])
            if self._gives_tensors
            else (),
            tuple(os.environ.items()) if self._environment else (),
            tuple([flag() for flag in self._flags]),
        )


# Methods of a module that give its tensors without their names.
_GIVING_TENSORS = {
    *("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "get_parameter", "get_buffer"),
    *("_parameters", "_buffers", "__dict__"),
}


def reads_of(block: nn.Module, inlined: Collection[str] = (), arguments: Collection[Any] = ()) -> Reads:
    """The values that a block's code may read in a call with these arguments."""
    key = "reads", id(block), tuple(inlined), tuple(map(id, arguments))
    return remembered(key, lambda: Reads(block, inlined, arguments), block, *arguments)


# Settings that code may read from PyTorch.
_FLAGS: dict[str, Callable[[], Any]] = {
    "get_default_dtype": torch.get_default_dtype,
    "are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
    "get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "backends": lambda: (
        *(getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.mkldnn.enabled,  # pyright: ignore
    ),
    "get_num_threads": torch.get_num_threads,
    "flash_sdp_enabled": torch.backends.cuda.flash_sdp_enabled,
    "mem_efficient_sdp_enabled": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math_sdp_enabled": torch.backends.cuda.math_sdp_enabled,
}


def _quick(value: Any) -> Any:
    """`form_of` for values that every call reads: objects count by identity; values read from them are checked."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device, value.requires_grad
    if isinstance(value, _HOLDING_VALUES):
        return form_of(value, _MAX_DEPTH_OF_CONTENT)
    if isinstance(value, nn.Module):
        return id(value)
    if type(value).__module__ == "numpy" and getattr(value, "nbytes", _MAX_BYTES) < _MAX_BYTES:
        return form_of(value)
    return Same(value)


_MAX_BYTES = 2**16
_HOLDING_VALUES = (list, tuple, dict, set, deque, MappingProxyType, ChainMap, UserDict, functools.partial)


class _Walk:
    """Finds the places that code with certain names may read."""

    def __init__(self, names: frozenset[str]) -> None:
        self.found: dict[Place, None] = {}
        self._names = names
        self._seen: dict[int, Any] = {}  # which keeps them, so that none has the identity of another

    def enter_class(self, kind: type[nn.Module]) -> None:
        """Visit the attributes that code reads from its own class."""
        for part in kind.__mro__:
            if "forward" in vars(part) and part is not nn.Module:
                self.found[Place(own_of, part, "forward")] = None
        self.enter(kind)

    def enter_function(self, function: FunctionType) -> None:
        """Visit the values that a function reads: globals, its closure, and mutable defaults."""
        for name in imports_of(function.__code__):
            if is_users_module(sys.modules.get(name)):
                self.enter(sys.modules[name])  # imported inside the function
        for name in globals_of(function.__code__):
            # Also what is not there yet.
            if name in function.__globals__ or not hasattr(builtins, name):
                self._read(Place(item_of, function.__globals__, name), function.__globals__.get(name))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._read(Place(content_of, cell, name), content_of(cell, name))
        for index, value in enumerate(function.__defaults__ or ()):
            if not isinstance(value, PLAIN):
                self._read(Place(default_of, function, cast(str, index)), value)
        for name, value in (function.__kwdefaults__ or {}).items():
            if not isinstance(value, PLAIN):
                self._read(Place(item_of, function.__kwdefaults__, name), value)

    def _read(self, place: Place, value: Any, depth: int = _MAX_DEPTH) -> None:
        if not isinstance(value, (type, ModuleType, ContextVar)):
            self.found[place] = None
        self.enter(value, depth)

    def enter(self, value: Any, depth: int = _MAX_DEPTH) -> None:
        """Look at what can be reached from a value."""
        is_plain = isinstance(value, PLAIN) and not isinstance(value, enum.Enum)
        # A logger leads to all others, and to the files that they write.
        is_log = type(value).__module__ == "logging"
        if depth <= 0 or is_plain or is_log or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, (FunctionType, Tensor)):
            for name in vars(value):
                if name in self._names and name != "__wrapped__":
                    self._read(Place(attribute_of, value, name), attribute_of(value, name), depth - 1)
            return
        if isinstance(value, nn.Module):
            is_any = COMPUTED in self._names and is_users(type(value))
            for name in (*value.__dict__, *parameter_dict(value).keys(), *buffer_dict(value).keys()):
                if (is_any or name in self._names) and (name == "training" or name not in NOT_CONFIGURATION):
                    self._read(Place(attribute_of, value, name), attribute_of(value, name), depth - 1)
            if is_users(type(value)) or depth == _MAX_DEPTH or isinstance(value, _HOLDING):
                self.found[Place(number_in, value, "")] = None
            for child in value.children():
                self.enter(child, depth - 2)
        elif isinstance(value, (type, ModuleType)):
            for part in value.__mro__ if isinstance(value, type) else (value,):
                for name in list(vars(part)) if is_users(part) else ():
                    if name in self._names and not name.startswith("__"):
                        self._read(Place(own_of, part, name), vars(part)[name], depth - 1)
        elif isinstance(value, ContextVar):
            self._read(Place(in_context, value, value.name), in_context(value, ""), depth - 1)
        elif isinstance(value, weakref.ref):
            self.enter(cast("weakref.ref[Any]", value)(), depth)
        else:
            for part in contents_of_value(value):
                self.enter(part, depth - 1)
            if type(value) not in _CONTAINERS:
                self.enter(type(value), depth)
                if is_users(type(value)) and hasattr(value, "__dict__") and not isinstance(value, MethodType):
                    self.found[Place(named_in, value, cast(str, self._names))] = None
                for name in _attributes_of(value):
                    if name in self._names:
                        self._read(Place(attribute_of, value, name), attribute_of(value, name), depth - 1)


_HOLDING = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CONTAINERS = {list, tuple, set, frozenset, deque, dict, OrderedDict, defaultdict, Counter, torch.Size}


def _attributes_of(value: Any) -> Iterator[str]:
    yield from attribute_of(value, "__dict__") or ()
    for part in type(value).__mro__:
        slots = part.__dict__.get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def places_of_children(block: nn.Module) -> list[Place]:
    """Where the code of a block's children reads something outside of them."""
    return remembered(("places", id(block)), lambda: _places_of_children(block), block)


def _places_of_children(block: nn.Module) -> list[Place]:
    found: dict[Place, None] = {}
    for child in block.modules():
        if child is not block and is_users(plain_class(child)):
            names, functions = code_of(child)
            walk = _Walk(names)
            walk.enter_class(plain_class(child))
            for function in functions:
                walk.enter_function(function)
            for name in names & vars(child).keys() - NOT_CONFIGURATION:
                walk.enter(child.__dict__[name])
            found.update(walk.found)
    return list(found)


def written_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that forwards may write to, such as a codebook that is a moving average.

    Their code names an operation in place, or `data`.
    """
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if is_users(kind := plain_class(module)):
            names, _ = names_in_code(kind)
            if any(name == "data" or (name.endswith("_") and not name.startswith("_")) for name in names):
                found.update((id(parameter), parameter) for parameter in module.parameters())
    return list(found.values())
