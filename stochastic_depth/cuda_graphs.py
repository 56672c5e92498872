"""CUDA graphs of branches, forward and backward: a branch that runs takes a few launches, a closed one none.

A graph replays recorded work on the same memory: inputs are copied into it, and the next replay overwrites the outputs.
So a branch whose earlier forward still waits for its backward runs without a graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import eager
from stochastic_depth.copies import has_hooks
from stochastic_depth.torch_private import buffer_dict, child_dict, foreach_copy_, parameter_dict

_NUM_WARM_UP = 3
"""Number of runs before a recording, so that libraries have done their one-time setup."""


class Recording(Protocol):
    """A branch's forward and backward on fixed memory.

    Attributes:
        input: (K, ...), read by `forward`.
        output: (K, ...), written by `forward`.
        grad_output: like `output`, read by `backward`.
        grads: gradients of the input and of each parameter, None for those that need none; written by `backward`.
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


Record = Callable[[Callable[[Tensor], Tensor], Tensor, Sequence[Tensor], "torch.cuda.Stream | None"], Recording]
"""Makes a recording from (function, an input on its own memory, parameters, the stream to record on)."""


class CudaRecording:
    """Two CUDA graphs. Recording runs nothing, so parameters and buffers do not change.

    Args:
        function: the branch.
        x: (K, ...), an example, which becomes the recording's input.
        parameters: the parameters that the branch uses, each once.
        stream: the stream on which the branch ran before.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        parameters: Sequence[Tensor],
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.input = x
        # The two graphs of a branch share memory. Graphs of different branches do not, because they may be replayed or
        # skipped in any order.
        pool = torch.cuda.graph_pool_handle()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as data loaders, may continue in the meantime.
        how: Any = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._forward, **how):
            output = function(x)
        self.grad_output = torch.empty_like(output)
        with torch.cuda.graph(self._backward, **how):
            grads = _gradients(output, [x, *parameters], self.grad_output)
        self.output = output.detach()
        self.grads = tuple(grads)

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
        max_shapes: number of shapes to record per branch, the first ones that occur; with other shapes the branch runs
            without graphs. Sample granularity has two numbers of samples, and an epoch may end with a smaller batch.
        record: makes recordings.

    Attributes:
        num_replayed: forwards that were replayed.
        num_not_replayed: forwards that ran without graphs: with further shapes, or while an earlier forward of the
            branch was waiting for its backward.
    """

    def __init__(self, names: Sequence[str], max_shapes: int = 4, record: Record = CudaRecording) -> None:
        self._names = tuple(names)
        self._max_shapes = max_shapes
        self._record = record
        # None: no gradients are needed, so there is nothing to record.
        self._recorded: list[dict[Any, _Replayable | None]] = [{} for _ in names]
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.num_replayed = 0
        self.num_not_replayed = 0

    def __repr__(self) -> str:
        return f"<BranchGraphs of {len(self._names)} branches, {sum(self.num_recorded)} recorded shapes>"

    @property
    def num_recorded(self) -> list[int]:
        """Per branch, how many shapes are recorded."""
        return [sum(each is not None for each in recorded.values()) for recorded in self._recorded]

    @eager
    def run(self, index: int, branch: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
        """Return `branch(module, x)`, with gradients to `x` and the parameters.

        Args:
            index: index of the branch.
            branch: a function of its arguments only, the same in every call.
            module: its first argument, which holds everything it uses.
            x: (K, ...), its second argument.

        Raises:
            RuntimeError: if the branch cannot be recorded.
        """
        state = _ModuleState(module)
        if not torch.is_grad_enabled() or not (x.requires_grad or any(state.need_gradients)):
            return branch(module, x)
        recorded = self._recorded[index]
        key = (
            branch,
            x.shape,
            x.stride(),
            x.dtype,
            x.requires_grad,
            _autocast(x),
            state.need_gradients,
            state.training,
        )
        known = recorded.get(key)
        if known is not None and known.places != state.places:
            del recorded[key]  # Parameters or buffers have been replaced.
        if key not in recorded and len(recorded) < self._max_shapes:
            recorded[key] = self._new(index, branch, module, x, state)
        replayable = recorded.get(key)
        if replayable is None or replayable.is_waiting():
            self.num_not_replayed += 1
            return branch(module, x)
        self.num_replayed += 1
        used = [state.parameters[number] for number in replayable.used]
        return cast(Tensor, _Replay.apply(x, replayable, *used))

    def _new(
        self,
        index: int,
        branch: Callable[[nn.Module, Tensor], Tensor],
        module: nn.Module,
        x: Tensor,
        state: _ModuleState,
    ) -> _Replayable | None:
        stand_ins = _stand_ins(module)

        def function(x: Tensor) -> Tensor:
            # Cast weights inside the graph: autocast would cache the cast of the first step.
            kind = x.device.type
            precision = torch.autocast(
                kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
            )
            with precision, _with_parameters(module, stand_ins):
                return branch(module, x)

        example = x.detach().clone().requires_grad_(x.requires_grad)
        parameters = [stand_ins[parameter] for parameter in state.parameters]
        try:
            with _on_stream(self._stream(x.device)) as stream:
                used = _warm_up(function, example, module, parameters)
                if used is None:
                    return None
                recording = self._record(function, example, [parameters[number] for number in used], stream)
        except RuntimeError as error:
            raise RuntimeError(
                f"The branch {self._names[index]} cannot be recorded as a CUDA graph: {str(error).splitlines()[0]} "
                "depth.release() runs the model without graphs."
            ) from error
        return _Replayable(self._names[index], recording, used, state.places)

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        # One for all branches: libraries keep working memory for each stream.
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def refuse_unrecordable(names: Sequence[str], parts: Sequence[nn.Module]) -> None:
    """Raise if a branch does more than its graph would repeat.

    Raises:
        ValueError: in one line, with the branch and the cause.
    """
    for name, module in zip(names, parts, strict=True):
        for part in module.modules():
            kind, cause = type(part).__name__, None
            if has_hooks(part):
                cause = f"{kind} has hooks, which run in Python"
            elif isinstance(part, nn.SyncBatchNorm):
                cause = f"{kind} waits for other ranks"
            elif hasattr(part, "num_batches_tracked") and getattr(part, "momentum", 0.0) is None:
                cause = f"{kind} with momentum=None reads its counter in every step"
            elif "_stochastic_depth_branch" in part.__dict__:
                cause = f"{kind} inside it has its own gate"
            if cause is not None:
                raise ValueError(f"The branch {name} cannot be recorded as a CUDA graph: {cause}.")
        for parameter in module.parameters():
            if type(parameter) is not nn.Parameter or parameter.device.type != "cuda":
                cause = (
                    f"a parameter is a {type(parameter).__name__} on {parameter.device.type}, not a plain one on cuda"
                )
                raise ValueError(f"The branch {name} cannot be recorded as a CUDA graph: {cause}.")


class _ModuleState:
    """State of a module that a recording is valid for.

    Attributes:
        parameters: each of the module's parameters once.
        need_gradients: for each parameter, whether it needs gradients.
        training: for each submodule, whether it is in training mode.
        places: memory addresses of parameters and buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters: dict[nn.Parameter, None] = {}
        places: list[int] = []
        training: list[bool] = []
        pending = [module]
        while pending:
            part = pending.pop()
            training.append(part.training)
            for parameter in parameter_dict(part).values():
                if parameter is not None:
                    parameters[parameter] = None
            for buffer in buffer_dict(part).values():
                if buffer is not None:
                    places.append(buffer.data_ptr())
            pending += [child for child in child_dict(part).values() if child is not None]
        self.parameters = list(parameters)
        self.need_gradients = tuple([parameter.requires_grad for parameter in parameters])
        self.training = tuple(training)
        self.places = [*places, *[parameter.data_ptr() for parameter in parameters]]


class _Replayable:
    """A recording and the forward that it was last replayed for."""

    def __init__(self, name: str, recording: Recording, used: Sequence[int], places: Sequence[int]) -> None:
        self.name = name
        self.recording = recording
        self.used = used
        self.places = places
        self._forward: weakref.ref[_Forward] | None = None

    def is_waiting(self) -> bool:
        """Whether a forward waits for its backward."""
        return self._forward is not None and self._forward() is not None

    def begin(self) -> _Forward:
        """Begin a forward. It waits until `end` is called or nothing refers to it anymore."""
        begun = _Forward()
        self._forward = weakref.ref(begun)
        return begun

    def end(self, begun: _Forward) -> None:
        """Record that the backward of a forward begins."""
        if self._forward is None or self._forward() is not begun:
            raise RuntimeError(
                f"The branch {self.name} runs as a CUDA graph, so its backward can run only once: call backward "
                "without retain_graph, or depth.release() to run without graphs."
            )
        self._forward = None


class _Forward:
    """One forward of a recording, alive while its backward may still come."""


class _Replay(torch.autograd.Function):
    """A recorded branch: maps (x, recording, *parameters) to its output."""

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
        # Copies, because the next replay overwrites the gradients. Those of parameters are copied all at once.
        of_input, *of_parameters = recording.grads
        written = [grad for grad in of_parameters if grad is not None]
        copies = [torch.empty_like(grad) for grad in written]
        if copies:
            foreach_copy_(copies, written)
        given = iter(copies)
        return (
            None if of_input is None else of_input.clone(),
            None,
            *(grad if grad is None else next(given) for grad in of_parameters),
        )


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _gradients(output: Tensor, inputs: Sequence[Tensor], grad_output: Tensor) -> list[Tensor | None]:
    """Gradients of the inputs that need one and are used, computed outside autocast as any backward."""
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    with torch.autocast(output.device.type, enabled=False):
        grads = iter(torch.autograd.grad(output, needed, grad_output, allow_unused=True))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]


@contextmanager
def _on_stream(stream: torch.cuda.Stream | None) -> Generator[torch.cuda.Stream | None]:
    """Context in which GPU work goes to this stream, and other streams wait."""
    if stream is None:
        yield None
        return
    before = torch.cuda.current_stream(stream.device)
    torch.cuda.synchronize(stream.device)
    try:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield stream
    finally:
        torch.cuda.set_stream(before)  # a failed capture leaves its own stream current
        torch.cuda.synchronize(stream.device)


def _stand_ins(module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """New parameters that share memory with the module's own.

    The module's own may have hooks, and autograd remembers the stream on which each was first used.
    """
    return {parameter: nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in module.parameters()}


@contextmanager
def _with_parameters(module: nn.Module, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> Generator[None]:
    own = [(parameter_dict(part), dict(parameter_dict(part))) for part in module.modules()]
    try:
        for current, before in own:
            current.update({name: None if value is None else stand_ins[value] for name, value in before.items()})
        yield
    finally:
        for current, before in own:
            current.update(before)


def _warm_up(
    function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module, parameters: Sequence[nn.Parameter]
) -> list[int] | None:
    """Run the branch a few times without changing statistics and random states.

    Returns:
        Which of the parameters it uses; None if its output needs no gradients.

    Raises:
        RuntimeError: if it uses parameters that are not among them.
    """
    before = [buffer.clone() for buffer in module.buffers()]
    used: list[int] = []
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else [], device_type="cuda"):
            for _ in range(_NUM_WARM_UP):
                output = function(x)
                if not output.requires_grad:
                    return None
                if not _leaves(output) <= {id(tensor) for tensor in (x, *parameters)}:
                    raise RuntimeError("it uses parameters that do not belong to its module.")
                _, *grads = _gradients(output, [x, *parameters], torch.zeros_like(output))
                used = [number for number, grad in enumerate(grads) if grad is not None]
    finally:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)
    return used


def _leaves(output: Tensor) -> set[int]:
    """Ids of the tensors that a backward would add gradients to."""
    found: set[int] = set()
    seen: set[Any] = set()
    pending: list[Any] = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return found
