"""One CUDA graph per branch, forward and backward: a branch that runs costs two launches, one that does not, none.

A graph replays what was recorded, on the same memory: what goes in is copied there, and what comes out is overwritten
by the next replay. So a branch whose earlier forward still waits for its backward runs as it would without a graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stochastic_depth.copies import has_hooks

_NUM_WARM_UP = 3
"""Runs before a recording, for what libraries do only at first."""


class Recording(Protocol):
    """A branch's forward and backward on memory of their own.

    Attributes:
        input: (K, ...), read by `forward`.
        output: (K, ...), written by `forward`.
        grad_output: like `output`, read by `backward`.
        grads: of the input and of each parameter, None for those that need none; written by `backward`.
    """

    input: Tensor
    output: Tensor
    grad_output: Tensor
    grads: tuple[Tensor | None, ...]

    def forward(self) -> None:
        """Compute `output`."""
        ...

    def backward(self) -> None:
        """Compute `grads`, once after each `forward`."""
        ...


Record = Callable[[Callable[[Tensor], Tensor], Tensor, Sequence[nn.Parameter]], Recording]
"""Makes the recording of (function, an input on memory of its own, parameters)."""


class CudaRecording:
    """Two CUDA graphs. Nothing runs while they are recorded, so that parameters and buffers stay as they are.

    Args:
        function: the branch.
        x: (K, ...), an example, which becomes the recording's input.
        parameters: those that the branch uses.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.input = x
        needed = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        # Graphs of one branch share their memory, those of different branches do not: they may be replayed, or left
        # out, in any order.
        pool = torch.cuda.graph_pool_handle()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as those that load data, may go on meanwhile.
        with torch.cuda.graph(self._forward, pool=pool, capture_error_mode="thread_local"):
            output = function(x)
        self.grad_output = torch.empty_like(output)
        with torch.cuda.graph(self._backward, pool=pool, capture_error_mode="thread_local"):
            grads = iter(torch.autograd.grad(output, needed, self.grad_output, allow_unused=True))
        self.output = output.detach()
        self.grads = tuple(next(grads) if tensor.requires_grad else None for tensor in (x, *parameters))

    def forward(self) -> None:
        """Replay the forward."""
        self._forward.replay()

    def backward(self) -> None:
        """Replay the backward."""
        self._backward.replay()


class BranchGraphs:
    """The recordings of a model's branches, made when a branch first meets a shape.

    Args:
        names: the branches' names, for messages.
        max_shapes: how many shapes of a branch are recorded, the first that it meets; with others it runs as it would
            without graphs. Sample granularity has two numbers of samples, and an epoch may end with a smaller batch.
        record: makes recordings.

    Attributes:
        num_replayed: forwards that were replayed.
        num_not_replayed: forwards that ran as they would without graphs: of further shapes, or while an earlier one of
            the branch waits for its backward.
    """

    def __init__(self, names: Sequence[str], max_shapes: int = 4, record: Record = CudaRecording) -> None:
        self._names = tuple(names)
        self._max_shapes = max_shapes
        self._record = record
        self._recorded: list[dict[Any, _Replayable]] = [{} for _ in names]
        self.num_replayed = 0
        self.num_not_replayed = 0

    def __repr__(self) -> str:
        return f"<BranchGraphs of {len(self._names)} branches, {sum(self.num_recorded)} recorded shapes>"

    @property
    def num_recorded(self) -> list[int]:
        """Per branch, how many shapes are recorded."""
        return [len(recorded) for recorded in self._recorded]

    def run(
        self,
        index: int,
        parts: nn.Module,
        parameters: Sequence[nn.Parameter],
        branch: Callable[[nn.Module, Tensor], Tensor],
        module: nn.Module,
        x: Tensor,
    ) -> Tensor:
        """What `branch(module, x)` gives, with gradients to `x` and the parameters.

        Args:
            index: of the branch.
            parts: holds what the branch uses.
            parameters: those of `parts`.
            branch: a function of its arguments and of `parts` only, the same one in every call.
            module: its first argument.
            x: (K, ...), its second.

        Raises:
            RuntimeError: if the branch cannot be recorded.
        """
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *parameters)):
            return branch(module, x)
        recorded = self._recorded[index]
        key = (branch, x.shape, x.stride(), x.requires_grad, *_state(x, parts, parameters))
        replayable = recorded.get(key)
        if replayable is None and len(recorded) < self._max_shapes:
            replayable = recorded[key] = self._new(index, parts, parameters, branch, module, x)
        if replayable is None or replayable.is_waiting():
            self.num_not_replayed += 1
            return branch(module, x)
        self.num_replayed += 1
        return cast(Tensor, _Replay.apply(x, replayable, *parameters))

    def _new(
        self,
        index: int,
        parts: nn.Module,
        parameters: Sequence[nn.Parameter],
        branch: Callable[[nn.Module, Tensor], Tensor],
        module: nn.Module,
        x: Tensor,
    ) -> _Replayable:
        def function(x: Tensor) -> Tensor:
            # Weights are cast inside of the graph: a cast that autocast remembers would be that of the first step.
            kind = x.device.type
            with torch.autocast(
                kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
            ):
                return branch(module, x)

        example = x.detach().clone().requires_grad_(x.requires_grad)
        try:
            _warm_up(function, example, parts, parameters)
            return _Replayable(self._names[index], self._record(function, example, parameters))
        except RuntimeError as error:
            raise RuntimeError(
                f"The branch {self._names[index]} cannot be recorded as a CUDA graph: {str(error).splitlines()[0]} "
                "Run the model without depth.capture()."
            ) from error


