"""Finds the pass that a call belongs to, in running forwards and in recomputations.

A forward of the root has a scope in the thread, or asyncio task, that runs it. Every call inside it belongs to it. The
recomputation of an activation checkpoint in the backward belongs to the forward that it repeats. For non-reentrant
checkpoints, PyTorch's own object for the checkpoint is noted in the forward and identifies it, in any thread and with
any number of forwards in flight. Reentrant checkpoints share only the number of their autograd node with their forward;
each thread numbers its nodes in the order of their creation. If several threads have made nodes with that number, the
attribution would be a guess, so it raises an error.
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
        survival_probs: one per branch, as of the start of the pass.
        forced: gates set by the user, one entry per branch, instead of a draw.
        counts: the draw, for each number of separately gated samples that was requested.
        branches_drawn: the branches that have used this pass, if it is not a forward of the root. A branch that uses it
            a second time starts a new pass.
    """

    counter: int
    survival_probs: tuple[float, ...]
    forced: tuple[bool | Tensor, ...] | None
    counts: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    branches_drawn: set[int] = field(default_factory=set[int])


@dataclass(eq=False)
class Extent:
    """Calls that belong together: a forward of the root, or successive calls of parts of the model.

    Attributes:
        gates: their pass; None in evaluation.
        version: version of the settings that gates are drawn from, see `GateDraws.end_parts`.
    """

    gates: Pass | None
    version: int = 0


class Scope(Extent):
    """A forward of the root. It runs in its thread or asyncio task between `enter` and `leave`."""

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
        """End the forward; also called after an error or Ctrl-C."""
        owner, self.owner = self.owner, None  # A context copied in the meantime must not keep a running forward.
        if self._nodes is None or owner is None:
            return
        _innermost.set(self._outer)
        self._outer = None
        owner.end(self._nodes)

    @property
    def outer(self) -> Scope | None:
        """The forward of another model that this one runs inside."""
        return self._outer


_innermost: ContextVar[Scope | None] = ContextVar("stochastic_depth_innermost", default=None)
innermost_scope = _innermost.get

_DRY = Scope(None, None)


def is_dry() -> bool:
    """Whether this thread or task is in a dry run, which computes shapes only."""
    return _innermost.get() is _DRY


@contextmanager
def dry_run() -> Generator[None]:
    """Context in which only shapes matter: every branch runs, and FLOP counters and autograd do not see it."""
    before = _innermost.get()
    _innermost.set(_DRY)
    try:
        with disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        _innermost.set(before)


class PerContext(Generic[T]):
    """A value of its own for each thread and asyncio task; None until it is set."""

    def get(self) -> T | None:
        """Return the value of this thread or task."""
        return cast("T | None", _values.get().get(self))

    def set(self, value: T | None) -> None:
        """Set the value of this thread or task."""
        values = {key: other for key, other in _values.get().items() if key is not self}
        if value is not None:
            values[self] = value
        _values.set(values)


_NOTHING: Mapping[PerContext[Any], Any] = {}
# One for all instances: Python never frees a ContextVar.
_values: ContextVar[Mapping[PerContext[Any], Any]] = ContextVar("stochastic_depth_values", default=_NOTHING)


@dataclass(eq=False)
class _Nodes:
    """The autograd nodes that one thread created in an extent.

    Attributes:
        thread: the thread that created them.
        first: number of the first node.
        claims_previous: whether the node before `first` belongs to the extent too, if it is a reentrant checkpoint's.
        extent: the extent.
        end: number of the first node that no longer belongs to the extent; None while that is unknown.
    """

    thread: object
    first: int
    claims_previous: bool
    extent: Extent
    end: int | None = None


class _ThreadState(threading.local):
    """What an `Attribution` knows about each thread."""

    def __init__(self) -> None:
        # Python reuses the ids of threads; this one is unique.
        self.thread = object()
        self.latest: _Nodes | None = None
        # Autograd nodes from this number on belong to no extent yet; None if an extent may still be creating some.
        self.unclaimed_from: int | None = 0
        # Number of the next node when a part last got its gate.
        self.gate_read_at = 0


class _Unclaimed(threading.local):
    """The latest autograd nodes of a thread that no extent may claim: numbers of the first, and of the one behind."""

    def __init__(self) -> None:
        self.begin = self.end = -1


_unclaimed = _Unclaimed()


