"""Which forward pass a branch's call belongs to, and that pass's gates.

Every forward of the root module in training mode is a pass with a draw of its own. Two kinds of calls arrive outside
a forward of the root: a model used by its parts (`model.forward_features`), which starts a new draw, and the
recomputation of activation checkpointing in the backward pass, which must see the gates of the forward that it
repeats. The latter is recognised by the autograd node that is being evaluated: nodes are numbered in the order of
their creation, so a node's number tells in which pass it was made.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore

from stochastic_depth.gates import Draw, draw_counts, draw_order

Granularity = Literal["batch", "sample"]
Ranks = Literal["agree", "decorrelate"]

Function = TypeVar("Function", bound=Callable[..., Any])
Observer = Callable[[int, Callable[[Any], Any], Any], Any]


class Replays(Protocol):
    """Runs branches by recordings of them."""

    def run(self, index: int, branch: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
        """What `branch(module, x)` gives."""
        ...


# How many passes may wait for their backward at once under activation checkpointing.
_NUM_REMEMBERED = 1024


def graph_break(function: Function, *, recursive: bool) -> Function:
    """Keep `function`, and with `recursive` what it calls, out of the graphs of torch.compile, but not of export.

    torch.compile must never see a draw, which it would freeze. What is exported is in evaluation, where there is none.
    """
    outside = torch._disable_dynamo(function, recursive=recursive)  # pyright: ignore

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return (function if is_exporting() else outside)(*args, **kwargs)
        # PyTorch's way out of compilation costs several microseconds a call; here there is nothing to get out of.
        return (function if _compiler_of_frames() is None else outside)(*args, **kwargs)

    return cast(Function, either)


# What compiles the Python frames that this thread enters, None where nothing does.
_compiler_of_frames: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore


def _is_never_exporting() -> bool:
    return False


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", _is_never_exporting)
"""Whether torch.export is tracing; PyTorch 2.6 cannot tell."""


eager = functools.partial(graph_break, recursive=True)


class Gate(NamedTuple):
    """The gate of one branch in one pass.

    Attributes:
        num_open: for how many samples of the batch it is open, 0..N.
        order: (N,) int64, indices of the samples, the open ones first; None where all are open, or the branch is not
            to be called. Where none is open and there is an order, the branch runs one sample of weight 0.
        survival_prob: the chance that it had to be open in this pass, which a later change does not alter.
    """

    num_open: int
    order: Tensor | None
    survival_prob: float


CLOSED = Gate(0, None, 1.0)
"""The gate of every branch that is not to be called; its chance does not matter."""


@dataclass
class Pass:
    """The gates of one forward pass: drawn from its counter, or forced.

    Attributes:
        counter: number of its draw.
        survival_probs: one per branch, as they were when it began.
        forced: gates given by the user, one entry per branch, in place of the draw.
        counts: the draw, for each number of separately gated samples that was asked for.
        served: the branches that asked, where the pass is no forward of the root: who asks again starts a new pass.
    """

    counter: int
    survival_probs: tuple[float, ...]
    forced: tuple[bool | Tensor, ...] | None
    counts: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    served: set[int] = field(default_factory=set[int])


class ForwardPasses:
    """The passes of one stochastic model: its counter, its draws and its forced gates.

    Args:
        names: names of the branches, for messages.
        survival_probs: one per branch.
        seed: seed of all draws.
        granularity: "batch", one gate per mini-batch, or "sample", each sample its own.
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
        """What one sample of each branch costs, for "equal_cost"; None: all the same."""
        self.forced: tuple[bool | Tensor, ...] | None = None
        self.latest: Pass | None = None
        """The latest pass with a draw."""
        self.observer: Observer | None = None
        """Runs every branch in place of its plain call, while something is measured."""
        self.graphs: Replays | None = None
        """Replays branches, after `Controller.capture`."""
        self._forget()

    def _forget(self) -> None:
        """Forget what holds for this process and its autograd graphs only."""
        self._passes: deque[_Remembered] = deque(maxlen=_NUM_REMEMBERED)
        self._current: Pass | None = None
        self._in_root = False
        # What calls the root's hooks and its forward, while it does.
        self._root_call: FrameType | None = None
        self._is_dry = False
        # From which autograd number on nodes belong to no pass yet; None where a pass may still be making some.
        self._unclaimed_from: int | None = 0
        # Which number the next node had when a part was last given its gate.
        self._asked_at = 0
        self._orders: tuple[tuple[int, int, int, torch.device], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in (
            "_passes",
            "_current",
            "_in_root",
            "_root_call",
            "_is_dry",
            "_unclaimed_from",
            "_asked_at",
            "_orders",
            "forced",
            "observer",
            "graphs",
        ):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forced = None
        self.observer = None
        self.graphs = None
        self._forget()

    @eager
    def start(self, root: nn.Module, _args: Any) -> None:
        """Forward pre-hook of the root: starts a pass, and with it a new draw in training mode."""
        if is_exporting():
            return
        if evaluated_node() is not None:
            return  # The whole root is being recomputed: its branches find their pass by the node.
        self._leave_interrupted_root()
        self._in_root = True
        self._root_call = _call_of_hook()
        self._current = self._new_pass() if root.training or self.forced is not None else None
        self._remember(self._current)

    @eager
    def stop(self, _root: nn.Module, _args: Any, _output: Any) -> None:
        """Forward hook of the root, called after errors too: ends the pass."""
        if not is_exporting() and evaluated_node() is None:
            self._leave_root()

    def _leave_root(self) -> None:
        self._in_root = False
        self._root_call = None
        self._current = None
        self._unclaimed_from = next_node()

    def _leave_interrupted_root(self) -> None:
        """PyTorch calls `stop` after an Exception, but not after Ctrl-C."""
        if self._in_root and not _is_running(self._root_call):
            self._leave_root()
            self._unclaimed_from = None  # Where it ended is not known.

    @eager
    def gate(self, index: int, num_samples: int, device: torch.device, training: bool) -> Gate | None:
        """The gate of branch `index` in the call that is being made.

        Args:
            index: index of the branch in `names`.
            num_samples: N, the batch size that the branch sees.
            device: where the order of the samples is needed.
            training: whether the branch is in training mode.

        Returns:
            The gate, or None where the rule of evaluation holds: no gates, every branch runs.

        Raises:
            ValueError: if a forced gate of single samples does not fit the batch.
            RuntimeError: if the model is exported in training mode or with forced gates.
        """
        this = self._current
        # In a forward of the root, the common case, nothing else has to be looked at.
        if (
            this is None
            or not self._in_root
            or self._is_dry
            or evaluated_node() is not None
            or not _is_running(self._root_call)
        ):
            if is_exporting():
                if training or self.forced is not None:
                    raise RuntimeError("An export would freeze the gates: export the model after model.eval().")
                return None
            if self._is_dry:
                return None
            this = self._pass_of_call(index, training=training)
            if this is None:
                return None
        if this.forced is not None:
            return self._forced_gate(this.forced[index], index, num_samples, device, this.survival_probs[index])
        if not training:
            return None
        if self.granularity == "batch":
            is_open = (this.counts.get(1) or self.draw_of(this, 1))[index]
            return Gate(num_samples, None, this.survival_probs[index]) if is_open else CLOSED
        num_open = self.draw_of(this, num_samples)[index]
        # Another rank may have more samples, and with them a survivor where this one has none. What synchronises
        # inside of a branch waits for every rank; the sizes of their batches are not known here, so none stays away.
        if num_open == 0 and not has_several_ranks():
            return CLOSED
        order = None if num_open == num_samples else self._order_of(this, num_samples, device)[index]
        return Gate(num_open, order, this.survival_probs[index])

    @eager
    def survival_prob_of_call(self, index: int, *, training: bool) -> float | None:
        """The chance that the branch had to run which is being run; None where the rule of evaluation holds."""
        if is_exporting():
            return None
        node = evaluated_node()
        this = self._current if node is None else self._pass_of_node(node)
        if this is None or not (training or this.forced):
            return None
        return this.survival_probs[index]

    @property
    def is_dry(self) -> bool:
        """Whether what runs is run for its shapes only."""
        return self._is_dry

    @contextmanager
    def dry_run(self) -> Generator[None]:
        """Within, what is run is run for its shapes only: every branch runs, unseen by FLOP counters and autograd."""
        before, self._is_dry = self._is_dry, True
        try:
            with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
                yield
        finally:
            self._is_dry = before

    def draw_of(self, this: Pass, num_samples: int) -> list[int]:
        """For how many of `num_samples` separately gated samples each branch is open in a pass that is not forced."""
        counts = this.counts.get(num_samples)
        if counts is None:
            # How many samples of a batch a branch takes is agreed in any case, so that no rank waits for another;
            # only which samples they are differs between decorrelated ranks.
            rank = self._rank() if self.granularity == "batch" else None
            counts = this.counts[num_samples] = draw_counts(
                this.survival_probs,
                num_samples,
                seed=self.seed,
                counter=this.counter,
                draw=self.draw,
                costs=self.costs,
                rank=rank,
            )
        return counts

    def _order_of(self, this: Pass, num_samples: int, device: torch.device) -> Tensor:
        key = (self.seed, this.counter, num_samples, device)
        if self._orders is None or self._orders[0] != key:
            order = draw_order(len(self.names), num_samples, seed=self.seed, counter=this.counter, rank=self._rank())
            if device.type == "cuda":
                order = order.pin_memory()  # from other memory a copy waits for the GPU
            self._orders = (key, order.to(device, non_blocking=True))
        return self._orders[1]

    def _forced_gate(
        self, forced: bool | Tensor, index: int, num_samples: int, device: torch.device, survival_prob: float
    ) -> Gate:
        if isinstance(forced, bool):
            return Gate(num_samples, None, survival_prob) if forced else CLOSED
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

    def _rank(self) -> int | None:
        if self.ranks == "agree":
            return None
        return torch.distributed.get_rank() if has_several_ranks() else 0

    def _pass_of_call(self, index: int, *, training: bool) -> Pass | None:
        node = evaluated_node()
        if node is not None:
            return self._pass_of_node(node)
        self._leave_interrupted_root()
        if self._in_root:
            if self._current is None and training:
                # A branch in training mode under a root in evaluation mode.
                self._current = self._new_pass()
                self._passes[-1] = self._passes[-1]._replace(made_in=self._current)
            return self._current
        if self.forced is None and not training:
            return None
        if self._current is None or index in self._current.served or self._current.forced is not self.forced:
            self._current = self._new_pass()
            self._remember(self._current)
            self._unclaimed_from = None
        self._current.served.add(index)
        self._asked_at = next_node()
        return self._current

    def end_parts(self) -> None:
        """What gates are drawn from, or whether they are, has changed: the next call of a part starts a new pass."""
        self._leave_interrupted_root()
        if not self._in_root:
            self._current = None

    def _new_pass(self) -> Pass:
        if torch.jit.is_tracing():
            raise RuntimeError("A trace would freeze the gates: trace the model after model.eval().")
        new = Pass(self.counter, self.survival_probs, self.forced)
        if self.forced is None:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "A CUDA graph of the step would freeze the gates: depth.capture() records each branch by itself."
                )
            self.counter += 1
            self.latest = new
        return new

    def _remember(self, new: Pass | None) -> None:
        first = self._unclaimed_from
        claims_previous = False
        if first is None:
            first = next_node()
            # Reentrant checkpointing makes its node just before it runs the function without gradients: such a node
            # is ours, unless a branch of the pass before has been run since.
            claims_previous = not torch.is_grad_enabled() and self._asked_at < first
        self._passes.append(_Remembered(first, claims_previous, new))

    def _pass_of_node(self, node: Node) -> Pass | None:
        # Either the recomputation will make its node without gradients, or the nodes that it makes now would be looked
        # up later, by numbers that belong to other passes.
        if not torch.is_grad_enabled() or (_is_reentrant_checkpoint(node) and _inside_checkpoint()):
            raise RuntimeError(
                "Nested activation checkpoints cannot be attributed to their forward pass where one of them is "
                "reentrant. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) for all of them."
            )
        number = number_of(node)
        for first, claims_previous, made_in in reversed(self._passes):
            if first <= number or (claims_previous and number == first - 1 and _is_reentrant_checkpoint(node)):
                return made_in
        raise RuntimeError(
            f"The forward pass that is being recomputed is not among the latest {_NUM_REMEMBERED} of this model."
        )


