"""Finds the values that a block's code reads besides its arguments: attributes, globals, closures, classes.

Values are found by name: everything reachable whose name appears in the code of the block's class, or in functions and
methods that this code calls.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import builtins
import dis
import enum
import functools
import inspect
import keyword
import os
import sys
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.forms import NOT_CONFIGURATION, PLAIN, Same, form_of, is_plain, items_of
from stochastic_depth.retrofit.rules import is_drop_path
from stochastic_depth.torch_private import buffer_dict, parameter_dict

_MAX_DEPTH = 4
_MAX_FUNCTIONS = 256
# Methods that code calls on an object without naming them.
_PROTOCOLS = {
    f"__{name}__"
    for name in (
        *(
            "call",
            "getitem",
            "getattr",
            "getattribute",
            "get",
            "len",
            "iter",
            "next",
            "bool",
            "contains",
            "float",
            "int",
        ),
        *("index", "enter", "exit", "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs", "round"),
        *(f"{side}{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow") for side in ("", "r")),
    )
}
# What runs where code makes an object of a class that it names.
_MAKING = {"__init__", "__new__", "__post_init__"}


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
        if self._get is _item:
            return f"the global variable {self.name}"
        if self._get is _content:
            return f"the variable {self.name} of a closure"
        if self._get is _in_context:
            return f"the context variable {self.name}"
        if not self.is_value:
            return f"an attribute of a {type(self.owner).__name__}"
        kind = self.owner if isinstance(self.owner, type) else type(self.owner)
        return f"{self.name} of {self.owner.__name__ if isinstance(self.owner, ModuleType) else kind.__name__}"

    @property
    def is_value(self) -> bool:
        """Whether it holds a value, and not a list of names."""
        return self._get is not _named and self._get is not _number

    @property
    def is_empty(self) -> bool:
        """Whether there is no such variable or attribute."""
        if self._get is _item:
            return self.name not in self.owner
        if self._get is _content:
            return self.owner == types.CellType()
        return self._get is _attribute and not hasattr(self.owner, self.name)

    def put(self, value: Any, *, empty: bool = False) -> None:
        """Set the value, or remove it if `empty`."""
        if not empty:
            _PUT[self._get](self.owner, self.name, value)
        elif self._get is _item:
            self.owner.pop(self.name, None)
        elif self._get is _content:
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


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def _own(owner: Any, name: str) -> Any:
    return vars(owner).get(name)


def _item(owner: dict[str, Any], name: str) -> Any:
    return owner.get(name)


def _content(owner: types.CellType, _name: str) -> Any:
    try:
        return owner.cell_contents
    except ValueError:  # It has no value yet.
        return None


def _in_context(owner: ContextVar[Any], _name: str) -> Any:
    try:
        return owner.get()
    except LookupError:  # It has no default.
        return None


def _named(owner: Any, names: Any) -> str:
    """Which of these names an object has attributes of."""
    return ",".join([name for name in vars(owner) if name in names])


def _number(owner: nn.Module, _name: str) -> int:
    """How many attributes and parameters a module has, and which children: a new one may be read or called."""
    state = vars(owner)
    return hash((len(state), len(state["_parameters"]), len(state["_buffers"]), *map(type, state["_modules"].values())))


def _default(owner: FunctionType, index: Any) -> Any:
    return (owner.__defaults__ or ())[index : index + 1]


def _put_attribute(owner: Any, name: str, value: Any) -> None:
    of_module = buffer_dict(owner) if isinstance(owner, nn.Module) else {}
    if name in of_module:
        of_module[name] = value
    else:
        object.__setattr__(owner, name, value)


_PUT: dict[Callable[[Any, Any], Any], Callable[[Any, Any, Any], None]] = {
    _attribute: _put_attribute,
    _own: setattr,
    _item: dict.__setitem__,
    _content: lambda owner, _name, value: setattr(owner, "cell_contents", value),
    _in_context: lambda owner, _name, value: owner.set(value),
    _default: lambda owner, index, value: setattr(
        owner, "__defaults__", (*owner.__defaults__[:index], *value, *owner.__defaults__[index + 1 :])
    ),
}


class Reads:
    """The values besides a call's arguments that a block's code may read: few, so that each call can check them.

    Attributes:
        names: all names in the code.
        places: their places.
        children: the modules that the block's code calls.
        may_cache: whether any of them is a cached function (`functools.cache`).
    """

    def __init__(self, block: nn.Module, inlined: Collection[str] = (), arguments: Collection[Any] = ()) -> None:
        names, functions = code_of(block, inlined, arguments)
        modules = _with_inlined(block, inlined)
        self.names = names
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
        for name in self._own:
            walk.enter(block.__dict__[name])
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
        self.may_cache = any(hasattr(place(), "cache_info") for place in self.places)
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
        pending: list[nn.Module] = _with_inlined(block, self._inlined) if self._inlined else [block]
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
        empty = tuple(
            [name for name, value in (*state["_parameters"].items(), *state["_buffers"].items()) if value is None]
        )
        parameters = [id(value) for value in state["_parameters"].values()]
        return (
            plain,
            empty,
            len(parameters) - len(set(parameters)),  # number of tied parameters
            len(state),
            tuple([_quick(state.get(name)) for name in self._own]),
            tuple([_quick(place()) for place in self.places]),
            tuple(os.environ.items()) if self._environment else (),
            tuple([flag() for flag in self._flags]),
        )


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
}


def _quick(value: Any) -> Any:
    """`form_of` for values that every call reads: objects count by identity; values read from them are checked."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.device, value.requires_grad
    if isinstance(value, (list, tuple, dict, set, deque)):
        return form_of(value, _MAX_DEPTH)
    if isinstance(value, nn.Module):
        return id(value)
    if type(value).__module__ == "numpy" and getattr(value, "nbytes", _MAX_BYTES) < _MAX_BYTES:
        return form_of(value)
    return Same(value)


