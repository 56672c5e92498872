"""Side effects of a block's code: on attributes, arguments, globals and random states."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.retrofit.code.called import Called
from stochastic_depth.retrofit.code.forms import items_of
from stochastic_depth.retrofit.code.reads import Reads
from stochastic_depth.retrofit.code.user_data import CONSTANTS, is_data, snapshot
from stochastic_depth.retrofit.errors import StoredError
from stochastic_depth.torch_private import HOOKS, MODULE_ATTRIBUTES, BatchNorm


def contents_of(block: nn.Module, arguments: Any) -> dict[str, Any]:
    """Everything a forward could store on: attributes of the block and its children, and its arguments.

    What several of them hold, such as a config, has the name of the first.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, module in block.named_modules():
        start = f"{path}." if path else ""
        state = module.__dict__
        for name, value in state.items():
            if name == "training":
                if not isinstance(module, BatchNorm):  # A stand-in calls it in evaluation.
                    found[start + name] = value
            elif name not in MODULE_ATTRIBUTES:
                found[start + name] = value if id(value) in seen else snapshot(value)
                if not isinstance(value, (tuple, *CONSTANTS)):
                    seen.add(id(value))
        for group in ("_parameters", "_buffers"):
            found.update({start + name: value for name, value in state[group].items()})
        found[start + "number of hooks"] = sum([len(state.get(name, ())) for name in _OTHER_HOOKS])
    for index, value in enumerate(containers_in(arguments)):
        found[f"argument {index}"] = snapshot(vars(value) if hasattr(value, "__dict__") else value)
    return found


# Those that a recording does not set itself.
_OTHER_HOOKS = [name for name in HOOKS if name not in ("_forward_hooks", "_forward_pre_hooks")]


def containers_in(value: Any) -> Iterator[Any]:
    """The lists, dicts and objects in arguments, which code may change."""
    if isinstance(value, (Tensor, nn.Module, *CONSTANTS)):
        return
    if isinstance(value, (list, tuple, dict, set)):
        if not isinstance(value, tuple):
            yield value
        items = (
            [item for _, item in items_of(cast("dict[Any, Any]", value))] if isinstance(value, dict) else list(value)
        )
        for item in items:
            yield from containers_in(item)
    elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Called):
        yield value


class ChangedObjectError(StoredError):
    """The forward changes its arguments.

    Attributes:
        kinds: their classes; empty if lists are among them, whose methods cannot be recorded.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        names = ", ".join(dict.fromkeys(type(value).__name__ for value in values))
        super().__init__(f"the forward changes its {names} argument")
        self.kinds = {type(value) for value in values} if all(is_data(value) for value in values) else set[type]()


def check_arguments(before: dict[str, Any], after: dict[str, Any], containers: Sequence[Any]) -> None:
    """Refuse a forward that has changed its arguments.

    Raises:
        ChangedObjectError: if it has.
    """
    names = [name for name in {**before, **after} if name.startswith("argument ")]
    changed = [name for name in names if not is_same(before.get(name, _NOTHING), after.get(name, _NOTHING))]
    if changed:
        values = [containers[int(name.split()[1])] for name in changed]
        # An object that contains a changed object has changed too.
        raise ChangedObjectError([value for value in values if is_data(value)] or values)


def stores_of(before: dict[str, Any], after: dict[str, Any], by_children: set[str]) -> dict[str, Any]:
    """The plain numbers that a forward stored on its block; it must not store anything else.

    Raises:
        StoredError: if it stores anything else.
    """
    names = {**before, **after}
    changed = [name for name in names if not is_same(before.get(name, _NOTHING), after.get(name, _NOTHING))]
    changed = [name for name in changed if name not in by_children]
    others = [name for name in changed if "." in name or not _is_number(after.get(name, _NOTHING))]
    if others:
        raise StoredError(f"the forward stores {', '.join(others)} on the block")
    return {name: after[name] for name in changed}


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_number(item) for item in cast("tuple[Any, ...]", value))
    return value is None or isinstance(value, (bool, int, float))


_NOTHING = object()


def is_same(a: Any, b: Any) -> bool:
    """Whether two snapshots hold the same objects and equal plain values."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        first, second = cast("dict[Any, Any]", a), cast("dict[Any, Any]", b)
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    if isinstance(a, (list, tuple)):
        items, others = cast("list[Any]", a), cast("list[Any]", b)
        return len(items) == len(others) and all(is_same(x, y) for x, y in zip(items, others, strict=True))
    return isinstance(a, (bool, int, float, str, bytes, set)) and a == b


def generators_of(block: nn.Module, reads: Reads, arguments: Sequence[Any] = ()) -> list[Any]:
    """Random generators that a block's code may draw from, besides the global ones."""
    values = [value for module in block.modules() for name, value in module.__dict__.items() if name in reads.names]
    values += [*(place() for place in reads.places), *arguments]
    values += [part for value in values for _, part in parts_of(value)]
    return [value for value in values if _state_of(value) is not None]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(generator, numpy.random.Generator):
        return repr(generator.bit_generator.state)
    if numpy is not None and isinstance(generator, numpy.random.RandomState):
        return repr(generator.get_state(legacy=False))
    return None


@dataclass
class Outside:
    """Random states, which must not change between recorded calls."""

    random: list[Any]


def outside(generators: Sequence[Any] = ()) -> Outside:
    """The current random states, including those of these generators."""
    states: list[Any] = [torch.get_rng_state(), random.getstate(), *map(_state_of, generators)]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        _, key, *rest = numpy.random.get_state()
        states.append((key.tobytes(), *rest))
    return Outside(states)


def differ(a: Outside, b: Outside) -> bool:
    """Whether a random state has changed."""
    return not all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a.random, b.random, strict=False)
    )


def parts_of(value: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    """The items and attributes of a structure, each with how it is reached."""
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(cast("list[Any]", value)):
            yield ("item", index), item
    elif isinstance(value, Mapping):
        for key, item in items_of(cast("Mapping[Any, Any]", value)):
            yield ("item", key), item
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, types.ModuleType)) and not callable(value):
        for name, item in vars(value).items():
            yield ("attribute", name), item
