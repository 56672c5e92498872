"""Proves that a model's branches are gated correctly: runs an example and compares with the model's own code."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.cost import Meter, observed, undisturbed
from stochastic_depth.gate_draws import GateDraws
from stochastic_depth.residual import SkippedGrad, masks_only
from stochastic_depth.retrofit.code.surroundings import kept_surroundings
from stochastic_depth.retrofit.finding.branches import Branch
from stochastic_depth.retrofit.recording.maps import NotComputed
from stochastic_depth.retrofit.recording.quiet import NOISY, without_noise
from stochastic_depth.retrofit.recording.stand_in import uniform, untouched
from stochastic_depth.retrofit.rewriting.sums import BranchParts
from stochastic_depth.retrofit.running.comparison import CoarsestType, dense, deviation, size_of, tolerance
from stochastic_depth.tally import Tally
from stochastic_depth.torch_private import tree_leaves

CauseOf = Callable[[Branch], str]
"""Returns why a branch is masked; empty if it is skipped."""


@dataclass(frozen=True)
class Verification:
    """What `Controller.verify` found.

    Attributes:
        num_branches: number of branches, all gated.
        num_masked: number of branches that are masked instead of skipped.
        forward_flops_open: FLOPs of a forward with all gates open.
        forward_flops_closed: FLOPs of a forward with all gates closed.
        output_deviation: largest difference of an output from the model's own code under masks, in training and
            evaluation, relative to the largest value.
        gradient_deviation: the same for gradients of parameters, relative to the largest gradient.
        statuses: for each branch, its name, "proven" or "masked", and why it is masked.
    """

    num_branches: int
    num_masked: int
    forward_flops_open: int
    forward_flops_closed: int
    output_deviation: float
    gradient_deviation: float
    statuses: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        share = self.forward_flops_closed / max(self.forward_flops_open, 1)
        num_skipped = self.num_branches - self.num_masked
        masked = f", {self.num_masked} are computed and masked" if self.num_masked else ""
        lines = [
            f"{self.num_branches} branches, each with its own gate: {num_skipped} run nothing when closed{masked}.",
            "Training and evaluation equal the model's own code under masks, and evaluation is repeatable.",
            f"Largest deviation: outputs {self.output_deviation:.1e}, gradients {self.gradient_deviation:.1e}.",
            f"With all gates closed {share:.1%} of the forward FLOPs are left.",
        ]
        lines += [f"{name}: masked, {why}" for name, status, why in self.statuses if status == "masked"]
        return "\n".join(lines)


Call = Callable[[], Any]


def verify(
    root: nn.Module,
    passes: GateDraws,
    branches: Sequence[Branch],
    call: Call,
    cause_of: CauseOf,
    skipped_grad: SkippedGrad,
) -> Verification:
    """See `Controller.verify`.

    Args:
        root: the stochastic model.
        passes: its passes.
        branches: its branches.
        call: runs the model on an example.
        cause_of: returns why a branch is masked.
        skipped_grad: gradients of the parameters of a branch that did not run.
    """
    every = range(len(branches))
    before = passes.forced, passes.counter, passes.latest, passes.tally, passes.first_reached
    passes.tally, passes.first_reached = Tally(len(branches)), None  # its draws are no training steps
    with _private(root):
        try:
            of_outputs, of_gradients = _compare_with_masks(root, passes, branches, call, skipped_grad)
            with torch.no_grad(), _Watch(root, passes, branches) as watch:
                root.eval()
                reached = watch.run(root, call, (True,) * len(branches))
                _refuse(passes, set(every) - reached.branches, "never reached by this input")
                masked = {index for index in every if cause_of(branches[index])}
                closed = watch.run(root, call, (False,) * len(branches))
                _refuse(passes, closed.branches - masked, "run although their gates are closed")
                for index in every:
                    # Also one by one: a gate that opens together with another one would pass the test above.
                    alone = watch.run(root, call, tuple(other == index for other in every))
                    others = alone.branches - {index} - masked
                    _refuse(passes, others, f"run where only {passes.names[index]!r} is open")
                first = watch.run(root, call, None)
                _refuse(passes, set(every) - first.branches, "not run in evaluation")
                second = watch.run(root, call, None)
        finally:
            passes.forced, passes.counter, passes.latest, passes.tally, passes.first_reached = before
    if not all(_same(a, b) for a, b in zip(first.outputs, second.outputs, strict=True)):
        raise RuntimeError("Two evaluations of one input differ: something in the model draws in evaluation mode.")
    causes = [cause_of(branch) for branch in branches]
    statuses = tuple(
        (name, "masked" if cause else "proven", cause) for name, cause in zip(passes.names, causes, strict=True)
    )
    return Verification(len(branches), len(masked), reached.flops, closed.flops, of_outputs, of_gradients, statuses)


@contextmanager
def _private(root: nn.Module) -> Generator[None]:
    """Within, the model runs without traces: not in itself, not in what lies around it."""
    with undisturbed(root), untouched(root), kept_surroundings(root):
        yield


def _compare_with_masks(
    root: nn.Module,
    passes: GateDraws,
    branches: Sequence[Branch],
    call: Call,
    skipped_grad: SkippedGrad,
) -> tuple[float, float]:
    """Largest deviations of outputs and gradients from the model's own code under masks, in both modes.

    Raises:
        RuntimeError: if they are more than rounding, or if closed branches lack promised gradients of zero.
    """
    every = range(len(branches))
    patterns: list[tuple[str, tuple[bool, ...] | None]] = [
        ("all gates open", (True,) * len(branches)),
        ("all gates closed", (False,) * len(branches)),
        ("every second gate closed", tuple(index % 2 == 0 for index in every)),
    ]
    # A branch inside another one draws for the samples that it sees, which are all samples under masks.
    if passes.granularity == "batch" or not _is_nested(passes, call):
        patterns.append(("gates that are drawn", None))
    counter = passes.counter
    worst_output, worst_gradient = 0.0, 0.0
    with without_noise(root):
        for training in (True, False):
            for name, gates in patterns:
                absent: set[int] = set()

                def run(*, masks: bool) -> _Outcome:
                    _set_mode(root, training=training)  # noqa: B023
                    passes.forced, passes.counter = gates, counter  # noqa: B023
                    token = masks_only.set(masks)
                    try:
                        with _private(root):
                            return _outcome(root, call, absent)  # noqa: B023
                    finally:
                        masks_only.reset(token)

                where = f"in {'training' if training else 'evaluation'} with {name}"
                actual, expected = run(masks=False), run(masks=True)
                try:
                    of_outputs, of_gradients = _deviations(expected, actual, where)
                except RuntimeError:
                    with CoarsestType(torch.bfloat16) as coarsest:
                        run(masks=True)
                    of_outputs, of_gradients = _deviations(expected, actual, where, coarsest.found)
                worst_output, worst_gradient = max(worst_output, of_outputs), max(worst_gradient, of_gradients)
                if gates is not None and not any(gates) and skipped_grad == "zero":
                    _check_zeros(expected, actual, where)
    return worst_output, worst_gradient


def _is_nested(passes: GateDraws, call: Call) -> bool:
    """Whether a branch lies inside another one."""
    depths: list[int] = []
    running: list[int] = []

    def run(index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        running.append(index)
        depths.append(len(running))
        try:
            return branch(x)
        finally:
            running.pop()

    with torch.no_grad(), observed(passes, run):
        passes.forced = (True,) * len(passes.names)
        call()
    return max(depths, default=0) > 1


def _set_mode(root: nn.Module, *, training: bool) -> None:
    """Set training or evaluation mode, in which modules whose noise is not that of functions run as in evaluation."""
    root.train(training)
    for module in root.modules():
        if isinstance(module, NOISY):
            module.training = False


@dataclass
class _Outcome:
    """Outputs of a forward, gradients by name, and the names of parameters without gradients."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    without: list[str]