_MAX_BYTES = 2**16


class StateOfChildren:
    """What of the children of a block decides what they do, such as their modes: by the names that are there now.

    How they treat samples is proven for this state. A number counts by whether it is 0, 1 or -1: it may be a counter.
    """

    def __init__(self, block: nn.Module) -> None:
        self._parts = [
            (vars(child), name)
            for child in block.modules()
            if child is not block and is_users(plain_class(child)) and not is_drop_path(child)
            for name, value in vars(child).items()
            if is_plain(value) and (name == "training" or name not in NOT_CONFIGURATION)
        ]

    def now(self) -> tuple[Any, ...]:
        """What it is now."""
        return tuple([_kind(attributes.get(name)) for attributes, name in self._parts])


def _kind(value: Any) -> Any:
    return type(value) if isinstance(value, (int, float)) and value not in (0, 1, -1) else (type(value), value)


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
                self.found[Place(_own, part, "forward")] = None
        self.enter(kind)

    def enter_function(self, function: FunctionType) -> None:
        """Visit the values that a function reads: globals, its closure, and mutable defaults."""
        for name in imports_of(function.__code__):
            if name not in function.__globals__ and _is_users_module(sys.modules.get(name)):
                self.enter(sys.modules[name])  # imported inside the function
        for name in globals_of(function.__code__):
            # Also what is not there yet.
            if name in function.__globals__ or not hasattr(builtins, name):
                self._read(Place(_item, function.__globals__, name), function.__globals__.get(name))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._read(Place(_content, cell, name), _content(cell, name))
        for index, value in enumerate(function.__defaults__ or ()):
            if not isinstance(value, PLAIN):
                self._read(Place(_default, function, cast(str, index)), value)
        for name, value in (function.__kwdefaults__ or {}).items():
            if not isinstance(value, PLAIN):
                self._read(Place(_item, function.__kwdefaults__, name), value)

    def _read(self, place: Place, value: Any, depth: int = _MAX_DEPTH) -> None:
        if not isinstance(value, (type, ModuleType, ContextVar)):
            self.found[place] = None
        self.enter(value, depth)

    def enter(self, value: Any, depth: int = _MAX_DEPTH) -> None:
        """Look at what can be reached from a value."""
        is_plain = isinstance(value, (Tensor, *PLAIN)) and not isinstance(value, enum.Enum)
        if depth == 0 or is_plain or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, FunctionType):
            for name in vars(value):
                if name in self._names and name != "__wrapped__":
                    self._read(Place(_attribute, value, name), getattr(value, name, None), depth - 1)
            return
        if isinstance(value, nn.Module):
            is_any = COMPUTED in self._names and is_users(type(value))
            for name in (*value.__dict__, *parameter_dict(value).keys(), *buffer_dict(value).keys()):
                if (is_any or name in self._names) and (name == "training" or name not in NOT_CONFIGURATION):
                    self._read(Place(_attribute, value, name), getattr(value, name, None), depth - 1)
            if is_users(type(value)) or depth == _MAX_DEPTH or isinstance(value, _HOLDING):
                self.found[Place(_number, value, "")] = None
            for child in value.children():
                self.enter(child, depth - 1)
        elif isinstance(value, (type, ModuleType)):
            for part in value.__mro__ if isinstance(value, type) else (value,):
                for name in list(vars(part)) if is_users(part) else ():
                    if name in self._names and not name.startswith("__"):
                        self._read(Place(_own, part, name), vars(part)[name], depth - 1)
        elif isinstance(value, ContextVar):
            self._read(Place(_in_context, value, value.name), _in_context(value, ""), depth - 1)
        elif isinstance(value, weakref.ref):
            self.enter(cast("weakref.ref[Any]", value)(), depth)
        else:
            for part in _contents_of(value):
                self.enter(part, depth - 1)
            if type(value) not in _CONTAINERS:
                self.enter(type(value), depth)
                if is_users(type(value)) and hasattr(value, "__dict__") and not isinstance(value, MethodType):
                    self.found[Place(_named, value, cast(str, self._names))] = None
                for name in _attributes_of(value):
                    if name in self._names:
                        self._read(Place(_attribute, value, name), getattr(value, name, None), depth - 1)