def refuse_unrecordable(names: Sequence[str], parts: Sequence[nn.Module]) -> None:
    """Raise if what a branch does is more than its graph would repeat.

    Raises:
        ValueError: in one line, with the branch and the cause.
    """
    for name, module in zip(names, parts, strict=True):
        causes = [
            f"{type(part).__name__} has hooks, which run in Python"
            if has_hooks(part)
            else f"{type(part).__name__} with momentum=None reads its counter in every step"
            for part in module.modules()
            if has_hooks(part) or (hasattr(part, "num_batches_tracked") and getattr(part, "momentum", 0.0) is None)
        ]
        causes += [
            f"a parameter is a {type(parameter).__name__} on {parameter.device.type}, not a plain one on cuda"
            for parameter in module.parameters()
            if type(parameter) is not nn.Parameter or parameter.device.type != "cuda"
        ]
        if causes:
            raise ValueError(f"The branch {name} cannot be recorded as a CUDA graph: {causes[0]}.")


class _Replayable:
    """A recording, and the forward that it was last replayed for."""

    def __init__(self, name: str, recording: Recording) -> None:
        self.name = name
        self.recording = recording
        self._forward: weakref.ref[_Forward] | None = None

    def is_waiting(self) -> bool:
        """Whether a forward waits for its backward."""
        return self._forward is not None and self._forward() is not None

    def begin(self) -> _Forward:
        """A forward, which waits until `end` or until nothing holds it any more."""
        begun = _Forward()
        self._forward = weakref.ref(begun)
        return begun

    def end(self, begun: _Forward) -> None:
        """The backward of a forward begins."""
        if self._forward is None or self._forward() is not begun:
            raise RuntimeError(
                f"The branch {self.name} runs as a CUDA graph, whose backward can be computed once only: call backward "
                "without retain_graph, or run the model without depth.capture()."
            )
        self._forward = None


class _Forward:
    """One forward of a recording: alive as long as its backward may come."""


class _Replay(torch.autograd.Function):
    """A recorded branch: (x, recording, *parameters) to its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replayable: _Replayable, *_parameters: nn.Parameter) -> Tensor:  # pyright: ignore
        recording = replayable.recording
        recording.input.copy_(x)
        recording.forward()
        ctx.replayable, ctx.begun = replayable, replayable.begin()
        return recording.output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        recording: Recording = ctx.replayable.recording
        ctx.replayable.end(ctx.begun)
        recording.grad_output.copy_(grad_outputs[0])
        recording.backward()
        # Copies: whoever keeps a gradient must not find that of a later replay in it.
        written = [grad for grad in recording.grads if grad is not None]
        copies = [torch.empty_like(grad) for grad in written]
        torch._foreach_copy_(copies, written)  # pyright: ignore -- all at once: two launches or so
        given = iter(copies)
        of_input, *of_parameters = (grad if grad is None else next(given) for grad in recording.grads)
        return of_input, None, *of_parameters


def _state(x: Tensor, parts: nn.Module, parameters: Sequence[nn.Parameter]) -> tuple[Any, ...]:
    """What else a recording holds for: where the parameters lie, how parts behave, what autocast computes in."""
    kind = x.device.type
    return (
        x.dtype,
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        tuple([(parameter.data_ptr(), parameter.requires_grad) for parameter in parameters]),
        tuple([part.training for part in parts.modules()]),
    )


def _warm_up(
    function: Callable[[Tensor], Tensor], x: Tensor, parts: nn.Module, parameters: Sequence[nn.Parameter]
) -> None:
    """Run the branch a few times, beside what is going on, and leave statistics and random states as they were."""
    needed = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
    before = [buffer.clone() for buffer in parts.buffers()]
    with torch.random.fork_rng([x.device] if x.is_cuda else [], device_type="cuda"):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        with torch.cuda.stream(torch.cuda.Stream(x.device) if x.is_cuda else None):
            for _ in range(_NUM_WARM_UP):
                output = function(x)
                torch.autograd.grad(output, needed, torch.zeros_like(output), allow_unused=True)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    with torch.no_grad():
        for buffer, value in zip(parts.buffers(), before, strict=True):
            buffer.copy_(value)
