"""The residual sum, plain and gated: shortcut + gate * branch. With a closed gate, the branch does not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import call_in_trace, eager, graph_break
from stochastic_depth.copies import tensor_without_data, without_data
from stochastic_depth.gate_draws import CLOSED, Gate, GateDraws, Observer
from stochastic_depth.samples import add_samples, kept_once, take, take_and_carry, unchanged
from stochastic_depth.torch_private import (
    BatchNorm,
    apply,
    child_dict,
    foreach_zero_,
    mend_gradients_of_batch_norms,
    parameter_dict,
    saves_as_usual,
    transforms_are_active,
)

# The gated sum stays out of torch.compile's graphs: there would be one per pattern of gates. The branches that it calls
# are compiled, one graph per shape.
outside_graph = partial(graph_break, recursive=False)

masks_only: ContextVar[bool] = ContextVar("masks_only", default=False)
"""Whether every branch is computed and multiplied by its gate, which `Controller.verify` compares with."""

Rescale = Literal["eval", "train", "none"]
SkippedGrad = Literal["zero", "none"]
Samples = Tensor | tuple[Tensor, ...]
BranchFunction = Callable[[nn.Module, Any], Tensor]


class Residual(nn.Module):
    """The plain sum of a shortcut and a residual branch, `shortcut(x) + branch(x)`.

    Args:
        branch: the residual branch f_l.
        shortcut: the branch is added to its output; None is the identity.

    Shapes:
        x: (N, ...); `branch(x)` and `shortcut(x)` have one shape, which starts with N.

    Example:
        >>> Residual(nn.Identity())(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The sum. x: (N, ...)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return shortcut + self.branch(x)


@dataclass(eq=False)
class GatedBranch:
    """One branch of a stochastic module: its gate and scaling.

    Attributes:
        passes: draws the gates of the model.
        index: index of the branch among the model's branches.
        rescale: where the survival probability enters: in evaluation, in training or nowhere.
        skipped_grad: whether the parameters of a branch that did not run get zero gradients or none.
    """

    passes: GateDraws
    index: int
    rescale: Rescale
    skipped_grad: SkippedGrad
    _one_value: dict[Any, bool] = field(default_factory=dict[Any, bool], init=False, repr=False)

    @property
    def survival_prob(self) -> float:
        """Probability that the branch runs, in (0, 1]."""
        return self.passes.survival_probs[self.index]

    def factor(self, survival_prob: float | None) -> float:
        """The factor of the branch in the sum if it runs.

        Args:
            survival_prob: its survival probability in this pass; None in evaluation.
        """
        if survival_prob is None:
            return self.survival_prob if self.rescale == "eval" else 1.0
        return 1 / survival_prob if self.rescale == "train" else 1.0

    @outside_graph
    def add(
        self,
        shortcut: Tensor,
        x: Samples,
        module: nn.Module,
        branch: BranchFunction,
        *,
        parts: nn.Module,
        training: bool,
        extra_inputs: Sequence[Tensor] = (),
        capturable: bool = False,
    ) -> Tensor:
        """The gated sum `shortcut + gate * branch(module, x)`, which runs the branch only if its gate is open.

        Args:
            shortcut: (N, ...), the value that the branch is added to; `x` itself or a view of it for an identity
                shortcut.
            x: (N, ...), input of the branch, or several in a tuple.
            module: the module whose parameters the branch uses.
            branch: computes the branch from (module, x), for any number of samples.
            parts: holds the branch's parameters.
            training: whether the training rule applies.
            extra_inputs: inputs of the branch that get no gradient through the shortcut. Like parameters, they get
                gradients of zero from a branch that does not run.
            capturable: whether `branch` is the same in every call and depends on its arguments only, so that a
                recording may be replayed.

        Returns:
            (N, ...), a new tensor, which may be changed in place.

        Raises:
            ValueError: if the sum has another shape than the shortcut.
        """
        num_samples = shortcut.shape[0]
        gate = self.passes.gate(self.index, num_samples, shortcut.device, training)
        if gate is CLOSED:
            return self.skip(shortcut, parts, extra_inputs)
        if self.passes.observer is not None:
            branch = partial(_observed, self.passes.observer, self.index, branch)
        if gate is None:
            return _plain_sum(shortcut, branch(module, x), self.factor(None))
        factor = self.factor(gate.survival_prob)
        graphs = self.passes.graphs
        if graphs is not None and capturable and self.passes.observer is None and saves_as_usual():
            branch = cast(BranchFunction, partial(graphs.run, self.index, branch))
        if gate.num_open == num_samples:
            output = branch(module, x)
            total = _plain_sum(shortcut, output, factor)
            if total.shape != shortcut.shape:
                raise self._other_shape(output, shortcut)
            return total
        return self._sum_over_subset(shortcut, x, module, branch, gate, factor, parts)

    def weights(self, x: Tensor, *, training: bool) -> float | Tensor:
        """The factor of a masked branch's output `x` (N, ...): a number, or weights (N,)."""
        gate = self.passes.gate(self.index, x.shape[0], x.device, training)
        factor = self.factor(gate and gate.survival_prob)
        if gate is None or gate.num_open == x.shape[0]:
            return factor
        weights = x.new_zeros(x.shape[0])
        if gate.order is not None:
            weights[gate.order[: gate.num_open]] = factor
        return weights

    def skip(self, shortcut: Tensor, parts: nn.Module, extra_inputs: Sequence[Tensor] = ()) -> Tensor:
        """The sum if the branch, whose parameters `parts` holds, runs for no sample: a copy of `shortcut`."""
        # Transforms of torch.func give zeros for unused parameters themselves.
        if self.skipped_grad == "zero" and torch.is_grad_enabled() and not transforms_are_active():
            unused = [tensor for tensor in (*_parameters(parts), *extra_inputs) if tensor.requires_grad]
            if unused:
                return cast(Tensor, apply(_WithZeroGradients, shortcut, *unused))
        # A copy: code that changes the sum in place must not change the shortcut, which other code uses.
        return shortcut.clone()

    def _sum_over_subset(
        self,
        shortcut: Tensor,
        x: Samples,
        module: nn.Module,
        branch: BranchFunction,
        gate: Gate,
        factor: float,
        parts: nn.Module,
    ) -> Tensor:
        assert gate.order is not None
        num_run = self.num_run(gate, parts, module, branch, x)
        run = gate.order[:num_run]
        carried = shortcut
        batches = x if isinstance(x, tuple) else (x,)
        taken: list[Tensor] = []
        for batch in batches:
            if batch is shortcut:
                samples, carried = take_and_carry(batch, run)
            else:
                samples = take(batch, run)
            taken.append(samples)
        inside = self.passes.within(run, shortcut.shape[0])
        with kept_once(taken, batches, run), unchanged(taken, self.passes.names[self.index]), inside:
            output = branch(module, tuple(taken) if isinstance(x, tuple) else taken[0])
        if num_run == 1:
            self.mend_batch_norms(output, taken)
        if num_run > gate.num_open:
            output = output[: gate.num_open]
        if output.shape[1:] != shortcut.shape[1:]:
            try:
                output = output.expand(gate.num_open, *shortcut.shape[1:])
            except RuntimeError:
                raise self._other_shape(output, shortcut) from None
        return add_samples(carried, output, gate.order[: gate.num_open], factor)

    @eager
    def mend_batch_norms(self, output: Tensor, samples: Sequence[Tensor]) -> None:
        """Make the gradients right that a single sample gets behind BatchNorm on a CPU."""
        if output.device.type == "cpu":
            mend_gradients_of_batch_norms(output, samples)

    def _other_shape(self, output: Tensor, shortcut: Tensor) -> ValueError:
        return ValueError(
            f"The branch {self.passes.names[self.index]} gives {tuple(output.shape)} to a shortcut of "
            f"{tuple(shortcut.shape)}. Their sum would have another shape than the shortcut, which is all that is left "
            "where the gate is closed: expand the shortcut first."
        )

    def num_run(self, gate: Gate, parts: nn.Module, module: nn.Module, branch: BranchFunction, x: Samples) -> int:
        """For how many samples the branch runs: those whose gate is open, and others of weight 0 where it needs them.

        Args:
            gate: open for some of the samples.
            parts: holds the branch's parameters.
            module: first argument of `branch`.
            branch: computes the branch from (module, x), for any number of samples.
            x: (N, ...), or several in a tuple.
        """
        if gate.num_open <= 1 and any(_batch_norms(parts)) and self._sees_one_value(module, branch, x):
            return 2  # BatchNorm cannot normalize a single value per channel: another sample gives it another
        return max(gate.num_open, 1)

    @eager
    def _sees_one_value(self, module: nn.Module, branch: BranchFunction, x: Samples) -> bool:
        """Whether a BatchNorm of the branch would see one value per channel if the branch ran for a single sample.

        It is looked up in a run without data. Where that fails, what the branch is given decides.
        """
        inputs = x if isinstance(x, tuple) else (x,)
        shapes = tuple(each.shape[1:] for each in inputs)
        if shapes not in self._one_value:
            module = without_data(module)
            alone = tuple(tensor_without_data(each, 1) for each in inputs)
            seen: list[bool] = []
            for norm in _batch_norms(module):
                norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() == args[0].shape[1]))
                norm.eval()
            try:
                with self.passes.dry_run():
                    branch(module, alone if isinstance(x, tuple) else alone[0])
            except RuntimeError:
                seen = [each.shape[2:].numel() == 1 for each in inputs]
            self._one_value[shapes] = any(seen)
        return self._one_value[shapes]


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """What `module.parameters()` gives, without its names, which take longer than a gate."""
    if type(module).named_parameters is not nn.Module.named_parameters:
        return list(module.parameters())
    found = [parameter for parameter in parameter_dict(module).values() if parameter is not None]
    for child in child_dict(module).values():
        if child is not None:
            found += _parameters(child)
    return found