_HOLDING = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CONTAINERS = {list, tuple, set, frozenset, deque, dict, OrderedDict, defaultdict, Counter, torch.Size}


def _contents_of(value: Any) -> list[Any]:
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        part = cast("functools.partial[Any]", value)
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(value, Mapping):
        return [item for _, item in items_of(cast("Mapping[Any, Any]", value))]
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple, set, frozenset, deque)) else []


def _attributes_of(value: Any) -> Iterator[str]:
    yield from getattr(value, "__dict__", {})
    for part in type(value).__mro__:
        slots = part.__dict__.get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def code_of(
    block: nn.Module, inlined: Collection[str] = (), arguments: Collection[Any] = ()
) -> tuple[frozenset[str], tuple[FunctionType, ...]]:
    """All names in the code of a block's class and of what this code calls, holds or is given, and the functions.

    The code of its `inlined` children counts as its own, and so do the methods of other children that it calls by name.
    """
    names: set[str] = set()
    functions: dict[FunctionType, None] = {}
    children = tuple(dict.fromkeys(kind for each in block.modules() if is_users(kind := plain_class(each))))
    given = dict.fromkeys(each for value in arguments for each in _code_in(value))
    given.update((kind, None) for value in arguments if isinstance(value, nn.Module) if is_users(kind := type(value)))
    for module in _with_inlined(block, inlined):
        # A module that is held, but is no child, such as the model: its methods may be called.
        outside = [part for value in module.__dict__.values() for part in (value, *_contents_of(value))]
        given.update((type(part), None) for part in outside if isinstance(part, nn.Module) and is_users(type(part)))
        held = dict.fromkeys(each for value in module.__dict__.values() for each in _code_in(value))
        own = names_in_code(plain_class(module), *held, *given, children=children)
        names |= own[0]
        functions.update(dict.fromkeys(own[1]))
    return frozenset(names), tuple(functions)


