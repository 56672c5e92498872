"""Swaps a module's class in place, so that names, parameters, hooks and `isinstance` stay as they are."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def stochastic_class(mixin: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of class `plain` while it is stochastic: `mixin`'s behaviour over `plain`'s.

    It is made at run time, so pickle could not find it by its name: its instances tell pickle how to make it again.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced = super(stochastic, self).__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_blank, (mixin, plain), *reduced[2:])

    bases = (mixin,) if issubclass(mixin, plain) else (mixin, plain)
    stochastic = type(f"Stochastic{plain.__name__}", bases, {"__reduce_ex__": reduce, "_plain_class": plain})
    stochastic.__module__ = plain.__module__
    return stochastic


def _blank(mixin: type[nn.Module], plain: type[nn.Module]) -> nn.Module:
    stochastic = stochastic_class(mixin, plain)
    return stochastic.__new__(stochastic)


def swap_class_(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Give `module` the behaviour of `mixin`."""
    module.__class__ = stochastic_class(mixin, type(module))


def restore_class_(module: nn.Module) -> None:
    """Give `module` the class back that it had before `swap_class_`."""
    module.__class__ = type(module)._plain_class  # pyright: ignore