def _observed(observer: Observer, index: int, branch: BranchFunction, module: nn.Module, x: Samples) -> Tensor:
    return observer(index, partial(branch, module), x)


def _plain_sum(shortcut: Tensor, branch: Tensor, factor: float) -> Tensor:
    return shortcut + branch if factor == 1.0 else torch.add(shortcut, branch, alpha=factor)


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, BatchNorm) and part.training]


class _WithZeroGradients(torch.autograd.Function):
    """A copy of `x` through which `unused` tensors get gradients of zero, as if they had been used with factor 0.

    That is what the authors' optimizer sees for a dropped block, and what a mask gives; and it makes plain
    DistributedDataParallel right, which waits for a gradient of every parameter.
    """

    @staticmethod
    def forward(x: Tensor, *_unused: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.unused = inputs[1:]

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor | None) -> Tensor | None:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return None if grad_inputs[0] is None else grad_inputs[0].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        zeros = [torch.empty_like(tensor) for tensor in ctx.unused]
        # All at once, so that a GPU is not called for each parameter. Where FSDP2 has gathered the rest of a model and
        # not this branch, a block's own gain is a plain tensor beside the shards of its modules.
        for kind in {type(zero) for zero in zeros}:
            foreach_zero_([zero for zero in zeros if type(zero) is kind])
        return grad_outputs[0], *zeros


def masked(gated: GatedBranch, x: Tensor, *, training: bool) -> Tensor:
    """A branch's output `x` (N, ...) times its gates, where the branch is not skipped."""
    if gated.passes.observer is not None:
        x = gated.passes.observer(gated.index, torch.clone, x)
    weights = gated.weights(x, training=training)
    if isinstance(weights, Tensor):
        return x * weights.view(-1, *[1] * (x.dim() - 1))
    return x if weights == 1.0 else x * weights


class StochasticResidual(Residual):
    """A `Residual` whose branch runs only where its gate is open. `make_stochastic_` gives this class to modules."""

    _stochastic_depth_branch: GatedBranch

    def forward(self, x: Tensor) -> Tensor:
        """The gated sum. x: (N, ...)."""
        if not isinstance(self, StochasticResidual):  # restored; someone, such as torch.compile, has kept this method
            return type(self).forward(self, x)
        if self.training and (call := call_in_trace(self, (x,), {})) is not None:
            return cast(Any, call)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if masks_only.get():
            return shortcut + masked(self._stochastic_depth_branch, self.branch(x), training=self.training)
        return self._stochastic_depth_branch.add(
            shortcut, x, self.branch, nn.Module.__call__, parts=self.branch, training=self.training, capturable=True
        )