@contextmanager
def unclaimed_nodes() -> Generator[None]:
    """Context whose autograd nodes belong to no forward: proofs run between a checkpoint's node and its function."""
    begin = _next_claimable()
    try:
        yield
    finally:
        _unclaimed.begin, _unclaimed.end = begin, next_node()


def _next_claimable() -> int:
    """Number of the next autograd node of this thread, or of the first of those that an extent may not claim."""
    number = next_node()
    return _unclaimed.begin if number == _unclaimed.end else number


# Marks a checkpoint in which several extents began.
_SEVERAL = Extent(None)


class Attribution:
    """Finds the extents of one model's calls.

    Args:
        origin: what the model has in common with its copies.
    """

    def __init__(self, origin: str = "") -> None:
        self.origin = origin
        self._here = _ThreadState()
        self._nodes: deque[_Nodes] = deque()
        self._only_thread: object | None = None
        self._has_several_threads = False
        # Nodes below this number may belong to an extent that has been discarded.
        self._forgotten_below = 0
        self._of_checkpoint: WeakKeyDictionary[object, Extent] = WeakKeyDictionary()
        self._lock = threading.Lock()

    # -------------------------------------------------------------------------------------- what runs

    def is_of_a_copy(self) -> bool:
        """Whether a forward of another copy of the model runs in this thread or task."""
        scope = _innermost.get()
        while scope is not None:
            if scope.owner is not None and scope.owner is not self and scope.owner.origin == self.origin:
                return True
            scope = scope.outer
        return False

    def scope(self) -> Scope | None:
        """The forward of the root that runs in this thread or task."""
        scope = _innermost.get()
        while scope is not None and scope.owner is not self:
            scope = scope.outer
        return scope

    def begin(self, extent: Extent) -> _Nodes:
        """Record that nodes created by this thread from now on belong to `extent`."""
        here = self._here
        first, claims_previous = here.unclaimed_from, False
        if first is None:
            first = _next_claimable()
            # Reentrant checkpointing creates its node just before it runs the function without gradients. Such a node
            # belongs to this extent unless a branch of the previous extent has run since.
            claims_previous = not torch.is_grad_enabled() and here.gate_read_at < first
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
        """Record that the extent of these nodes creates no more."""
        nodes.end = self._here.unclaimed_from = next_node()

    def continue_extent(self, extent: Extent) -> None:
        """Record that a call of a part belongs to `extent`, even if the previous call belongs to another one."""
        here = self._here
        if here.latest is None or here.latest.extent is not extent:
            self.begin(extent)
        here.gate_read_at = next_node()

    def note_checkpoints(self, extent: Extent) -> None:
        """Record that the running non-reentrant checkpoints contain calls of `extent`."""
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
        """Whether the running code recomputes a forward."""
        return graph_task() != -1 or (
            top_saved_tensors_hooks(True) is not None and any(each.repeats for each in running_checkpoints())
        )

    def repeated(self) -> Extent | None:
        """The extent that the running code recomputes; None if it recomputes none.

        Raises:
            RuntimeError: if the extent cannot be determined.
        """
        checkpoints = [] if top_saved_tensors_hooks(True) is None else running_checkpoints()
        repeats = [index for index, checkpoint in enumerate(checkpoints) if checkpoint.repeats]
        if not repeats and graph_task() == -1:
            return None
        # Hooks outside the recomputation belong to the code that runs the backward.
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
                    "An activation checkpoint around several forwards of a stochastic model cannot recompute each with "
                    "its own gates. Give each forward a separate checkpoint."
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
        # Either the recomputation creates its node without gradients, or the nodes that it creates now would be looked
        # up later by numbers that belong to other extents.
        if not torch.is_grad_enabled() or (is_reentrant_checkpoint(node) and inside_checkpoint):
            raise RuntimeError(
                "Nested activation checkpoints cannot be attributed to their forward pass if one of them is "
                "reentrant. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) for all of them."
            )
        number = number_of(node)
        latest = self._latest_of_each_thread(number, node)
        if not latest or number < self._forgotten_below:
            raise RuntimeError(f"The recomputed forward pass is not among the latest {_NUM_REMEMBERED} of this model.")
        found = {id(nodes.extent.gates): nodes for nodes in latest}
        if len(found) > 1:
            found = {key: nodes for key, nodes in found.items() if nodes.end is None or number < nodes.end}
        if len(found) != 1:
            raise RuntimeError(
                "Forwards of this stochastic model ran in several threads, and it is unknown which of them a reentrant "
                f"activation checkpoint repeats. {_REENTRANT_WAY_OUT}."
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