def places_of_children(block: nn.Module) -> list[Place]:
    """Where the code of a block's children reads something outside of them."""
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


def _with_inlined(block: nn.Module, inlined: Collection[str]) -> list[nn.Module]:
    return [block, *(block.get_submodule(path) for path in inlined)]


_Code = tuple[frozenset[str], tuple[FunctionType, ...]]
# What was found, with the global variables that were followed and what they were.
_KNOWN: dict[Any, tuple[list[tuple[dict[str, Any], str, Any]], _Code]] = {}
_MAX_KNOWN = 1024


def names_in_code(kind: type[nn.Module], *held: FunctionType | type, children: tuple[type, ...] = ()) -> _Code:
    """All names in the forward of a class, and in the functions and methods that it calls by them.

    Args:
        kind: the class of a module.
        *held: functions that it holds, and classes of objects that it holds.
        children: classes of its children, whose methods, but not forwards, may be called by name.

    Returns:
        The names and the functions.
    """
    key = (kind, held, children)
    followed, code = _KNOWN.get(key, ((), None))
    if code is None or any(space.get(name) is not value for space, name, value in followed):
        if len(_KNOWN) >= _MAX_KNOWN:
            _KNOWN.clear()
        followed = list[tuple[dict[str, Any], str, Any]]()
        code = _names_in_code(kind, held, children, followed)
        _KNOWN[key] = (followed, code)
    return code


def _names_in_code(
    kind: type[nn.Module],
    held: tuple[FunctionType | type, ...],
    children: tuple[type, ...],
    followed: list[tuple[dict[str, Any], str, Any]],
) -> _Code:
    pending: list[FunctionType] = [each for each in held if isinstance(each, FunctionType)]
    kinds = dict.fromkeys(
        [kind, *(each for each in held if isinstance(each, type) and not issubclass(each, nn.Module))]
    )
    given = [each for each in held if isinstance(each, type) and issubclass(each, nn.Module)]
    pending += _methods_of([kind], {"forward"})
    made: dict[type, None] = {}
    functions: dict[FunctionType, None] = {}
    names: set[str] = set()
    while pending and len(functions) < _MAX_FUNCTIONS:
        function = pending.pop()
        if function in functions:
            continue
        functions[function] = None
        own = names_of(function.__code__)
        names |= own
        values = [function.__globals__.get(name) for name in own]
        values += [sys.modules.get(name) for name in imports_of(function.__code__)]
        followed += [(function.__globals__, name, function.__globals__.get(name)) for name in own]
        values += [
            value.__dict__.get(name) for value in values if _is_users_module(value) for name in (*own, "__getattr__")
        ]
        values += [_content(cell, "") for cell in function.__closure__ or ()]
        for code in [each for value in values for each in _code_in(value)]:
            if isinstance(code, FunctionType):
                pending.append(code)
            elif not issubclass(code, nn.Module):
                kinds[code] = None
        made.update((value, None) for value in values if isinstance(value, type) and value in kinds)
        if not pending:
            # `super().forward` names the block's own.
            of_children = names - _PROTOCOLS - ({"forward"} if "super" in names else set[str]())
            found = [
                *_methods_of(kinds, names | _PROTOCOLS),
                *_methods_of(made, _MAKING),
                *_methods_of((*given, *children), of_children),
            ]
            pending += [each for each in found if each not in functions]
    return frozenset(names), tuple(functions)


