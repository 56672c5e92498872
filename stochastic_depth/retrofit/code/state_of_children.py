"""What of a block's children decides what they do: their modes and flags."""

from __future__ import annotations

from typing import Any

from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.code_names import is_users
from stochastic_depth.retrofit.code.forms import NOT_CONFIGURATION, is_plain
from stochastic_depth.retrofit.rules import is_drop_path


class StateOfChildren:
    """What of the children of a block decides what they do, such as their modes: by the names that are there now.

    What they give is recorded for this state. Numbers, which may be counters, count only where it is proven how they
    treat samples, by whether they are 0, 1 or -1.
    """

    def __init__(self, block: nn.Module, *, of_samples: bool) -> None:
        self._kind = _kind if of_samples else _kind_of_flag
        self._parts = [
            (vars(child), name)
            for child in block.modules()
            if child is not block and is_users(plain_class(child)) and not is_drop_path(child)
            for name, value in vars(child).items()
            if is_plain(value) and (name == "training" or name not in NOT_CONFIGURATION)
        ]

    def now(self) -> tuple[Any, ...]:
        """What it is now."""
        kind = self._kind
        return tuple([kind(attributes.get(name)) for attributes, name in self._parts])


def _kind_of_flag(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, str)) else type(value)


def _kind(value: Any) -> Any:
    return type(value) if isinstance(value, (int, float)) and value not in (0, 1, -1) else (type(value), value)
