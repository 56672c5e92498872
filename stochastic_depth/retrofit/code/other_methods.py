"""Methods of a block beside its forward that use the same layers: `forward_features`, `step`, `inverse`."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType

from torch import nn

from stochastic_depth.copies import plain_class

_ADDITIONS = {"add", "add_", "sub", "sub_", "addcmul", "addmm", "baddbmm", "lerp"}


def other_methods(block: nn.Module, paths: Collection[str]) -> list[str]:
    """Public methods that users may call instead of the forward, and that add or subtract what these layers compute.

    Only a forward has gates. So these methods compute something else than it in training, and in evaluation if that
    multiplies branches by their survival probabilities.

    Args:
        block: a module with branches.
        paths: the layers of its branches.
    """
    layers = {path.partition(".")[0] for path in paths}
    found: list[str] = []
    for name, value in inspect.getmembers_static(plain_class(block), inspect.isfunction):
        function = inspect.unwrap(value)
        if name == "forward" or name.startswith("_") or not isinstance(function, FunctionType):
            continue
        codes = list(_codes(function.__code__))
        takes_input = function.__code__.co_argcount - len(function.__defaults__ or ()) > 1
        names = {each for code in codes for each in code.co_names}
        if takes_input and names & layers and any(map(_adds, codes)):
            found.append(name)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions in it, such as comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _adds(code: CodeType) -> bool:
    operators = {each.argrepr for each in dis.get_instructions(code) if each.opname == "BINARY_OP"}
    return bool({"+", "+=", "-", "-="} & operators) or bool(_ADDITIONS & {*code.co_names})