def _code_in(value: Any, depth: int = 2) -> Iterator[FunctionType | type]:
    """The function that a value is, or the class of a user's object whose methods code may call."""
    wrapped = getattr(value, "__wrapped__", None) if callable(value) else None
    if wrapped is not None and depth > -_MAX_DEPTH:
        yield from _code_in(wrapped, depth - 1)
    if isinstance(value, (FunctionType, type)):
        if is_users(value):
            yield value
    elif isinstance(value, MethodType):
        yield from _code_in(value.__func__, depth - 1)
        if depth > 0:
            yield from _code_in(value.__self__, depth - 1)
    elif isinstance(value, functools.partial):
        yield from _code_in(cast("functools.partial[Any]", value).func, depth - 1)
    elif not isinstance(value, (nn.Module, Tensor, ModuleType, *PLAIN)):
        if is_users(type(value)):
            yield type(value)
        if depth > 0:
            inner = [*_contents_of(value), *getattr(value, "__dict__", {}).values()]
            yield from (each for part in inner for each in _code_in(part, depth - 1))


def _methods_of(kinds: Collection[type], names: Collection[str]) -> list[FunctionType]:
    return [
        function
        for kind in kinds
        for part in (*kind.__mro__, *inspect.getmro(type(kind)))
        if is_users(part) or (issubclass(part, nn.Module) and part is not nn.Module)
        for name, value in vars(part).items()
        if name in names
        for function in _functions_of(value)
    ]


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions behind a method, a property, a decorated method or a descriptor."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    if is_users(type(value)) and hasattr(value, "__get__"):
        yield from (each for each in vars(type(value)).values() if isinstance(each, FunctionType))
    for _ in range(_MAX_DEPTH):
        if isinstance(value, FunctionType):
            yield value
        value = getattr(value, "__wrapped__", None)


def is_users(value: Any) -> bool:
    """Whether a class, function or module does not belong to PyTorch, NumPy or Python itself."""
    name = getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", None) or ""
    top = name.partition(".")[0]
    return top not in ("torch", "numpy", "stochastic_depth") and (
        top == "__main__" or top not in sys.stdlib_module_names
    )


def _is_users_module(value: Any) -> bool:
    return isinstance(value, ModuleType) and is_users(value)


@functools.cache
def names_of(code: CodeType) -> frozenset[str]:
    """All names in the code of a function and of the functions in it, also those that are strings, as for getattr."""
    names = {*code.co_names, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_of(constant)
        else:
            for value in constant if isinstance(constant, (tuple, frozenset)) else (constant,):
                parts = value.split(".") if isinstance(value, str) else ()
                names.update(part for part in parts if part.isidentifier() and not keyword.iskeyword(part))
    if _computes_names(code):
        names.add(COMPUTED)
    return frozenset(names)


COMPUTED = "a name that is computed"
"""Among the names in code that puts together names of attributes as it runs."""
_BY_NAME = {"vars", "attrgetter", "__dict__", "__getattribute__"}


def _computes_names(code: CodeType) -> bool:
    """Whether code asks for attributes whose names it does not spell out."""
    if _BY_NAME & {*code.co_names}:
        return True
    is_spelled, is_asked = False, False
    for each in dis.get_instructions(code):
        if each.argval == "getattr" and each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            is_spelled, is_asked = False, True
        elif is_asked and each.opname == "LOAD_CONST" and isinstance(each.argval, str):
            is_spelled = True
        elif is_asked and each.opname.startswith(("BINARY_OP", "BUILD_STRING", "FORMAT")):
            return True
        elif is_asked and each.opname.startswith("CALL"):
            if not is_spelled:
                return True
            is_asked = False
    return False


@functools.cache
def imports_of(code: CodeType) -> frozenset[str]:
    """The modules that a function and the functions in it import as they run."""
    inner = [imports_of(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    own = {each.argval for each in dis.get_instructions(code) if each.opname == "IMPORT_NAME"}
    return frozenset(own.union(*inner))


@functools.cache
def globals_of(code: CodeType) -> frozenset[str]:
    """The names of the global variables that the code of a function and of the functions in it reads."""
    inner = [globals_of(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    own = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(own.union(*inner))