def has_several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


_MODULE_FILE = nn.Module._call_impl.__code__.co_filename  # pyright: ignore


def _call_of_hook() -> FrameType | None:
    """The frame of PyTorch that has called the hook which runs, and calls the forward after it."""
    frame = sys._getframe(1)  # pyright: ignore
    while frame is not None and frame.f_code.co_filename != _MODULE_FILE:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType | None) -> bool:
    """Whether the frame has not ended; True where there is none, and nothing can be told."""
    if frame is None:
        return True
    try:
        frame.clear()
    except RuntimeError:  # "cannot clear an executing frame"
        return True
    return False


class _Remembered(NamedTuple):
    """Which autograd nodes were made in a pass: those from number `first` on, to the next pass's.

    Attributes:
        first: the number.
        claims_previous: whether the node before `first` is this pass's too, if it is a reentrant checkpoint's.
        made_in: the pass, None for one without gates.
    """

    first: int
    claims_previous: bool
    made_in: Pass | None


class Node(Protocol):
    """A node of the autograd graph."""

    def name(self) -> str:
        """Name of its class."""
        ...


def _is_reentrant_checkpoint(node: Node) -> bool:
    return node.name() == "CheckpointFunctionBackward"


def saves_as_usual() -> bool:
    """Whether what runs now is no recomputation, and nobody else decides how what it saves for its backward is kept."""
    autograd = torch._C._autograd  # pyright: ignore
    return (
        evaluated_node() is None
        and autograd._saved_tensors_hooks_is_enabled()
        and autograd._top_saved_tensors_default_hooks(True) is None
    )


def _inside_checkpoint() -> bool:
    """Whether what runs now is being checkpointed in the form that is not reentrant."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")


# PyTorch has no public name for any of these; the tests of activation checkpointing pin them.
def evaluated_node() -> Node | None:
    """The autograd node whose backward is being computed in this thread, None outside a backward."""
    return torch._C._current_autograd_node()  # pyright: ignore


def number_of(node: Node) -> int:
    """Number of a node: nodes of a thread are numbered in the order of their creation."""
    return node._sequence_nr()  # pyright: ignore


def next_node() -> int:
    """Number that the next autograd node of this thread gets."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore
