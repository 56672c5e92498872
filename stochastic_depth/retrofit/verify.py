"""The proof that a model's branches are gated: it runs an example and looks which modules are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stochastic_depth.cost import Meter, observed, undisturbed
from stochastic_depth.gate_draws import GateDraws
from stochastic_depth.retrofit.block import BranchParts
from stochastic_depth.retrofit.find import Branch


@dataclass(frozen=True)
class Verification:
    """What `Controller.verify` found.

    Attributes:
        num_branches: number of branches, each of them gated.
        num_masked: how many of them are not skipped but masked.
        forward_flops_open: FLOPs of a forward with all gates open.
        forward_flops_closed: FLOPs of a forward with all gates closed.
    """

    num_branches: int
    num_masked: int
    forward_flops_open: int
    forward_flops_closed: int

    def __str__(self) -> str:
        share = self.forward_flops_closed / max(self.forward_flops_open, 1)
        masked = f", but {self.num_masked} that are computed and masked" if self.num_masked else ""
        return (
            f"{self.num_branches} branches: each is gated and runs nothing when closed{masked}; evaluation is "
            f"repeatable. With all gates closed {share:.1%} of the forward FLOPs are left."
        )


def verify(root: nn.Module, passes: GateDraws, branches: Sequence[Branch], inputs: Sequence[Any]) -> Verification:
    """See `Controller.verify`."""
    every = range(len(branches))
    before = passes.forced
    with torch.no_grad(), undisturbed(root), _Watch(root, passes, branches) as watch:
        root.eval()
        try:
            reached = watch.run(root, inputs, (True,) * len(branches))
            _refuse(passes, set(every) - reached.branches, "never reached by this input")
            closed = watch.run(root, inputs, (False,) * len(branches))
            _refuse(passes, closed.branches, "run although their gates are closed")
            for index in every:
                # Also one by one: a gate that opens with another branch's would pass the test above.
                alone = watch.run(root, inputs, tuple(other == index for other in every))
                _refuse(passes, alone.branches - {index}, f"run where only {passes.names[index]!r} is open")
            first = watch.run(root, inputs, None)
            _refuse(passes, set(every) - first.branches, "not run in evaluation")
            second = watch.run(root, inputs, None)
        finally:
            passes.forced = before
    if not all(_same(a, b) for a, b in zip(first.outputs, second.outputs, strict=True)):
        raise RuntimeError("Two evaluations of one input differ: something in the model draws in evaluation mode.")
    num_masked = sum(branch.treatment == "mask" for branch in branches)
    return Verification(len(branches), num_masked, reached.flops, closed.flops)


def _same(a: Tensor, b: Tensor) -> bool:
    # NaN where NaN is no difference.
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _refuse(passes: GateDraws, indices: Iterable[int], what: str) -> None:
    names = [passes.names[index] for index in sorted(indices)]
    if names:
        raise RuntimeError(f"{len(names)} of {len(passes.names)} branches are {what}: {', '.join(names)}.")


@dataclass
class _Run:
    branches: set[int]
    outputs: list[Tensor]
    flops: int


class _Watch:
    """Sees which branches run: by the gate's own account, and by the modules that are called inside of each."""

    def __init__(self, root: nn.Module, passes: GateDraws, branches: Sequence[Branch]) -> None:
        self._passes = passes
        self._ran: set[int] = set()
        # A module that serves several branches, or something else too, does not tell who has called it.
        parents: dict[nn.Module, set[nn.Module]] = {}
        for module in root.modules():
            for child in module.children():
                parents.setdefault(child, set()).add(module)
        owners: dict[nn.Module, set[int]] = {}
        for index, branch in enumerate(branches):
            tops = set(branch.parts.members) if isinstance(branch.parts, BranchParts) else {branch.parts}
            inside = {module for top in tops for module in top.modules()}
            if branch.kind == "layer":
                inside -= tops  # a whole layer is called to ask for its gate
            for module in inside:
                if module in tops or parents.get(module, set()) <= inside | tops:
                    owners.setdefault(module, set()).add(index)
        self._owner = {module: next(iter(indices)) for module, indices in owners.items() if len(indices) == 1}

    def __enter__(self) -> _Watch:
        self._hooks = [module.register_forward_pre_hook(self._called) for module in self._owner]
        self._observed = observed(self._passes, self._run_branch)
        self._observed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._observed.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _called(self, module: nn.Module, _args: Any) -> None:
        self._ran.add(self._owner[module])

    def _run_branch(self, index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        self._ran.add(index)
        return branch(x)

    def run(self, root: nn.Module, inputs: Sequence[Any], gates: tuple[bool, ...] | None) -> _Run:
        self._ran.clear()
        self._passes.forced = gates
        with Meter(root) as meter:
            output = root(*inputs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return _Run(set(self._ran), outputs, sum(meter.flops.values()))
