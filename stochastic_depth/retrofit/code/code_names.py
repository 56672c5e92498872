"""The code of a block: which functions it runs, and all names in them."""

from __future__ import annotations

import dis
import functools
import inspect
import keyword
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.for_now import remembered
from stochastic_depth.retrofit.code.forms import PLAIN, items_of
from stochastic_depth.retrofit.code.places import attribute_of, content_of

_MAX_DEPTH = 4
# How far calls are followed: a number that is set far away is noticed as the code is recorded again.
_MAX_CALLS = 6
_MAX_FUNCTIONS = 256
# Methods that code calls on an object without naming them.
_PROTOCOLS = {
    f"__{name}__"
    for name in (
        "call", "getitem", "getattr", "getattribute", "get", "len", "iter", "next", "bool", "contains", "float", "int",
        "index", "enter", "exit", "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs", "round",
        *(side + name for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow") for side in ("", "r")),
    )
}  # fmt: skip
# What runs where code makes an object of a class that it names.
_MAKING = {"__init__", "__new__", "__post_init__"}


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
    for module in with_inlined(block, inlined):
        # A module that is held, but is no child, such as the model: its methods may be called.
        outside = [part for value in module.__dict__.values() for part in (value, *contents_of_value(value))]
        given.update((type(part), None) for part in outside if isinstance(part, nn.Module) and is_users(type(part)))
        held = dict.fromkeys(each for value in module.__dict__.values() for each in _code_held_as(value))
        own = names_in_code(plain_class(module), *held, *given, children=children)
        names |= own[0]
        functions.update(dict.fromkeys(own[1]))
    return frozenset(names), tuple(functions)


def _code_held_as(value: Any) -> tuple[FunctionType | type, ...]:
    """`_code_in` an attribute of a module, such as a config that many modules share."""
    if isinstance(value, (nn.Module, Tensor, *PLAIN)):
        return ()
    return remembered(("code in", id(value)), lambda: tuple(_code_in(value)), value)


def with_inlined(block: nn.Module, inlined: Collection[str]) -> list[nn.Module]:
    """A block and those of its children whose code counts as its own."""
    return [block, *(block.get_submodule(path) for path in inlined)]


def contents_of_value(value: Any) -> list[Any]:
    """What a container, a partial function or a bound method holds."""
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        part = cast("functools.partial[Any]", value)
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(value, Mapping):
        return [item for _, item in items_of(cast("Mapping[Any, Any]", value))]
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple, set, frozenset, deque)) else []


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
    followed = list[tuple[dict[str, Any], str, Any]]()
    key = (kind, held, children)
    if any(isinstance(each, FunctionType) and each.__closure__ for each in held):
        # To know a closure for longer would keep alive what it holds.
        return remembered(key, lambda: _names_in_code(kind, held, children, followed))
    known = _KNOWN.get(key)
    if known is not None and all(space.get(name) is value for space, name, value in known[0]):
        return known[1]
    if len(_KNOWN) >= _MAX_KNOWN:
        _KNOWN.clear()
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
    for _ in range(_MAX_CALLS):
        new = [function for function in dict.fromkeys(pending) if function not in functions]
        new = new[: _MAX_FUNCTIONS - len(functions)]
        if not new:
            break
        functions.update(dict.fromkeys(new))
        pending = []
        for function in new:
            names |= _follow(function, kinds, made, pending, followed)
        # `super().forward` names the block's own.
        is_called = "super" not in names and any(_calls_forward(function.__code__) for function in functions)
        of_children = names - _PROTOCOLS - (set[str]() if is_called else {"forward"})
        pending += _methods_of(kinds, names | _PROTOCOLS)
        pending += _methods_of(made, _MAKING)
        pending += _methods_of((*given, *children), of_children)
    return frozenset(names), tuple(functions)


def _follow(
    function: FunctionType,
    kinds: dict[type, None],
    made: dict[type, None],
    pending: list[FunctionType],
    followed: list[tuple[dict[str, Any], str, Any]],
) -> frozenset[str]:
    """The names in a function; what it may call by them goes to the other arguments."""
    # Sorted, for every process, and so every rank, is to follow the same functions where there are too many.
    names = names_of(function.__code__)
    own = sorted(names)
    values = [function.__globals__.get(name) for name in own]
    values += [sys.modules.get(name) for name in sorted(imports_of(function.__code__))]
    followed += [(function.__globals__, name, function.__globals__.get(name)) for name in own]
    values += [value.__dict__.get(name) for value in values if is_users_module(value) for name in (*own, "__getattr__")]
    values += [content_of(cell, "") for cell in function.__closure__ or ()]
    for code in [each for value in values for each in _code_in(value)]:
        if isinstance(code, FunctionType):
            pending.append(code)
        elif not issubclass(code, nn.Module):
            kinds[code] = None
    made.update((v, None) for v in values if isinstance(v, type) and v in kinds and not issubclass(v, nn.Module))
    return names


def _code_in(value: Any, depth: int = 2) -> Iterator[FunctionType | type]:
    """The function that a value is, or the class of a user's object whose methods code may call."""
    wrapped = attribute_of(value, "__wrapped__") if callable(value) else None
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
            inner = [*contents_of_value(value), *(attribute_of(value, "__dict__") or {}).values()]
            yield from (each for part in inner for each in _code_in(part, depth - 1))


def _methods_of(kinds: Collection[type], names: Collection[str]) -> list[FunctionType]:
    return [
        function
        for kind in kinds
        for part in (*kind.__mro__, *inspect.getmro(type(kind)))
        if is_users(part) or (issubclass(part, nn.Module) and part is not nn.Module)
        for name, value in tuple(vars(part).items())
        if name in names
        for function in _functions_of(value)
    ]


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions behind a method, a property, a decorated method or a descriptor."""
    value = attribute_of(value, "fget") or attribute_of(value, "__func__") or value
    if is_users(type(value)) and hasattr(type(value), "__get__"):
        yield from (each for each in vars(type(value)).values() if isinstance(each, FunctionType))
    for _ in range(_MAX_DEPTH):
        if isinstance(value, FunctionType):
            yield value
        value = attribute_of(value, "__wrapped__")


def is_users(value: Any) -> bool:
    """Whether a class, function or module does not belong to PyTorch, NumPy or Python itself."""
    name = getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", None) or ""
    top = name.partition(".")[0]
    return top not in ("torch", "numpy", "stochastic_depth") and (
        top == "__main__" or top not in sys.stdlib_module_names
    )


def is_users_module(value: Any) -> bool:
    """Whether a value is a Python module of the user."""
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
def _calls_forward(code: CodeType) -> bool:
    """Whether code calls the forward of an object: not that it has a variable of this name, or looks at one."""
    is_method = any(
        each.argval == "forward"
        and (each.opname == "LOAD_METHOD" or (each.opname == "LOAD_ATTR" and (each.arg or 0) & _METHOD_BIT))
        for each in dis.get_instructions(code)
    )
    return is_method or any(_calls_forward(constant) for constant in code.co_consts if isinstance(constant, CodeType))


# Since Python 3.12, a bit of the argument says that an attribute is loaded to be called.
_METHOD_BIT = 1 if sys.version_info >= (3, 12) else 0


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