def _outcome(root: nn.Module, call: Call, absent: set[int]) -> _Outcome:
    """Run the model and ignore the `absent` outputs; adds the attention maps that were not computed to `absent`."""
    with torch.enable_grad():
        leaves = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, (Tensor, NotComputed))]
        absent |= {index for index, leaf in enumerate(leaves) if isinstance(leaf, NotComputed)}
        outputs = [leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and index not in absent]
        ends = [leaf for leaf in outputs if leaf.requires_grad]
        named = {name: parameter for name, parameter in root.named_parameters() if parameter.requires_grad}
        if not ends or not named:
            return _Outcome([leaf.detach() for leaf in outputs], {}, [])
        generator = torch.Generator().manual_seed(1)
        weights = [(uniform(end.shape, generator) - 0.5).to(end.device, end.dtype) for end in ends]
        try:
            gradients = torch.autograd.grad(ends, list(named.values()), weights, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                "verify computes gradients in a way that reentrant activation checkpoints do not support: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or no checkpoints while you verify."
            ) from None
        found = dict(zip(named, gradients, strict=True))
    found = cast("dict[str, Tensor | None]", found)
    return _Outcome(
        [leaf.detach() for leaf in outputs],
        {name: each for name, each in found.items() if each is not None},
        [name for name, each in found.items() if each is None],
    )


