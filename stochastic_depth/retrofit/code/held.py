"""Tensors that code uses besides its arguments, and how to reach them in each call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from stochastic_depth.retrofit.code.effects import parts_of
from stochastic_depth.retrofit.code.places import Place
from stochastic_depth.retrofit.code.user_data import CONSTANTS
from stochastic_depth.torch_private import TENSORS_AND_CHILDREN, buffer_dict, parameter_dict

Step = tuple[str, Any]
"""A step to a part of a structure: ("item", key) or ("attribute", name)."""


class Outside:
    """Returns a tensor that code reads outside its block: the current value of a place, or a part of it."""

    def __init__(self, place: Place, inner: tuple[Step, ...]) -> None:
        self._place, self._inner = place, inner
        self.__name__ = "outside"

    def __call__(self) -> Tensor:
        """The tensor."""
        value = self._place()
        for kind, key in self._inner:
            value = value[key] if kind == "item" else getattr(value, key)
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outside) and (self._place, self._inner) == (other._place, other._inner)

    def __hash__(self) -> int:
        return hash((self._place, self._inner))

    def __repr__(self) -> str:
        return f"outside({self._place.name}{self._inner})"


class Cached:
    """Returns a tensor from a cached function (`functools.cache`), which is the same for the same arguments."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.__name__ = "cached"

    def __call__(self) -> Tensor:
        """The tensor."""
        return self._tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cached) and other._tensor is self._tensor

    def __hash__(self) -> int:
        return id(self._tensor)


def name_of(path: tuple[Any, ...]) -> str:
    """A path in dotted form, for messages and graphs."""
    return ".".join(str(part[1] if isinstance(part, tuple) else part) for part in path)


def held_tensors(block: nn.Module) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors of a block, its children and structures that they hold, each with its path."""
    for path, module in block.named_modules():
        prefix = tuple(path.split(".")) if path else ()
        for name, value in (*parameter_dict(module).items(), *buffer_dict(module).items()):
            if value is not None:
                yield (*prefix, name), value
        for name, value in module.__dict__.items():
            if name not in TENSORS_AND_CHILDREN:
                for inner, tensor in tensors_in(value, 3):
                    yield (*prefix, name, *inner), tensor


def tensors_in(value: Any, depth: int) -> Iterator[tuple[tuple[Step, ...], Tensor]]:
    """The tensors in a structure, an object or a module that is not a child, with the steps to each."""
    if isinstance(value, Tensor):
        yield (), value
    elif depth and not isinstance(value, CONSTANTS):
        for step, part in _tensors_of_module(value) if isinstance(value, nn.Module) else parts_of(value):
            if isinstance(step[1], (str, int, tuple)):
                for inner, tensor in tensors_in(part, depth - 1):
                    yield (step, *inner), tensor


def _tensors_of_module(module: nn.Module) -> Iterator[tuple[Step, Tensor]]:
    """The tensors of a module that is not a child; the block does not train its parameters."""
    for name, value in (*buffer_dict(module).items(), *module.__dict__.items()):
        if isinstance(value, Tensor):
            yield ("attribute", name), value
