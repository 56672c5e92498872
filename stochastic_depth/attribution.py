"""Which pass a call belongs to: of the forwards that run, and of those that are being recomputed.

A forward of the root has a scope in the thread, or asyncio task, that runs it. What is called within belongs to it. The
recomputation of an activation checkpoint in the backward belongs to the forward that it repeats. For non-reentrant
checkpoints PyTorch's own object for the checkpoint, noted in the forward, tells which one that was, whatever the thread
and however many forwards are in flight. Reentrant checkpoints share nothing with their forward but the number of their
autograd node; each thread numbers its nodes in the order of their creation. Where several threads have made nodes of
that number, the attribution would be a guess, and raises.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stochastic_depth.compiling import eager
from stochastic_depth.torch_private import (
    Checkpoint,
    Node,
    disable_current_modes,
    evaluated_node,
    graph_task,
    innermost_checkpoint,
    is_reentrant_checkpoint,
    next_node,
    number_of,
    running_checkpoints,
    top_saved_tensors_hooks,
)

T = TypeVar("T")

# How many passes may wait for their backward at once under reentrant activation checkpointing.
_NUM_REMEMBERED = 1024

_REENTRANT_WAY_OUT = "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"


@dataclass
class Pass:
    """The gates of one forward pass: drawn from its counter, or forced.

    Attributes:
        counter: number of its draw.
        survival_probs: one per branch, as they were when it began.
        forced: gates given by the user, one entry per branch, in place of the draw.
        counts: the draw, for each number of separately gated samples that was requested.
        branches_drawn: the branches that asked, where the pass is no forward of the root: the next one that asks again
            starts a new pass.
    """

    counter: int
    survival_probs: tuple[float, ...]
    forced: tuple[bool | Tensor, ...] | None
    counts: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    branches_drawn: set[int] = field(default_factory=set[int])


@dataclass(eq=False)
class Extent:
    """The calls that belong together: a forward of the root, or calls of parts of the model one after the other.

    Attributes:
        gates: their pass; None while the rule of evaluation holds.
        version: of what gates are drawn from, see `GateDraws.end_parts`.
    """

    gates: Pass | None
    version: int = 0


class Scope(Extent):
    """A forward of the root. Between `enter` and `leave` it is what runs in its thread or asyncio task."""

    def __init__(self, owner: Attribution | None, gates: Pass | None) -> None:
        super().__init__(gates)
        self.owner = owner
        self.thread = threading.get_ident()
        self._outer: Scope | None = None
        self._nodes: _Nodes | None = None

    @eager
    def enter(self) -> None:
        """The forward begins."""
        assert self.owner is not None
        self._outer = _innermost.get()
        self._nodes = self.owner.begin(self)
        _innermost.set(self)

    @eager
    def leave(self) -> None:
        """The forward has ended, also by an error or Ctrl-C."""
        owner, self.owner = self.owner, None  # A context that was copied meanwhile holds no running forward.
        if self._nodes is None or owner is None:
            return
        _innermost.set(self._outer)
        self._outer = None
        owner.end(self._nodes)

    @property
    def outer(self) -> Scope | None:
        """The forward, of another model, that this one runs in."""
        return self._outer


_innermost: ContextVar[Scope | None] = ContextVar("stochastic_depth_innermost", default=None)
innermost_scope = _innermost.get

_DRY = Scope(None, None)


def is_dry() -> bool:
    """Whether what runs in this thread or task is run for its shapes only."""
    return _innermost.get() is _DRY


@contextmanager
def dry_run() -> Generator[None]:
    """Within, what is run is run for its shapes only: every branch runs, unseen by FLOP counters and autograd."""
    before = _innermost.get()
    _innermost.set(_DRY)
    try:
        with disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        _innermost.set(before)


class PerContext(Generic[T]):
    """A value that each thread, and in it each asyncio task, has for itself; None where it was not set."""

    def get(self) -> T | None:
        """The value of this thread or task."""
        return cast("T | None", _values.get().get(self))

    def set(self, value: T | None) -> None:
        """Set the value of this thread or task."""
        values = {key: other for key, other in _values.get().items() if key is not self}
        if value is not None:
            values[self] = value
        _values.set(values)


_NOTHING: Mapping[PerContext[Any], Any] = {}
# One for all: Python never frees a ContextVar.
_values: ContextVar[Mapping[PerContext[Any], Any]] = ContextVar("stochastic_depth_values", default=_NOTHING)


@dataclass(eq=False)
class _Nodes:
    """Autograd nodes of one thread that were made in an extent.

    Attributes:
        thread: whose nodes.
        first: number of the first.
        claims_previous: whether the node before `first` belongs to them too, if it is a reentrant checkpoint's.
        extent: what they were made in.
        end: number of the first that no longer belongs to them, None while that is not known.
    """

    thread: object
    first: int
    claims_previous: bool
    extent: Extent
    end: int | None = None


class _Here(threading.local):
    """What an `Attribution` knows about each thread."""

    def __init__(self) -> None:
        # Unlike the identity that Python gives a thread, this one is never used again.
        self.thread = object()
        self.latest: _Nodes | None = None
        # From which autograd number on nodes belong to no extent yet; None where an extent may still be making some.
        self.unclaimed_from: int | None = 0
        # Which number the next node had when a part was last given its gate.
        self.asked_at = 0


# Stands for the extent of a checkpoint in which several were begun.
_SEVERAL = Extent(None)


class Attribution:
    """Finds the extents of one model's calls."""

    def __init__(self) -> None:
        self._here = _Here()
        self._nodes: deque[_Nodes] = deque()
        self._only_thread: object | None = None
        self._has_several_threads = False
        # Below this number nodes may belong to an extent that was forgotten.
        self._forgotten_below = 0
        self._of_checkpoint: WeakKeyDictionary[object, Extent] = WeakKeyDictionary()
        self._lock = threading.Lock()

    # -------------------------------------------------------------------------------------- what runs

    def scope(self) -> Scope | None:
        """The forward of the root that runs in this thread or task."""
        scope = _innermost.get()
        while scope is not None and scope.owner is not self:
            scope = scope.outer
        return scope

    def begin(self, extent: Extent) -> _Nodes:
        """Remember that the nodes which this thread makes from now on belong to `extent`."""
        here = self._here
        first, claims_previous = here.unclaimed_from, False
        if first is None:
            first = next_node()
            # Reentrant checkpointing makes its node just before it runs the function without gradients: such a node
            # is ours, unless a branch of the extent before has been run since.
            claims_previous = not torch.is_grad_enabled() and here.asked_at < first
        if here.latest is not None and here.latest.end is None:
            here.latest.end = first
        made = here.latest = _Nodes(here.thread, first, claims_previous, extent)
        here.unclaimed_from = None
        with self._lock:
            if self._only_thread is None:
                self._only_thread = here.thread
            self._has_several_threads |= self._only_thread is not here.thread
            self._nodes.append(made)
            if len(self._nodes) > _NUM_REMEMBERED:
                forgotten = self._nodes.popleft()
                end = sys.maxsize if forgotten.end is None else forgotten.end
                self._forgotten_below = max(self._forgotten_below, end)
        return made

    def end(self, nodes: _Nodes) -> None:
        """The extent that these nodes belong to makes no more of them."""
        nodes.end = self._here.unclaimed_from = next_node()

    def go_on(self, extent: Extent) -> None:
        """A call of a part belongs to `extent`, maybe after one that belongs to another, or in another thread."""
        here = self._here
        if here.latest is None or here.latest.extent is not extent:
            self.begin(extent)
        here.asked_at = next_node()

    def note_checkpoints(self, extent: Extent) -> None:
        """Note that the non-reentrant checkpoints which are running hold calls of `extent`."""
        innermost = innermost_checkpoint()
        if innermost is not None and self._of_checkpoint.get(innermost.frame) is extent:
            return
        for checkpoint in running_checkpoints():
            known = self._of_checkpoint.get(checkpoint.frame)
            if known is None or (known.gates is None and known is not _SEVERAL):
                self._of_checkpoint[checkpoint.frame] = extent
            elif known is not extent:
                self._of_checkpoint[checkpoint.frame] = _SEVERAL

    # -------------------------------------------------------------------------------------- what is repeated

    def is_repeating(self) -> bool:
        """Whether what runs repeats a forward."""
        return graph_task() != -1 or (
            top_saved_tensors_hooks(True) is not None and any(each.repeats for each in running_checkpoints())
        )

    def repeated(self) -> Extent | None:
        """The extent that what runs repeats; None if it repeats none.

        Raises:
            RuntimeError: if that cannot be told.
        """
        checkpoints = [] if top_saved_tensors_hooks(True) is None else running_checkpoints()
        repeats = [index for index, checkpoint in enumerate(checkpoints) if checkpoint.repeats]
        if not repeats and graph_task() == -1:
            return None
        # Hooks outside of the recomputation belong to the code that runs the backward.
        inside = checkpoints[: repeats[0] + 1] if repeats else []
        extent = self._extent_of(inside)
        if extent is None:
            extent = self._extent_of_node(bool(checkpoints) and not inside)
        for checkpoint in inside:
            self._of_checkpoint.setdefault(checkpoint.frame, extent)
        return extent

    def _extent_of(self, checkpoints: list[Checkpoint]) -> Extent | None:
        for checkpoint in checkpoints:
            extent = self._of_checkpoint.get(checkpoint.frame)
            if extent is _SEVERAL:
                raise RuntimeError(
                    "An activation checkpoint around several forwards of a stochastic model cannot be recomputed with "
                    "the gates of each. Give each forward a checkpoint of its own."
                )
            if extent is not None:
                return extent
        return None

    def _extent_of_node(self, inside_checkpoint: bool) -> Extent:
        node = evaluated_node()
        if node is None:
            raise RuntimeError(
                "Compiled autograd does not tell which forward a recomputation of a stochastic model repeats. "
                f"{_REENTRANT_WAY_OUT}, or run the backward without compiled autograd."
            )
        # Either the recomputation will make its node without gradients, or the nodes that it makes now would be looked
        # up later, by numbers that belong to other extents.
        if not torch.is_grad_enabled() or (is_reentrant_checkpoint(node) and inside_checkpoint):
            raise RuntimeError(
                "Nested activation checkpoints cannot be attributed to their forward pass where one of them is "
                "reentrant. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) for all of them."
            )
        number = number_of(node)
        latest = self._latest_of_each_thread(number, node)
        if not latest or number < self._forgotten_below:
            raise RuntimeError(
                f"The forward pass that is being recomputed is not among the latest {_NUM_REMEMBERED} of this model."
            )
        found = {id(nodes.extent.gates): nodes for nodes in latest}
        if len(found) > 1:
            found = {key: nodes for key, nodes in found.items() if nodes.end is None or number < nodes.end}
        if len(found) != 1:
            raise RuntimeError(
                "Forwards of this stochastic model have run in several threads, and which of them a reentrant "
                f"activation checkpoint repeats cannot be told. {_REENTRANT_WAY_OUT}."
            )
        return next(iter(found.values())).extent

    def _latest_of_each_thread(self, number: int, node: Node) -> list[_Nodes]:
        found: dict[object, _Nodes] = {}
        with self._lock:
            for nodes in reversed(self._nodes):
                if nodes.thread in found:
                    continue
                claimed = nodes.claims_previous and number == nodes.first - 1 and is_reentrant_checkpoint(node)
                if nodes.first <= number or claimed:
                    found[nodes.thread] = nodes
                    if not self._has_several_threads:
                        break
        return list(found.values())