def _deviations(
    expected: _Outcome, actual: _Outcome, where: str, computed_in: torch.dtype = torch.float64
) -> tuple[float, float]:
    """Largest deviations of outputs and gradients; `computed_in` is the coarsest type that the model computes in.

    Raises:
        RuntimeError: if they are more than rounding.
    """
    # A cache does not contain the values of a branch that did not run.
    outputs = zip(expected.outputs, actual.outputs, strict=False)
    if len(expected.outputs) != len(actual.outputs):
        outputs = [next(outputs)]
    of_outputs = 0.0
    for index, (a, b) in enumerate(outputs):
        difference = deviation(a, b) if a.dtype == b.dtype else float("inf")
        if difference > max(10 * tolerance(a), tolerance(a, computed_in)):
            raise RuntimeError(
                f"The stochastic model differs from its own code under masks {where}: output {index} by "
                f"{difference:.2g} of its largest value."
            )
        of_outputs = max(of_outputs, difference)
    scale = max((size_of(each) for each in expected.gradients.values()), default=0.0) or 1.0
    of_gradients = 0.0
    for name, a in expected.gradients.items():
        b = actual.gradients.get(name)
        difference = size_of(dense(a) if b is None else dense(a) - dense(b)) / scale
        if difference > max(10 * tolerance(a), tolerance(a, computed_in)):
            raise RuntimeError(
                f"The stochastic model differs from its own code under masks {where}: the gradient of {name} by "
                f"{difference:.2g} of the largest gradient."
            )
        of_gradients = max(of_gradients, difference)
    return of_outputs, of_gradients


def _check_zeros(expected: _Outcome, closed: _Outcome, where: str) -> None:
    """Check that closed branches have gradients of zero wherever masks would give them.

    Raises:
        RuntimeError: if a parameter has none.
    """
    missing = [name for name in closed.without if name in expected.gradients]
    if missing:
        raise RuntimeError(
            f"{len(missing)} parameters get no gradient {where}, but zeros are promised: {', '.join(missing[:3])}."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    # NaN in the same place is not a difference.
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
    """Observes which branches run: from the gate, and from the modules called inside each branch."""

    def __init__(self, root: nn.Module, passes: GateDraws, branches: Sequence[Branch]) -> None:
        self._passes = passes
        self._ran: set[int] = set()
        # A module that other code uses too does not show which branch called it.
        parents: dict[nn.Module, set[nn.Module]] = {}
        for module in root.modules():
            for child in module.children():
                parents.setdefault(child, set()).add(module)
        owners: dict[nn.Module, set[int]] = {}
        for index, branch in enumerate(branches):
            tops = set(branch.parts.members) if isinstance(branch.parts, BranchParts) else {branch.parts}
            inside = {module for top in tops for module in top.modules()}
            if branch.kind == "layer":
                inside -= tops  # a whole layer reads its gate inside its call
            for module in inside:
                if module in tops or parents.get(module, set()) <= inside | tops:
                    owners.setdefault(module, set()).add(index)
        self._owner = {module: next(iter(indices)) for module, indices in owners.items() if len(indices) == 1}

    def __enter__(self) -> _Watch:
        self._hooks = [
            module.register_forward_pre_hook(self._called, with_kwargs=True)
            for module in self._owner
            if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
        ]
        self._observed = observed(self._passes, self._run_branch)
        self._observed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._observed.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A child without parameters that is given nothing, such as a schedule of a gain, may run without its branch.
        if tree_leaves((args, kwargs)) or next(module.parameters(), None) is not None:
            self._ran.add(self._owner[module])

    def _run_branch(self, index: int, branch: Callable[[Any], Any], x: Any) -> Any:
        self._ran.add(index)
        return branch(x)

    def run(self, root: nn.Module, call: Call, gates: tuple[bool, ...] | None) -> _Run:
        self._ran.clear()
        self._passes.forced = gates
        with Meter(root) as meter:
            output = call()
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return _Run(set(self._ran), outputs, sum(meter.flops.values()))
