"""Swaps a module's class in place, so that names, parameters, hooks and `isinstance` stay as they are."""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import nn


class Unannounced:
    """A class that does not tell the plain class about its subclass: transformers and registries act on it."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


@functools.cache
def stochastic_class(mixins: tuple[type[nn.Module], ...], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of class `plain` while it is stochastic: the mixins' behavior, first to last, over its own.

    It has the plain class's name, by which FSDP and accelerate look blocks up. It is made at run time, so pickle could
    not find it by that name: its instances tell pickle how to make it again.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced = cast(Any, super(stochastic, self).__reduce_ex__(protocol))  # pyright: ignore
        assert isinstance(reduced, tuple)
        return (_blank, (_recipe(stochastic),), *reduced[2:])

    bases = (Unannounced, *mixins, *(() if any(issubclass(mixin, plain) for mixin in mixins) else (plain,)))
    own = {
        "__reduce_ex__": reduce,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "_mixins": mixins,
        "_plain_class": plain,
    }
    stochastic = type(plain.__name__, bases, own)
    for base in plain.__mro__:
        if "gradient_checkpointing" in vars(base) and "__init_subclass__" in vars(base):
            # Layers of transformers checkpoint in a wrapper that each subclass has around its own forward, and only if
            # that is the outermost: without it `gradient_checkpointing_enable` would have no effect.
            vars(base)["__init_subclass__"].__func__(stochastic)
            break
    return stochastic


def _recipe(kind: type[nn.Module]) -> Any:
    """The classes, found by their names, that a class is made of."""
    own = vars(kind)
    return (own["_mixins"], _recipe(own["_plain_class"])) if "_mixins" in own else kind


def _made(recipe: Any) -> type[nn.Module]:
    return stochastic_class(recipe[0], _made(recipe[1])) if isinstance(recipe, tuple) else recipe


def _blank(recipe: Any) -> nn.Module:
    kind = _made(recipe)
    return kind.__new__(kind)


def swap_class_(module: nn.Module, mixin: type[nn.Module], *, joins: bool = False) -> None:
    """Give `module` the behavior of `mixin`.

    Args:
        module: the module.
        mixin: its behavior.
        joins: whether it joins the behavior that the module was given last, and goes with it.
    """
    kind = cast(Any, type(module))
    if joins:
        module.__class__ = stochastic_class((mixin, *kind._mixins), kind._plain_class)
    else:
        module.__class__ = stochastic_class((mixin,), kind)


def restore_class_(module: nn.Module) -> None:
    """Undo the latest `swap_class_` with all that has joined it; what lies on top of it, such as FSDP2's, stays."""
    module.__class__ = _restored(type(module))


@functools.cache
def _restored(kind: type[nn.Module]) -> type[nn.Module]:
    own = dict(vars(kind))
    if "_mixins" in own:
        return own["_plain_class"]
    if not hasattr(kind, "_mixins"):
        return kind
    bases = tuple(_restored(base) if issubclass(base, nn.Module) else base for base in kind.__bases__)
    own = {name: value for name, value in own.items() if name not in ("__dict__", "__weakref__")}
    return cast("type[nn.Module]", type(kind.__name__, bases, own))
