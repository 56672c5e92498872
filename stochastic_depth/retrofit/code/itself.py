"""Code that asks which module it runs on: a stand-in is another one, so it could compute something else there."""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

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


class _Step(NamedTuple):
    """An instruction: its name, its argument, the sign of an operator, and its effect on the stack."""

    name: str
    value: Any
    operator: str
    effect: int


def _steps(code: CodeType) -> list[_Step]:
    steps: list[_Step] = []
    for each in dis.get_instructions(code):
        if each.opname in ("CACHE", "PRECALL", "RESUME"):
            continue
        if each.opname.startswith("LOAD_FAST") and isinstance(each.argval, tuple):  # since Python 3.13, two at once
            steps += [_Step("LOAD_FAST", name, "", 1) for name in each.argval]
            continue
        effect = dis.stack_effect(each.opcode, each.arg, jump=False)
        steps.append(_Step(each.opname, each.argval, each.argrepr, effect))
    return steps


@functools.cache
def _asks(code: CodeType, itself: str, children: frozenset[str], *, meets_itself: bool = False) -> bool:
    steps = _steps(code)
    meets_itself |= not {"modules", "named_modules"}.isdisjoint(code.co_names)
    comparisons = set[str]() if meets_itself else {"IS_OP", "COMPARE_OP"}
    for index in range(len(steps)):
        end = _end_of_module(steps, index, itself, children)
        if end is None:
            continue
        # A child is compared with others that are in the module too.
        counted = comparisons if end == index + 1 else set[str]()
        if _is_key(steps, index, end, counted) or _is_compared(steps, end, {*counted, "CONTAINS_OP"}):
            return True
    return any(
        _asks(constant, itself, children, meets_itself=meets_itself)
        for constant in code.co_consts
        if isinstance(constant, CodeType) and itself in constant.co_freevars
    )


def _end_of_module(steps: Sequence[_Step], index: int, itself: str, children: frozenset[str]) -> int | None:
    """Index behind the steps that load the module, or a child of it, and begin here; None if they do not."""
    if not steps[index].name.startswith(("LOAD_FAST", "LOAD_DEREF")) or steps[index].value != itself:
        return None
    is_child = any(after.name == "LOAD_ATTR" and after.value in children for after in steps[index + 1 : index + 2])
    return index + 1 + is_child


def _is_key(steps: Sequence[_Step], start: int, end: int, comparisons: Collection[str]) -> bool:
    """Whether a value is the second operand of a comparison, a key, or what a method of a container looks for."""
    after, before = steps[end : end + 1], steps[max(start - 1, 0) : start]
    if after and (after[0].name in comparisons or _is_subscript(after[0])):
        return not (before and _is_none(before[0]))
    is_argument = bool(before) and before[0].name.startswith(("LOAD_METHOD", "LOAD_ATTR", "LOAD_GLOBAL"))
    return is_argument and before[0].value in _LOOKING_UP and not any(map(_is_attribute, after))


def _is_compared(steps: Sequence[_Step], end: int, comparisons: Collection[str]) -> bool:
    """Whether a value is the first operand of a comparison, other than with None."""
    depth = 1
    for index, step in enumerate(steps[end:], end):
        if depth == 2 and step.name in comparisons:
            return not _is_none(steps[index - 1])
        if depth == 1 and (not step.name.startswith("LOAD_") or _is_attribute(step)):
            return False
        if depth == 2 and step.name.startswith(_TAKING):
            return False
        depth += step.effect
        if depth < 1:
            return False
    return False


def _is_none(step: _Step) -> bool:
    return step.name == "LOAD_CONST" and step.value is None


def _is_attribute(step: _Step) -> bool:
    return step.name.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))


def _is_subscript(step: _Step) -> bool:
    return step.name == "BINARY_SUBSCR" or (step.name == "BINARY_OP" and step.operator == "[]")


_TAKING = ("BINARY_", "IS_OP", "COMPARE_OP", "CONTAINS_OP", "CALL", "FORMAT", "BUILD", "STORE", "RETURN")
_LOOKING_UP = {"get", "index", "count", "pop", "setdefault", "__getitem__", "__contains__", "id", "hash"}
