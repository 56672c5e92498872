"""Swaps a module's class in place, so that names, parameters, hooks and `isinstance` stay as they are."""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress
from types import FunctionType
from typing import Any, cast

from torch import nn


class Unannounced:
    """A class that does not announce its subclass, because transformers and registries react to subclasses."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


@functools.cache
def stochastic_class(mixins: tuple[type[nn.Module], ...], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a stochastic module whose plain class is `plain`: the mixins, first to last, before the plain class.

    It has the plain class's name, by which FSDP and accelerate find blocks. It is created at run time, so pickle cannot
    find it by that name; its instances tell pickle how to create it again.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced = cast(Any, super(stochastic, self).__reduce_ex__(protocol))  # pyright: ignore
        assert isinstance(reduced, tuple)
        return (_blank, (_recipe(stochastic),), *reduced[2:])

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name == "__class__" and not issubclass(value, stochastic):
            raise RuntimeError(
                f"The class that you give a stochastic {plain.__name__} would remove its gates. Change it before "
                "make_stochastic_, or call restore_(model) first."
            )
        super(stochastic, self).__setattr__(name, value)  # pyright: ignore

    bases = (Unannounced, *mixins, *(() if any(issubclass(mixin, plain) for mixin in mixins) else (plain,)))
    own = {
        "__reduce_ex__": reduce,
        "__setattr__": set_attribute,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "_mixins": mixins,
        "_plain_class": plain,
    }
    forward = next((vars(mixin)["forward"] for mixin in mixins if "forward" in vars(mixin)), None)
    if forward is not None:
        own["forward"] = _with_signature(forward, plain)
    stochastic = type(plain.__name__, bases, own)
    for base in plain.__mro__:
        if "gradient_checkpointing" in vars(base) and "__init_subclass__" in vars(base):
            # Layers of transformers checkpoint in a wrapper around the forward of each subclass, and only if it is the
            # outermost: without it, `gradient_checkpointing_enable` would have no effect.
            vars(base)["__init_subclass__"].__func__(stochastic)
            break
    return stochastic


def _with_signature(function: FunctionType, plain: type[nn.Module]) -> FunctionType:
    """A forward with the signature of the plain one, which models and trainers ask for the arguments that it takes."""
    new = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    new.__doc__, new.__qualname__, new.__module__ = function.__doc__, function.__qualname__, function.__module__
    with suppress(TypeError, ValueError, AttributeError):  # It may have none.
        new.__dict__["__signature__"] = inspect.signature(plain.forward)
    return new


def _recipe(kind: type[nn.Module]) -> Any:
    """The classes that a class consists of, by name."""
    own = vars(kind)
    return (own["_mixins"], _recipe(own["_plain_class"])) if "_mixins" in own else kind


def _made(recipe: Any) -> type[nn.Module]:
    return stochastic_class(recipe[0], _made(recipe[1])) if isinstance(recipe, tuple) else recipe


def _blank(recipe: Any) -> nn.Module:
    kind = _made(recipe)
    return kind.__new__(kind)


def set_class_(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module a class, which a stochastic one refuses to others."""
    object.__setattr__(module, "__class__", kind)


def swap_class_(module: nn.Module, mixin: type[nn.Module], *, joins: bool = False) -> None:
    """Give `module` the behavior of `mixin`.

    Args:
        module: the module.
        mixin: its behavior.
        joins: whether it joins the latest behavior of the module and is removed together with it.
    """
    kind = cast(Any, type(module))
    if joins:
        set_class_(module, stochastic_class((mixin, *kind._mixins), kind._plain_class))
    else:
        set_class_(module, stochastic_class((mixin,), kind))


def restore_class_(module: nn.Module) -> None:
    """Undo the latest `swap_class_` and all that joined it; later classes, such as FSDP2's, stay."""
    set_class_(module, _restored(type(module)))


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
