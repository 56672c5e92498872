"""Places where code may read a value beside its arguments, and what is there."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from stochastic_depth.torch_private import buffer_dict


class Place:
    """A place where code may read a value."""

    __slots__ = ("_get", "name", "owner")

    def __init__(self, get: Callable[[Any, Any], Any], owner: Any, name: str) -> None:
        self._get, self.owner, self.name = get, owner, name

    def __call__(self) -> Any:
        """The current value; None if there is none."""
        return self._get(self.owner, self.name)

    @property
    def description(self) -> str:
        """A description for messages."""
        if self._get is item_of:
            return f"the global variable {self.name}"
        if self._get is content_of:
            return f"the variable {self.name} of a closure"
        if self._get is in_context:
            return f"the context variable {self.name}"
        if not self.is_value:
            return f"an attribute of a {type(self.owner).__name__}"
        kind = self.owner if isinstance(self.owner, type) else type(self.owner)
        return f"{self.name} of {self.owner.__name__ if isinstance(self.owner, ModuleType) else kind.__name__}"

    @property
    def is_value(self) -> bool:
        """Whether it holds a value, and not a list of names."""
        return self._get is not named_in and self._get is not number_in

    @property
    def is_empty(self) -> bool:
        """Whether there is no such variable or attribute."""
        if self._get is item_of:
            return self.name not in self.owner
        if self._get is content_of:
            return self.owner == types.CellType()
        return self._get is attribute_of and not hasattr(self.owner, self.name)

    def put(self, value: Any, *, empty: bool = False) -> None:
        """Set the value, or remove it if `empty`."""
        if not empty:
            _PUT[self._get](self.owner, self.name, value)
        elif self._get is item_of:
            self.owner.pop(self.name, None)
        elif self._get is content_of:
            del self.owner.cell_contents
        else:
            delattr(self.owner, self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and (self._get, id(self.owner), self.name) == (
            other._get,
            id(other.owner),
            other.name,
        )

    def __hash__(self) -> int:
        return hash((id(self.owner), self.name))


def attribute_of(owner: Any, name: str) -> Any:
    """An attribute; None if there is none, or code of the object's class fails to give one."""
    try:
        return getattr(owner, name, None)
    except Exception:  # Any: dictionaries with attributes raise KeyError.
        return None


def own_of(owner: Any, name: str) -> Any:
    """What a class or module holds itself."""
    return vars(owner).get(name)


def item_of(owner: dict[str, Any], name: str) -> Any:
    """A global variable."""
    return owner.get(name)


def content_of(owner: types.CellType, _name: str) -> Any:
    """A variable of a closure."""
    try:
        return owner.cell_contents
    except ValueError:  # It has no value yet.
        return None


def in_context(owner: ContextVar[Any], _name: str) -> Any:
    """A context variable."""
    try:
        return owner.get()
    except LookupError:  # It has no default.
        return None


def named_in(owner: Any, names: Any) -> str:
    """Which of these names an object has attributes of."""
    return ",".join([name for name in vars(owner) if name in names])


def number_in(owner: nn.Module, _name: str) -> int:
    """How many attributes and parameters a module has, and which children: a new one may be read or called."""
    state = vars(owner)
    parameters, buffers, children = (state.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))
    return hash((len(state), len(parameters), len(buffers), *map(type, children.values())))  # TorchScript has none.


def default_of(owner: FunctionType, index: Any) -> Any:
    """A default value of a function, in a tuple."""
    return (owner.__defaults__ or ())[index : index + 1]


def _put_attribute(owner: Any, name: str, value: Any) -> None:
    of_module = buffer_dict(owner) if isinstance(owner, nn.Module) else {}
    if name in of_module:
        of_module[name] = value
    else:
        object.__setattr__(owner, name, value)


_PUT: dict[Callable[[Any, Any], Any], Callable[[Any, Any, Any], None]] = {
    attribute_of: _put_attribute,
    own_of: setattr,
    item_of: dict.__setitem__,
    content_of: lambda owner, _name, value: setattr(owner, "cell_contents", value),
    in_context: lambda owner, _name, value: owner.set(value),
    default_of: lambda owner, index, value: setattr(
        owner, "__defaults__", (*owner.__defaults__[:index], *value, *owner.__defaults__[index + 1 :])
    ),
}
