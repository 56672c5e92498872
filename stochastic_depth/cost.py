"""What a schedule saves in training FLOPs, stored activations and gradients, per branch and in total.

Counted on an example: one forward and backward of the whole network with every branch open. In the forward, whatever
happens inside a branch's call belongs to the branch; in the backward, the autograd nodes that this call created.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from stochastic_depth.gate_draws import GateDraws, Observer
from stochastic_depth.random_states import same_random_states
from stochastic_depth.torch_private import (
    TorchDispatchMode,
    evaluated_node,
    next_node,
    number_of,
    storage_number,
    tree_leaves,
)

_REST = -1


@dataclass(frozen=True)
class CostCounts:
    """Cost of one branch when it runs, without the branches inside it, or of a whole step, in absolute numbers.

    Attributes:
        name: its name.
        survival_prob: probability that its gate is open.
        outer: indices of the branches that contain it, which must be open for it to run.
        training_flops: floating-point operations of forward and backward (a multiply-add counts as two).
        activation_bytes: bytes kept for the backward.
        gradient_bytes: bytes of its parameters' gradients.
        time_s: seconds of forward and backward; None if they were not measured.
    """

    name: str
    survival_prob: float
    outer: tuple[int, ...]
    training_flops: int
    activation_bytes: int
    gradient_bytes: int
    time_s: float | None = None


@dataclass(frozen=True)
class Cost:
    """Cost of a training step, as shares of the same step at constant depth.

    Attributes:
        flops_share: expected share of the floating-point operations, in (0, 1].
        activation_share: expected share of the bytes kept for the backward.
        gradient_share: expected share of the gradients that are not known to be zero.
        branches: the absolute numbers of each branch.
        total: the absolute numbers of the whole step at constant depth.
    """

    flops_share: float
    activation_share: float
    gradient_share: float
    branches: tuple[CostCounts, ...]
    total: CostCounts

    def share(self, gates: Sequence[float]) -> float:
        """Share of the training FLOPs of constant depth that a step with these gates executes.

        Args:
            gates: for each branch the share of the samples for which it is open, in 0..1.
        """
        return _share(self.branches, self.total, gates, "training_flops")

    @property
    def time_share(self) -> float | None:
        """Expected share of the time if a closed branch took none; None if times were not measured."""
        return self.share_of_time([branch.survival_prob for branch in self.branches])

    def share_of_time(self, gates: Sequence[float]) -> float | None:
        """Share of the time of constant depth that a step with these gates takes if a closed branch takes none.

        Args:
            gates: for each branch the share of the samples for which it is open, in 0..1.

        Returns:
            The share in 0..1, or None if times were not measured.
        """
        return None if self.total.time_s is None else _share(self.branches, self.total, gates, "time_s")

    def __str__(self) -> str:
        fields = tuple(_SHARES.values()) if self.total.time_s is None else (*_SHARES.values(), "time_s")
        shares = (*(getattr(self, share) for share in _SHARES), self.time_share)
        rows = [
            f"{branch.name}  {branch.survival_prob:.3f}  "
            + "  ".join(f"{getattr(branch, field) / max(getattr(self.total, field), 1e-12):7.2%}" for field in fields)
            for branch in self.branches
        ]
        header = "branch, survival probability, share of training FLOPs, activations, gradients"
        header += " when open" if self.time_share is None else ", time when open"
        expected = "  ".join(f"{share:7.2%}" for share in shares[: len(fields)])
        return "\n".join([header, *rows, f"expected share of constant depth: {expected}"])


_SHARES = {
    "flops_share": "training_flops",
    "activation_share": "activation_bytes",
    "gradient_share": "gradient_bytes",
}
"""Which count of the branches each share of `Cost` is taken of."""


def measure_cost(root: nn.Module, draws: GateDraws, parts: Sequence[nn.Module], inputs: Sequence[Any]) -> Cost:
    """Count what a training step of `root` costs with every branch open, and what the schedule leaves of it.

    Nothing of the model changes: parameters, gradients, buffers, training modes and random states are as before.

    Args:
        root: the stochastic model.
        draws: its draws.
        parts: for each branch the module that holds its parameters.
        inputs: arguments of a forward.

    Raises:
        ValueError: if no output of the forward depends on a parameter that requires gradients.
    """
    meter = Meter(root)
    with undisturbed(root), all_gates_open(draws), observed(draws, meter.run_branch):
        root.train()
        with meter, torch.autograd.graph.saved_tensors_hooks(meter.save, lambda saved: saved):
            take_step(root, inputs)
    gradient_bytes = _gradient_bytes(root, parts, meter.outer)
    branches = tuple(
        CostCounts(
            name=name,
            survival_prob=draws.survival_probs[index],
            outer=meter.outer.get(index, ()),
            training_flops=meter.flops.get(index, 0),
            activation_bytes=meter.activation_bytes.get(index, 0),
            gradient_bytes=gradient_bytes[index],
        )
        for index, name in enumerate(draws.names)
    )
    total = CostCounts(
        name="constant depth",
        survival_prob=1.0,
        outer=(),
        training_flops=sum(meter.flops.values()),
        activation_bytes=sum(meter.activation_bytes.values()),
        gradient_bytes=sum(_bytes(p) for p in root.parameters() if p.requires_grad),
    )
    shares = {share: _share(branches, total, draws.survival_probs, field) for share, field in _SHARES.items()}
    return Cost(**shares, branches=branches, total=total)


def take_step(
    root: nn.Module, inputs: Sequence[Any], before_backward: Callable[[Sequence[Tensor]], None] | None = None
) -> None:
    """One forward and backward; the gradients are thrown away.

    Args:
        root: the model.
        inputs: arguments of a forward.
        before_backward: is called between the two with the outputs that the backward begins at.

    Raises:
        ValueError: if no output of the forward depends on a parameter that requires gradients.
    """
    with torch.enable_grad():
        output = root(*inputs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not outputs:
            raise ValueError("No output of the model requires gradients: there is no training step to measure.")
        if before_backward is not None:
            before_backward(outputs)
        parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
        torch.autograd.grad([leaf.sum() for leaf in outputs], parameters, allow_unused=True)


def _share(branches: Sequence[CostCounts], total: CostCounts, gates: Sequence[float], field: str) -> float:
    closed = 0.0
    for branch, gate in zip(branches, gates, strict=True):
        reached = gate
        for index in branch.outer:
            reached *= gates[index]
        closed += (1 - reached) * getattr(branch, field)
    whole = getattr(total, field)
    return 1.0 if whole == 0 else 1 - closed / whole


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gradient_bytes(root: nn.Module, parts: Sequence[nn.Module], outer: Mapping[int, tuple[int, ...]]) -> list[int]:
    """Bytes of each branch's own parameters: those that nothing else uses but the branches that it lies in."""
    holders: dict[Tensor, set[int]] = {}
    inside: set[int] = set()
    for index, part in enumerate(parts):
        for module in part.modules():
            inside.add(id(module))
            for parameter in module.parameters(recurse=False):
                holders.setdefault(parameter, set()).add(index)
    # Single parameters of a block, such as the gain of a LayerScale, that a branch alone uses.
    direct = {parameter for part in parts for parameter in part.parameters(recurse=False)}
    for module in root.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                if parameter in direct:
                    continue
                holders.setdefault(parameter, set()).add(_REST)
    gradient_bytes = [0] * len(parts)
    for parameter, indices in holders.items():
        innermost = max(indices, key=lambda index: len(outer.get(index, ())))
        if parameter.requires_grad and _REST not in indices and indices <= {innermost, *outer.get(innermost, ())}:
            gradient_bytes[innermost] += _bytes(parameter)
    return gradient_bytes


