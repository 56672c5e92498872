"""Symbols that a block's code sees instead of tensors and sizes while it is traced."""

from __future__ import annotations

import builtins
import functools
import operator
import os
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode

from stochastic_depth.retrofit.errors import GivenCodeError, TraceError
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.recording.values import is_code

Decide = Callable[[fx.Node], Any]
"""Returns the value of a node that the control flow depends on."""


def context() -> tuple[Any, ...]:
    """The settings that a part of a forward may change: autocast and gradients."""
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()


class _Symbol(fx.Proxy):
    """Stands for a tensor, or for a number computed from sizes, and behaves like one.

    `x += y` is recorded as an in-place change; `fx.Proxy` would record `x = x + y`.
    """

    _is_param = False

    def __getattr__(self, name: str) -> Any:
        if self.tracer.guess_sizes and name in _GUESSES and (name in ("ndim", "device") or not _takes_symbols()):  # pyright: ignore
            return _GUESSES[name]
        return super().__getattr__(name)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Only for Python code. PyTorch's C++ would treat the symbol as a tensor in memory.
        code = sys._getframe(1).f_code  # pyright: ignore[reportPrivateUsage]
        if code.co_filename.startswith(_TORCH) and code.co_filename not in _ASKING:
            return _Symbol
        if not _ASKS & {*code.co_names}:
            return _Symbol
        return int if is_size(self.node) and _is_plain_number(self.node) else Tensor

    def __int__(self) -> int:
        return int(self.tracer._value(self, int))  # pyright: ignore

    def __index__(self) -> int:
        return int(self)

    def __float__(self) -> float:
        return float(int(self))

    def __len__(self) -> int:
        # With this error, `(*shape, 1)` continues without a length hint; the error of `fx.Proxy` would end it.
        raise TypeError("the forward calls len()")

    def __hash__(self) -> int:
        return id(self)


# Guesses for all sizes if code needs numbers, only to find its path; and for types and devices if PyTorch accepts no
# symbols for them.
_GUESS = 4
_GUESSES = {"ndim": _GUESS, "dtype": torch.float32, "device": torch.device("cpu")}


@functools.cache
def _takes_symbols() -> bool:
    """Whether PyTorch's functions accept symbols for sizes, types and devices; up to 2.8 they do not."""
    x = GraphAppendingTracer(fx.Graph()).create_proxy("placeholder", "x", (), {})
    try:
        torch.empty([x.shape[0]], dtype=x.dtype, device=x.device)  # pyright: ignore
    except TypeError:
        return False
    return True


class SymbolsForNoise(TorchFunctionMode):
    """Context in which a functional drop path's noise is a symbol even if guessed sizes made it a tensor."""

    def __init__(self, tracer: BlockTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.full, torch.rand) and self._tracer.guess_sizes:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


def _made_tensor() -> None:
    """Stands for a tensor that code made from guessed sizes."""


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], slice)


_TORCH = os.path.dirname(torch.__file__) + os.sep
_ASKING = {torch.is_tensor.__code__.co_filename}
_ASKS = {"isinstance", "is_tensor", "Tensor", "type"}


def _is_plain_number(node: fx.Node) -> bool:
    if node.target == "size":
        return len(node.args) > 1 or bool(node.kwargs)  # Without an argument it gives all sizes.
    return not (node.target is getattr and node.args[1] in ("shape", "dtype", "device"))


def _record_in_place(method: str) -> None:
    def changed(symbol: _Symbol, other: Any) -> Any:
        if is_size(symbol.node):
            return NotImplemented  # A number is not changed in place: Python continues with `x = x + y`.
        return symbol.tracer.create_proxy("call_function", getattr(operator, method), (symbol, other), {})

    setattr(_Symbol, f"__{method}__", changed)


for _method in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    _record_in_place(_method)


class BlockTracer(GraphAppendingTracer):
    """Appends to a graph. Unlike `fx.Tracer`, it does not patch anything that other threads use."""

    def __init__(self, conditions: list[tuple[fx.Node, Any]], decide: Decide, *, guess_sizes: bool) -> None:
        super().__init__(fx.Graph())
        self.guess_sizes = guess_sizes
        self._conditions = conditions
        self._decide = decide
        self.expected_state: tuple[Any, ...] = ()
        self.inside: tuple[str, ...] = ()
        self.stand_ins: dict[nn.Module, nn.Module] = {}
        self.buffers: dict[int, str] = {}
        self._attributes: dict[int, fx.Proxy] = {}

    def attribute(self, path: str, tensor: Tensor) -> fx.Proxy:
        """The symbol of a parameter or buffer; one that has several names has one symbol."""
        if id(tensor) not in self._attributes:
            self._attributes[id(tensor)] = self.create_proxy("get_attr", path, (), {})
        return self._attributes[id(tensor)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The symbol of a node; a number if sizes are guessed."""
        if self.guess_sizes and is_size(node) and _is_plain_number(node) and not _is_part(node):
            return cast(fx.Proxy, _GUESS)
        return _Symbol(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, which records the inlined children that it was created in."""
        if kind == "call_module" and context() != self.expected_state:
            raise TraceError(f"{args[0]} runs under its own gradient or autocast settings")
        node = super().create_node(kind, *args, **kwargs)
        if self.inside:
            node.meta["inlined"] = self.inside
        return node

    def create_arg(self, a: Any) -> Any:
        """The argument in the graph."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) not in self.buffers and self.guess_sizes:
                return self.create_node("call_function", _made_tensor, (), {})
            if id(a) not in self.buffers:
                raise TraceError("the forward creates or holds a tensor that is neither a parameter nor a buffer")
            return self.create_node("get_attr", self.buffers[id(a)], (), {})
        if is_code(a):
            raise GivenCodeError(a)
        if isinstance(a, FunctionType):
            return a
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The path that the code takes, recorded as a condition."""
        return bool(self._value(obj, bool))

    def iter(self, obj: fx.Proxy) -> Any:
        """The items that the code unpacks; their number is recorded as a condition."""
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:  # pyright: ignore
            num = _num_chunks(obj.node)
            num = self._value(obj, len) if num is None else num
            return builtins.iter([obj[index] for index in range(num)])  # pyright: ignore

    def _value(self, obj: fx.Proxy, of: Callable[[Any], Any]) -> Any:
        node = self.create_node("call_function", of, (obj.node,), {})
        value = self._decide(node)
        self._conditions.append((node, value))
        return value


def _num_chunks(node: fx.Node) -> int | None:
    """The number of items that code takes from `chunk`, as a call of the block will show; None for other values."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name not in ("chunk", "unsafe_chunk"):
        return None
    num = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
    return num if type(num) is int else None
