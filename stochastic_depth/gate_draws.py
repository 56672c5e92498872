"""The gates of a stochastic model's passes: drawn from a counter, or forced.

Every forward of the root module in training mode is a pass with its own draw. If you call parts of a model
(`model.forward_features`), the first branch starts a new draw. `attribution` finds the pass that a call belongs to.
"""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stochastic_depth.attribution import (
    Attribution,
    Extent,
    Pass,
    PerContext,
    Scope,
    dry_run,
    innermost_scope,
    is_dry,
)
from stochastic_depth.compiling import eager, is_capturing
from stochastic_depth.gates import Draw, draw_counts, draw_order
from stochastic_depth.tally import Tally
from stochastic_depth.torch_private import (
    graph_task,
    is_mapped,
    is_traced,
    top_saved_tensors_hooks,
    without_torch_function,
)

Granularity = Literal["batch", "sample"]
Ranks = Literal["agree", "decorrelate"]

Observer = Callable[[int, Callable[[Any], Any], Any], Any]
Forced = tuple[bool | Tensor, ...]


class Replays(Protocol):
    """Runs branches by replaying recordings."""

    def run(self, index: int, branch: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
        """Return `branch(module, x)`."""
        ...


class Gate(NamedTuple):
    """The gate of one branch in one pass.

    Attributes:
        num_open: number of samples of the batch for which it is open, 0..N.
        order: (N,) int64, indices of the samples, the open ones first; None if all are open or the branch must not be
            called. If none is open and there is an order, the branch runs one sample with weight 0.
        survival_prob: probability that it was open in this pass; later changes do not alter it.
    """

    num_open: int
    order: Tensor | None
    survival_prob: float


class _Subset(NamedTuple):
    """Samples, (n,) indices, that a branch runs on, of `num_samples` in the batch."""

    samples: Tensor
    num_samples: int


CLOSED = Gate(0, None, 1.0)
"""The gate of every branch that must not be called; its survival probability does not matter."""


def _gate_of_export(
    self: GateDraws, _index: int, _num_samples: int, _device: torch.device, training: bool
) -> Gate | None:
    if training or self.is_forced_anywhere:
        raise RuntimeError("An export would freeze the gates: export the model after model.eval().")
    return None


class GateDraws:
    """Draws the gates of one stochastic model from its counter, or applies forced gates.

    Several threads may use it at once. They share the counter, the survival probabilities and `latest`. Forced gates,
    the observer, dry runs and the pass of a model whose parts are called belong to the calling thread or asyncio task.

    Args:
        names: names of the branches, for messages.
        survival_probs: one per branch.
        seed: seed of all draws.
        granularity: "batch", one gate per mini-batch, or "sample", one per sample.
        draw: how gates are drawn, see `gates.draw_counts`.
        ranks: "agree", the same gates on every rank, or "decorrelate".
    """

    def __init__(
        self,
        names: Sequence[str],
        survival_probs: Sequence[float],
        *,
        seed: int,
        granularity: Granularity,
        draw: Draw,
        ranks: Ranks,
    ) -> None:
        self.names = tuple(names)
        self.survival_probs = tuple(survival_probs)
        self.seed = seed
        self.granularity: Granularity = granularity
        self.draw: Draw = draw
        self.ranks: Ranks = ranks
        self.counter = 0
        self.costs: tuple[float, ...] | None = None
        """Cost of one sample of each branch, for "equal_cost"; None: equal costs."""
        self.latest: Pass | None = None
        """The latest pass with a draw, in any thread."""
        self.own_draws: frozenset[int] = frozenset()
        """Branches whose own code would draw in each of several uses in a forward, of which a warning tells."""
        self._origin = uuid.uuid4().hex
        self._init_process_state()

    def _init_process_state(self) -> None:
        """Initialize what copies and pickles do not contain."""
        self.observer: Observer | None = None
        """Runs every branch instead of its plain call during a measurement; see `observed`."""
        self.graphs: Replays | None = None
        """Replays branches, after `Controller.capture`."""
        self.tally = Tally(len(self.names))
        """How often the gates were open."""
        self.first_reached: dict[int, None] | None = {}
        """The branches that the first forward of the root in training reaches, in order; None after it."""
        self._lock = threading.RLock()
        self._attribution = Attribution(self._origin)
        self._forced = PerContext[Forced]()
        self._subset = PerContext[_Subset]()
        self._num_forced = 0
        self._was_forced = False
        self._observers = PerContext[Observer]()
        self._num_observers = 0
        # Calls of parts outside a forward of the root.
        self._parts = PerContext[Extent]()
        self._version = 0
        self._orders: tuple[tuple[int, int, int, torch.device], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in (
            "observer",
            "graphs",
            "tally",
            "first_reached",
            "_lock",
            "_attribution",
            "_forced",
            "_subset",
            "_num_forced",
            "_was_forced",
            "_observers",
            "_num_observers",
            "_parts",
            "_version",
            "_orders",
        ):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_process_state()

    # -------------------------------------------------------------------------------------- passes

    @eager
    def scope(self, training: bool, gates: Pass | None = None) -> Scope | None:
        """The scope of a call of the root; None if the call is part of a pass that already runs.

        This is so for a recomputation of the whole root, for a dry run, and if the root's forward calls the root: both
        calls then share one draw.

        Args:
            training: whether the root is in training mode.
            gates: its pass, if `reserve` began it.
        """
        if is_dry() or self._attribution.is_repeating() or self._attribution.scope() is not None:
            return None
        if gates is None and (training or self.forced is not None):
            gates = self._new_pass()
        self._parts.set(None)
        return Scope(self._attribution, gates)

    @eager
    def reserve(self, training: bool) -> Pass | None:
        """The pass of a call of the root that another thread will make; None in evaluation."""
        return self._new_pass() if training or self.forced is not None else None

    def _new_pass(self) -> Pass:
        if is_traced():
            raise RuntimeError("A trace would freeze the gates: trace the model after model.eval().")
        forced = self.forced
        if forced is not None:
            return Pass(self.counter, self.survival_probs, forced)
        if self.granularity == "sample" and is_mapped():
            raise RuntimeError(
                "torch.vmap draws one gate for all that it maps, such as the samples: use granularity='batch'."
            )
        if is_capturing():
            raise RuntimeError(
                "A CUDA graph of the step would freeze the gates: depth.capture() records each branch by itself."
            )
        with self._lock:
            new = Pass(self.counter, self.survival_probs, None)
            self.counter += 1
            self.latest = new
        return new

    def _extent_of_call(self, index: int, *, training: bool) -> Extent | None:
        """The extent that a call of a branch belongs to; None if it is evaluated in any case."""
        if is_dry():
            return None
        # A backward may evaluate the model again; without forced gates, this makes no difference.
        if not training and not self._was_forced and graph_task() != -1:
            return None
        extent = self._attribution.repeated()
        if extent is not None:
            return extent
        scope = self._attribution.scope()
        if scope is None:
            extent = self._part(index, training=training)
        else:
            extent = scope
            if scope.gates is None and training:
                # A branch in training mode under a root in evaluation mode.
                scope.gates = self._new_pass()
            if scope.thread != threading.get_ident():
                self._attribution.continue_extent(scope)
        self._attribution.note_checkpoints(extent)
        return extent

    def _part(self, index: int, *, training: bool) -> Extent:
        """The extent of a call of a part outside a forward of the root."""
        forced = self.forced
        is_gated = training or forced is not None
        if is_gated and self._attribution.is_of_a_copy():
            raise RuntimeError(
                f"A copy of {self.names[index]} runs in the model that it was copied from, and would draw gates of its "
                "own: call restore_(model), copy the block, and then make_stochastic_ again."
            )
        current = self._parts.get()
        if (
            current is None
            or current.version != self._version
            or (
                is_gated
                and (
                    current.gates is None or index in current.gates.branches_drawn or current.gates.forced is not forced
                )
            )
        ):
            current = Extent(self._new_pass() if is_gated else None, self._version)
            self._parts.set(current)
        if is_gated and current.gates is not None:
            current.gates.branches_drawn.add(index)
        self._attribution.continue_extent(current)
        return current

    def end_parts(self) -> None:
        """Start a new pass at the next call of a part, in any thread, because what gates are drawn from has changed."""
        with self._lock:
            self._version += 1

    # -------------------------------------------------------------------------------------- gates

    @property
    def is_forced_anywhere(self) -> bool:
        """Whether a thread or task forces gates."""
        return self._num_forced > 0

    @property
    def forced(self) -> Forced | None:
        """Gates that the user forces in this thread or task; in a recomputation, those of the original forward."""
        return self._forced_here() if self._was_forced else None

    @forced.setter
    def forced(self, forced: Forced | None) -> None:
        before = self._forced.get()
        with self._lock:
            self._num_forced += (forced is not None) - (before is not None)
            self._was_forced |= forced is not None
        self._forced.set(forced)
        self._parts.set(None)

    @property
    def forced_here(self) -> Forced | None:
        """Gates that the user forces in this thread or task, even in a recomputation: what to restore later."""
        return self._forced.get()

    @eager
    def _forced_here(self) -> Forced | None:
        extent = None if is_dry() else self._attribution.repeated()
        if extent is not None:
            return None if extent.gates is None else extent.gates.forced
        return self._forced.get()

    @partial(eager, exported=_gate_of_export)
    def gate(self, index: int, num_samples: int, device: torch.device, training: bool) -> Gate | None:
        """The gate of branch `index` in the current call.

        Args:
            index: index of the branch in `names`.
            num_samples: N, the batch size that the branch sees.
            device: the device for the order of the samples.
            training: whether the branch is in training mode.

        Returns:
            The gate, or None in evaluation: no gates, every branch runs.

        Raises:
            ValueError: if forced gates per sample do not fit the batch.
            RuntimeError: if the model is exported in training mode or with forced gates, or if a recomputation cannot
                be attributed to its forward.
        """
        scope = innermost_scope()
        # The common case: a forward of the root needs no further lookup.
        if (
            scope is not None
            and scope.owner is self._attribution
            and scope.gates is not None
            and scope.thread == threading.get_ident()
            and graph_task() == -1
            and top_saved_tensors_hooks(True) is None
        ):
            this = scope.gates
            if self.first_reached is not None:
                self.first_reached[index] = None
            if index in self.own_draws and this.forced is None and training:
                self._note_use(index, this)
        else:
            if self.first_reached is not None and innermost_scope() is not None:
                self.first_reached[index] = None
            extent = self._extent_of_call(index, training=training)
            if extent is None or extent.gates is None:
                return None
            this = extent.gates
        if this.forced is not None:
            return self._forced_gate(this.forced[index], index, num_samples, device, this.survival_probs[index])
        if not training:
            return None
        if self.granularity == "batch":
            is_open = (this.counts.get(1) or self.draw_of(this, 1))[index]
            return Gate(num_samples, None, this.survival_probs[index]) if is_open else CLOSED
        num_open = self.draw_of(this, num_samples)[index]
        # Another rank may have more samples, and so a survivor where this one has none. Synchronization inside a branch
        # waits for every rank, and their batch sizes are unknown here, so every rank calls the branch.
        if num_open == 0 and not has_several_ranks():
            return CLOSED
        order = None if num_open == num_samples else self._order_of(this, num_samples, device)[index]
        return Gate(num_open, order, this.survival_probs[index])

    def _note_use(self, index: int, this: Pass) -> None:
        if index in this.branches_drawn:
            self.own_draws = frozenset()  # once is enough
            warnings.warn(
                f"{self.names[index]} runs several times in one forward of the model, with the same gates, but its own "
                "code draws anew each time. If the model calls a network once per view of its data, use "
                "make_stochastic_ on that network: then each of its calls has a draw.",
                stacklevel=2,
            )
        this.branches_drawn.add(index)

    @partial(eager, exported=lambda *_, **__: None)
    def survival_prob_of_call(self, index: int, *, training: bool) -> float | None:
        """Survival probability of the running branch in this pass; None in evaluation."""
        if not training and not self._was_forced:
            return None
        extent = self._attribution.repeated() or self._attribution.scope() or self._parts.get()
        if extent is None or extent.gates is None or not (training or extent.gates.forced):
            return None
        return extent.gates.survival_probs[index]

    def draw_of(self, this: Pass, num_samples: int) -> list[int]:
        """For how many of `num_samples` separately gated samples each branch is open in a pass that is not forced."""
        counts = this.counts.get(num_samples)
        if counts is None:
            # The number of samples per branch is the same on all ranks, so that no rank waits for another; only the
            # choice of samples differs between decorrelated ranks.
            rank = self._rank() if self.granularity == "batch" else None
            is_first = not this.counts and num_samples > 0
            counts = this.counts[num_samples] = draw_counts(
                this.survival_probs,
                num_samples,
                seed=self.seed,
                counter=this.counter,
                draw=self.draw,
                costs=self.costs,
                rank=rank,
            )
            if is_first:  # Branches may see batches of several sizes; a pass counts once.
                self.tally.add([count / num_samples for count in counts])
        return counts

    def _order_of(self, this: Pass, num_samples: int, device: torch.device) -> Tensor:
        key = (self.seed, this.counter, num_samples, device)
        orders = self._orders  # Another thread may replace it in the meantime.
        if orders is None or orders[0] != key:
            with without_torch_function():
                order = draw_order(
                    len(self.names), num_samples, seed=self.seed, counter=this.counter, rank=self._rank()
                )
            if device.type == "cuda":
                order = order.pin_memory()  # from other memory a copy waits for the GPU
            orders = self._orders = (key, order.to(device, non_blocking=True))
        return orders[1]

    def _forced_gate(
        self, forced: bool | Tensor, index: int, num_samples: int, device: torch.device, survival_prob: float
    ) -> Gate:
        if isinstance(forced, bool):
            return Gate(num_samples, None, survival_prob) if forced else CLOSED
        subset = self._subset.get()
        # Inside another branch, an entry is for all samples, or for those that this branch sees.
        if subset is not None and len(forced) == subset.num_samples:
            forced = forced[subset.samples.to(forced.device)]
        if len(forced) != num_samples:
            raise ValueError(
                f"The gate of {self.names[index]!r} has {len(forced)} entries, but the batch has {num_samples} samples."
            )
        num_open = int(forced.sum())
        if num_open == 0:
            return CLOSED
        if num_open == num_samples:
            return Gate(num_open, None, survival_prob)
        return Gate(num_open, forced.int().argsort(descending=True, stable=True).to(device), survival_prob)

    def within(self, samples: Tensor, num_samples: int) -> AbstractContextManager[None]:
        """Within, a branch that runs on some of the samples is called; branches inside it see these only.

        Args:
            samples: (n,) their indices.
            num_samples: number of all samples.
        """
        return self._within(samples, num_samples) if self._was_forced else nullcontext()

    @contextmanager
    def _within(self, samples: Tensor, num_samples: int) -> Generator[None]:
        outer = self._subset.get()
        inner = _Subset(samples, num_samples) if outer is None else outer._replace(samples=outer.samples[samples])
        self._subset.set(inner)
        try:
            yield
        finally:
            self._subset.set(outer)

    def _rank(self) -> int | None:
        if self.ranks == "agree":
            return None
        return torch.distributed.get_rank() if has_several_ranks() else 0

    # -------------------------------------------------------------------------------------- runs that measure

    @property
    def is_dry(self) -> bool:
        """Whether what runs in this thread or task is run for its shapes only."""
        return is_dry()

    def dry_run(self) -> AbstractContextManager[None]:
        """Within, what is run is run for its shapes only: every branch runs, unseen by FLOP counters and autograd."""
        return dry_run()

    @contextmanager
    def observed(self, observer: Observer) -> Generator[None]:
        """Within, `observer(index, branch, x)` is called in place of `branch(x)`, in this thread or task."""
        before = self._observers.get()
        with self._lock:
            self._num_observers += 1
            self.observer = self._observe
        self._observers.set(observer)
        try:
            yield
        finally:
            self._observers.set(before)
            with self._lock:
                self._num_observers -= 1
                if not self._num_observers:
                    self.observer = None

    def _observe(self, index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        observer = self._observers.get()
        return branch(x) if observer is None else observer(index, branch, x)


def has_several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
