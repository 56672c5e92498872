"""How long each branch takes in a training step on this machine: early blocks often cost more time than their FLOPs.

One forward and backward of the whole network is timed with every branch open. The clock is read at the beginning and
end of each branch: in the forward around its call, in the backward when the gradients of its output and of its input
arrive.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.cost import Cost, all_gates_open, observed, take_step, undisturbed
from stochastic_depth.gate_draws import GateDraws
from stochastic_depth.torch_private import number_of

_NUM_WARM_UP = 1
_NUM_ROUNDS = 5


def with_times(cost: Cost, root: nn.Module, draws: GateDraws, inputs: Sequence[Any]) -> Cost:
    """Add times to a counted cost: medians over a few steps, after warm-up steps.

    The model does not change: parameters, gradients, buffers, training modes and random states stay as they are.

    Args:
        cost: cost of a step of the model, without times.
        root: the stochastic model.
        draws: its draws.
        inputs: arguments of a forward.

    Raises:
        ValueError: if the model is on several devices, whose clocks differ, or on the meta device.
    """
    devices = {parameter.device for parameter in root.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"The time of a step is measured on one real device, but the model is on {found}.")
    device = devices.pop()
    steps: list[float] = []
    shares: list[list[float]] = [[] for _ in draws.names]
    for number in range(_NUM_WARM_UP + _NUM_ROUNDS):
        watch = _Watch(device)
        with undisturbed(root), all_gates_open(draws), observed(draws, watch.run_branch):
            root.train()
            watch.mark()
            take_step(root, inputs, watch.watch_backward)
            watch.mark()
        step_s, branch_s = watch.times(len(draws.names))
        if number >= _NUM_WARM_UP:
            steps.append(step_s)
            for all_shares, seconds in zip(shares, branch_s, strict=True):
                all_shares.append(seconds / step_s)
    step_s = statistics.median(steps)
    branches = tuple(
        replace(branch, time_s=step_s * statistics.median(all_shares))
        for branch, all_shares in zip(cost.branches, shares, strict=True)
    )
    return replace(cost, branches=branches, total=replace(cost.total, time_s=step_s))


@dataclass(eq=False)
class _Interval:
    """Part of a step that belongs to a branch, between two numbered marks."""

    index: int
    begin: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class _Input:
    """An input of a branch: the tensor, the tensor that the branch receives instead, and the branch's backward."""

    outside: Tensor
    inside: Tensor
    backward: _Interval


class _Watch:
    """Marks points in time during one step, and assigns the time between them to branches.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._now, self._seconds_between = _clock(device)
        self._marks: list[Any] = []
        self._intervals: list[_Interval] = []
        self._inputs: list[_Input] = []

    def mark(self) -> int:
        """Mark this point in time and return the number of the mark."""
        self._marks.append(self._now())
        return len(self._marks) - 1

    def run_branch(self, index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        """Run a branch, as an observer of the draws."""
        forward, backward = _Interval(index), _Interval(index)
        self._intervals += [forward, backward]

        def watched(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            self._inputs.append(_Input(value, value.view_as(value), backward))
            return self._inputs[-1].inside

        x = type(x)(map(watched, x)) if type(x) in (tuple, list) else watched(x)
        forward.begin = self.mark()
        output = branch(x)
        forward.end = self.mark()

        def begin_backward(_gradient: Tensor) -> None:
            if backward.begin is None:
                backward.begin = self.mark()

        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(begin_backward)
        return output

    def watch_backward(self, outputs: Sequence[Tensor]) -> None:
        """Mark the ends of the branches in the next backward, which begins at `outputs`.

        A branch ends when the gradient of its input has arrived. If the shortcut is the identity, adding the two
        gradients counts too: it would not be needed without the branch. A shortcut that computed something before the
        branch comes after it in the backward and does not count.
        """
        users = _users(outputs)
        for each in self._inputs:
            own = each.inside.grad_fn
            others = [user for user in users.get(_edge(each.outside), ()) if user is not own]
            added = bool(others) and own is not None and min(map(number_of, others)) > number_of(own)

            def end_backward(_gradient: Tensor, backward: _Interval = each.backward) -> None:
                backward.end = self.mark()  # the last of several inputs counts

            (each.outside if added else each.inside).register_hook(end_backward)

    def times(self, num_branches: int) -> tuple[float, list[float]]:
        """Seconds of the step and of each branch, without the branches inside it."""
        between = self._seconds_between(self._marks)
        owners: list[_Interval | None] = [None] * len(between)
        # The innermost of several intervals is the one that began last.
        for interval in sorted((each for each in self._intervals if each.begin is not None), key=_begin):
            # If no input needs a gradient, a branch's backward ends at the next mark.
            end = _begin(interval) + 1 if interval.end is None else interval.end
            owners[_begin(interval) : end] = [interval] * max(end - _begin(interval), 0)
        of_branch = [0.0] * num_branches
        for owner, seconds in zip(owners, between, strict=True):
            if owner is not None:
                of_branch[owner.index] += seconds
        return sum(between), of_branch


def _users(outputs: Sequence[Tensor]) -> dict[tuple[Any, int], list[Any]]:
    """The autograd nodes that contribute to each gradient, by the node and output that it belongs to."""
    users: dict[tuple[Any, int], list[Any]] = {}
    seen = {output.grad_fn for output in outputs}
    pending = list(seen)
    while pending:
        node = pending.pop()
        for edge in () if node is None else node.next_functions:
            users.setdefault(edge, []).append(node)
            if edge[0] not in seen:
                seen.add(edge[0])
                pending.append(edge[0])
    return users


def _edge(tensor: Tensor) -> tuple[Any, int]:
    return tensor.grad_fn, tensor.output_nr


def _begin(interval: _Interval) -> int:
    assert interval.begin is not None
    return interval.begin


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[list[Any]], list[float]]]:
    """Two functions for a device: mark a point in time, and compute the seconds between neighboring marks."""
    if device.type == "cuda":
        return _event, _seconds_between_events

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        # With one thread, process time ignores other processes. Several threads wait for each other, and process time
        # would count the waiting as work.
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    return now, lambda marks: [after - before for before, after in itertools.pairwise(marks)]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between_events(events: list[torch.cuda.Event]) -> list[float]:
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]
