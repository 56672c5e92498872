"""What lies around a block and its code may change: kept while the code is tried, compared, and put back."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from stochastic_depth.retrofit.code.effects import is_same
from stochastic_depth.retrofit.code.forms import items_of
from stochastic_depth.retrofit.code.places import Place
from stochastic_depth.retrofit.code.reads import Reads, places_of_children, reads_of, written_parameters
from stochastic_depth.retrofit.code.user_data import CONSTANTS, is_data, is_iterator
from stochastic_depth.retrofit.errors import StoredError, TraceError
from stochastic_depth.torch_private import TENSORS_AND_CHILDREN, buffer_dict, is_fake, tree_leaves

_MAX_DEPTH = 5
# Nobody counts in more objects than this, or in larger tensors; a whole application may be reached from a global.
_MAX_PARTS, _MAX_NUMEL = 1000, 2**24


@contextmanager
def unchanged_surroundings(
    block: nn.Module, inlined: Collection[str] = (), arguments: Collection[Any] = ()
) -> Generator[None]:
    """Within, what a block's code may read outside of the block must stay as it is; it is put back if it does not.

    The code of its `inlined` children counts as its own. What other children change is put back, and no error: a call
    of theirs does with it what it does.

    Raises:
        StoredError: if something changes.
        TraceError: if it, or an attribute of the block, is an iterator: looking at it would change it.
    """
    reads = reads_of(block, inlined, arguments)
    values = [(place.description, place()) for place in reads.places]
    for name, value in [*values, *(item for item in block.__dict__.items() if item[0] in reads.names)]:
        if is_iterator(value):
            raise TraceError(f"the forward may advance the iterator {name}")
    seen: dict[int, int] = {}
    own = _keep(block, reads.places, seen)
    others = _keep(block, set(places_of_children(block)).difference(reads.places), seen)
    environment = dict(os.environ)
    changed: str | None = None
    try:
        yield
        moved = [each for each in own if each.is_moved and not each.has_learned]
        # What was put there says more than what holds it.
        moved.sort(key=lambda each: each.has_same)
        changed = moved[0].place.description if moved else None
        if "environ" in reads.names and environment != dict(os.environ):
            changed = "the environment"
    finally:
        for each in (*own, *others):
            each.put_back()
        _put_environment(environment)
    if changed:
        raise StoredError(f"the forward changes {changed}")


@contextmanager
def kept_surroundings(model: nn.Module) -> Generator[None]:
    """Within, the code of a model may change what lies around it, and its parameters; afterwards all is as before."""
    kept = _keep(model, {*Reads(model).places, *places_of_children(model)}, {})
    parameters = [(parameter, parameter.detach().clone()) for parameter in written_parameters(model)]
    environment = dict(os.environ)
    try:
        yield
    finally:
        _put_environment(environment)
        for each in kept:
            each.put_back()
        for parameter, before in parameters:
            if not torch.equal(parameter.detach(), before):
                parameter.data.copy_(before)


def _put_environment(environment: dict[str, str]) -> None:
    if environment != dict(os.environ):
        os.environ.clear()
        os.environ.update(environment)


def _keep(block: nn.Module, places: Iterable[Place], seen: dict[int, int]) -> list[_KeptPlace]:
    modules = {id(module) for module in block.modules()}
    seen.update(dict.fromkeys(modules, _MAX_DEPTH))
    kept: list[_KeptPlace] = []
    for place in places:
        value = place()
        if place.is_value and id(place.owner) not in modules and not isinstance(value, type):
            contents = _NOTHING if isinstance(value, CONSTANTS) else Kept(value, seen)
            kept.append(_KeptPlace(place, value, value is None and place.is_empty, contents))
    return kept


class _KeptPlace(NamedTuple):
    place: Place
    value: Any
    was_empty: bool
    contents: Kept

    @property
    def has_same(self) -> bool:
        """Whether the same value is there."""
        return is_same(self.value, self.place())

    @property
    def is_moved(self) -> bool:
        """Whether another value is there, or something else in it."""
        return not self.has_same or self.contents.has_changed

    @property
    def has_learned(self) -> bool:
        """Whether it only knows more than before, such as what to do for a type, and no values of a call."""
        return self.place() is self.value and self.contents.has_learned

    def put_back(self) -> None:
        if not self.has_same:
            self.place.put(self.value, empty=self.was_empty)
        self.contents.put_back()


class Kept:
    """What a value holds, and what that holds: to be compared with what it holds later, and put back.

    Args:
        value: the value.
        seen: identities of objects that are kept elsewhere, and how deep; those of this value are added.
    """

    def __init__(self, value: Any, seen: dict[int, int]) -> None:
        self._parts: list[tuple[Any, Any]] = []
        self._keep(value, _MAX_DEPTH, seen)

    def _keep(self, value: Any, depth: int, seen: dict[int, int]) -> None:
        if isinstance(value, CONSTANTS) or seen.get(id(value), 0) >= depth or len(self._parts) >= _MAX_PARTS:
            return
        seen[id(value)] = depth
        contents = _contents_of(value)
        if contents is not None:
            self._parts.append((value, contents))
        held = value if isinstance(value, tuple) else contents
        parts = cast("dict[Any, Any]", held).values() if isinstance(held, dict) else held
        for part in cast("list[Any]", parts) if isinstance(held, (list, tuple, set, dict)) else ():
            if not isinstance(part, nn.Module):
                self._keep(part, depth - 1, seen)

    @property
    def has_changed(self) -> bool:
        """Whether it holds something else now."""
        return not all(_holds(value, contents) for value, contents in self._parts)

    @property
    def has_learned(self) -> bool:
        """Whether its dictionaries have only gained objects."""
        return all(_holds(value, contents) or _has_gained(value, contents) for value, contents in self._parts)

    def put_back(self) -> None:
        """Let it hold what it held."""
        for value, contents in self._parts:
            if not _holds(value, contents):
                _fill(value, contents)


_NOTHING = Kept(None, {})


def _contents_of(value: Any) -> Any:
    """A copy of what a value holds itself; None where it holds nothing, or nothing that could be put back."""
    if isinstance(value, Tensor):
        is_plain = value.layout is torch.strided and not value.is_quantized and value.numel() <= _MAX_NUMEL
        has_data = not (value.is_meta or is_fake(value) or value.is_inference())
        return value.detach().clone() if is_plain and has_data and not isinstance(value, nn.Parameter) else None
    if isinstance(value, (list, deque)):
        return list(cast("list[Any]", value))
    if isinstance(value, dict):
        return dict(items_of(cast("dict[Any, Any]", value)))
    if isinstance(value, set):
        return set(cast("set[Any]", value))
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, queue.Queue):
        return list(cast("queue.Queue[Any]", value).queue)
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if name not in TENSORS_AND_CHILDREN}
        return {**own, **buffer_dict(value)}
    if type(value).__module__ == "numpy" and hasattr(value, "nbytes") and hasattr(value, "flags"):
        return value.copy()
    return dict(vars(value)) if isinstance(value, threading.local) or is_data(value) else None


def _holds(value: Any, contents: Any) -> bool:
    """Whether a value holds these contents."""
    now = _contents_of(value)
    if isinstance(now, Tensor):
        before = cast(Tensor, contents)
        return now.shape == before.shape and bool(((now == before) | ((now != now) & (before != before))).all())
    if hasattr(now, "tobytes"):
        return now.shape == contents.shape and now.tobytes() == contents.tobytes()
    if isinstance(now, list):
        return len(now) == len(contents) and all(map(_is_one, now, contents))
    if isinstance(now, dict):
        return now.keys() == contents.keys() and all(_is_one(now[key], contents[key]) for key in now)
    return now == contents


def _is_one(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, CONSTANTS) and type(a) is type(b) and a == b)


def _fill(value: Any, contents: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.data.copy_(contents)
    elif isinstance(value, (list, bytearray)):
        value[:] = contents
    elif isinstance(value, deque):
        value.clear()
        cast("deque[Any]", value).extend(contents)
    elif isinstance(value, (dict, set)):
        value.clear()
        cast(Any, value).update(contents)
    elif isinstance(value, queue.Queue):
        of_queue = cast("queue.Queue[Any]", value)
        of_queue.queue.clear()
        of_queue.queue.extend(contents)
    elif isinstance(value, nn.Module):
        buffers = buffer_dict(value)
        own = vars(value)
        for name in [name for name in own if name not in TENSORS_AND_CHILDREN and name not in contents]:
            del own[name]
        for name, part in contents.items():
            (buffers if name in buffers else own)[name] = part
    elif hasattr(value, "tobytes"):
        value[...] = contents
    else:
        vars(value).clear()
        vars(value).update(contents)


def _has_gained(value: Any, before: Any) -> bool:
    """Whether a dictionary has only gained objects, and no values of this call."""
    return (
        isinstance(value, dict)
        and all(dict.get(value, key) is item for key, item in cast("dict[Any, Any]", before).items())
        and not any(
            isinstance(leaf, (Tensor, fx.Node, bool, int, float, str)) or hasattr(type(leaf), "__torch_function__")
            for key, item in items_of(cast("dict[Any, Any]", value))
            if key not in before
            for leaf in tree_leaves(item)
        )
    )