class Meter(TorchDispatchMode):
    """Counts FLOPs and saved bytes, and books them on the branch in whose call they arise (-1: on none)."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.flops: dict[int, int] = {}
        self.activation_bytes: dict[int, int] = {}
        self.outer: dict[int, tuple[int, ...]] = {}
        self._open: list[int] = []
        # From which autograd node on the nodes belong to which branch.
        self._first_nodes: list[int] = [0]
        self._owners: list[int] = [_REST]
        self._seen = {
            storage_number(tensor) for tensor in (*root.parameters(), *root.buffers()) if tensor.layout is torch.strided
        }

    def run_branch(self, index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        """Run a branch, as an observer of the draws."""
        self.outer[index] = tuple(self._open)
        self._open.append(index)
        self._mark()
        try:
            return branch(x)
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        self._first_nodes.append(next_node())
        self._owners.append(self._owner())

    def _owner(self) -> int:
        return self._open[-1] if self._open else _REST

    def save(self, tensor: Tensor) -> Tensor:
        """Book a tensor that is kept for the backward, as the first of `saved_tensors_hooks`."""
        storage = storage_number(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            owner = self._owner()
            nbytes = tensor.untyped_storage().nbytes()
            self.activation_bytes[owner] = self.activation_bytes.get(owner, 0) + nbytes
        return tensor.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func.overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        output = func(*args, **kwargs)
        if count is not None:
            node = evaluated_node()
            if node is None:
                owner = self._owner()
            else:
                owner = self._owners[bisect.bisect_right(self._first_nodes, number_of(node)) - 1]
            self.flops[owner] = self.flops.get(owner, 0) + count(*args, **kwargs, out_val=output)
        return output


@contextmanager
def undisturbed(root: nn.Module) -> Generator[None]:
    """Context after which a model's training modes and buffers, and all random states, are as before."""
    modes = [(module, module.training) for module in root.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in root.buffers()]
    try:
        with same_random_states():
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def all_gates_open(draws: GateDraws) -> Generator[None]:
    """Within, every branch runs for every sample and no draw is made."""
    before = draws.forced
    draws.forced = (True,) * len(draws.names)
    try:
        yield
    finally:
        draws.forced = before


def observed(draws: GateDraws, observer: Observer) -> AbstractContextManager[None]:
    """Within, `observer(index, branch, x)` is called in place of `branch(x)`, in this thread or asyncio task."""
    return draws.observed(observer)
