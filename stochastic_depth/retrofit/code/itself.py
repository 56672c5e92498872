"""Code that asks which module it runs on: a stand-in is another one, so it could compute something else there."""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection, Sequence
from types import CodeType, FunctionType

from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.code_names import is_users


def asks_for_itself(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the code of a module, as far as it has these names, compares the module, or looks it or a child up.

    Such as `self is model.layers[-1]`, `SCALES[self]`, `self.key in cache`. A module that compares itself with those
    that are in it meets itself in a stand-in too (`for m in self.modules(): if m is not self`).
    """
    children = frozenset(name for name, _ in module.named_children())
    return any(
        _asks(function.__code__, function.__code__.co_varnames[0], children)
        for kind in plain_class(module).__mro__
        if is_users(kind)
        for name, function in vars(kind).items()
        if isinstance(function, FunctionType) and function.__code__.co_argcount
        if name == "forward" or (name in names and not name.startswith("__"))
    )


@functools.cache
def _asks(code: CodeType, itself: str, children: frozenset[str], *, meets_itself: bool = False) -> bool:
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "PRECALL", "RESUME")]
    meets_itself |= not {"modules", "named_modules"}.isdisjoint(code.co_names)
    comparisons = set[str]() if meets_itself else {"IS_OP", "COMPARE_OP"}
    for index in range(len(instructions)):
        end = _end_of_module(instructions, index, itself, children)
        if end is None:
            continue
        # A child is compared with others that are in the module too.
        counted = comparisons if end == index + 1 else set[str]()
        if _is_key(instructions, index, end, counted) or _is_compared(instructions, end, {*counted, "CONTAINS_OP"}):
            return True
    return any(
        _asks(constant, itself, children, meets_itself=meets_itself)
        for constant in code.co_consts
        if isinstance(constant, CodeType) and itself in constant.co_freevars
    )


def _loaded(instruction: dis.Instruction) -> tuple[str, ...]:
    """The variables that an instruction loads; since Python 3.13, one may load two."""
    if not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return ()
    value = instruction.argval
    return value if isinstance(value, tuple) else (str(value),)


def _end_of_module(
    instructions: Sequence[dis.Instruction], index: int, itself: str, children: frozenset[str]
) -> int | None:
    """Index behind the instructions that load the module, or a child of it, and begin here; None if they do not."""
    if _loaded(instructions[index])[-1:] != (itself,):
        return None
    after = instructions[index + 1 : index + 2]
    if after and after[0].opname == "LOAD_ATTR" and after[0].argval in children:
        return index + 2
    return index + 1


def _is_key(instructions: Sequence[dis.Instruction], start: int, end: int, comparisons: Collection[str]) -> bool:
    """Whether a value is the second operand of a comparison, a key, or what a method of a container looks for."""
    after, before = instructions[end : end + 1], instructions[max(start - 1, 0) : start]
    if after and (after[0].opname in comparisons or _is_subscript(after[0])):
        return not (before and before[0].opname == "LOAD_CONST" and before[0].argval is None)
    is_argument = bool(before) and before[0].opname.startswith(("LOAD_METHOD", "LOAD_ATTR", "LOAD_GLOBAL"))
    return is_argument and before[0].argval in _LOOKING_UP and not _is_attribute(after)


def _is_compared(instructions: Sequence[dis.Instruction], end: int, comparisons: Collection[str]) -> bool:
    """Whether a value is the first operand of a comparison, other than with None."""
    depth = 1
    for index, each in enumerate(instructions[end:], end):
        if depth == 2 and each.opname in comparisons:
            other = instructions[index - 1]
            return not (other.opname == "LOAD_CONST" and other.argval is None)
        if depth == 1 and not (each.opname.startswith("LOAD_") and not _is_attribute([each])):
            return False
        if depth == 2 and each.opname.startswith(_TAKING):
            return False
        depth += dis.stack_effect(each.opcode, each.arg, jump=False)
        if depth < 1:
            return False
    return False


def _is_attribute(after: Sequence[dis.Instruction]) -> bool:
    return bool(after) and after[0].opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))


def _is_subscript(instruction: dis.Instruction) -> bool:
    return instruction.opname == "BINARY_SUBSCR" or (instruction.opname == "BINARY_OP" and instruction.argrepr == "[]")


_TAKING = ("BINARY_", "IS_OP", "COMPARE_OP", "CONTAINS_OP", "CALL", "FORMAT", "BUILD", "STORE", "RETURN")
_LOOKING_UP = {"get", "index", "count", "pop", "setdefault", "__getitem__", "__contains__", "id", "hash"}
