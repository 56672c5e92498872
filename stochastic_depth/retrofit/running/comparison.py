"""How far the outcomes of two runs of a block are apart, and how far they may be."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stochastic_depth.retrofit.errors import ProofError
from stochastic_depth.retrofit.recording.layouts import order_of
from stochastic_depth.retrofit.recording.maps import NotComputed
from stochastic_depth.torch_private import tree_leaves


class Outcome(NamedTuple):
    """Outcome of a run.

    Attributes:
        outputs: what it returns.
        gradients: those of inputs and parameters; None if its backward fails.
        arguments: the tensors that it was given, as it leaves them.
    """

    outputs: list[Any]
    gradients: list[Tensor | None] | None
    arguments: list[Tensor]


_TOLERANCES = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 2e-4,
    torch.complex64: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


def compare(
    expected: Outcome, actual: Outcome, name: str, *, zero_gradients: bool, computed_in: torch.dtype = torch.float64
) -> None:
    """Compare two outcomes.

    Args:
        expected: the outcome of the block's own code.
        actual: the outcome of the rewritten code.
        name: which gates were open, for the message.
        zero_gradients: whether a gradient of zeros may not be missing. It may where a branch runs on some of the
            samples: a parameter that only the others use, such as that of an expert, gets none, and a mask gives zeros.
        computed_in: the coarsest floating type in the runs, if known.

    Raises:
        ProofError: if they differ.
    """
    outputs, others = expected.outputs, actual.outputs
    if len(outputs) != len(others):
        raise ProofError(f"{name} it returns {len(others)} values, not {len(outputs)}")
    for index, (a, b) in enumerate(zip(outputs, others, strict=True)):
        if isinstance(b, NotComputed):
            continue
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            difference = deviation(a, b)
            if a.dtype != b.dtype:
                raise ProofError(f"{name} output {index} is of {b.dtype}, not of {a.dtype}")
            if difference > tolerance(a, computed_in):
                raise ProofError(f"{name} output {index} differs by {difference:.2g} of its largest value")
            if order_of(a) != order_of(b):
                raise ProofError(f"{name} the dimensions of output {index} lie in another order in memory")
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or (type(a) is not type(b)):
            raise ProofError(f"{name} output {index} is a {type(b).__name__}, not a {type(a).__name__}")
    for a, b in zip(expected.arguments, actual.arguments, strict=True):
        if deviation(a, b) > tolerance(a, computed_in):
            raise ProofError(f"{name} an argument that its own code changes in place is left with other values")
    if expected.gradients is None:
        return  # The block's own code has no backward.
    if actual.gradients is None:
        raise ProofError(f"{name} its backward fails")
    largest = max((size_of(a) for a in expected.gradients if a is not None), default=0.0)
    for a, b in zip(expected.gradients, actual.gradients, strict=True):
        if a is None or (b is None and not zero_gradients and not size_of(a)):
            continue
        if b is None:
            raise ProofError(f"{name} a gradient is missing")
        # A gradient that is tiny compared with the others is rounding, such as that of a key's bias in attention, which
        # is zero: so it is larger in bf16.
        allowed = tolerance(a, computed_in)
        difference = deviation(a, b, at_least=max(1e-3, allowed) * largest)
        if difference > 10 * allowed:
            raise ProofError(f"{name} a gradient differs by {difference:.2g} of its largest value")


def differ(expected: Any, actual: Any) -> bool:
    """Whether two values are tensors with a larger difference than that of rounding."""
    both = isinstance(expected, Tensor) and isinstance(actual, Tensor)
    return both and deviation(expected, actual) > tolerance(expected)


def deviation(expected: Tensor, actual: Tensor, *, at_least: float = 0.0) -> float:
    """Largest difference of two tensors, relative to the largest value; infinite if their shapes differ.

    Args:
        expected: the tensor whose largest value is the reference.
        actual: the other tensor.
        at_least: lower bound for the largest value.
    """
    if expected.shape != actual.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    kind = torch.float64 if not expected.is_complex() else torch.complex128
    a, b = dense(expected).to(kind), dense(actual).to(kind)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), a - b).abs().nan_to_num(nan=float("inf")).max()
    scale = max(float(a.abs().nan_to_num(nan=0.0, posinf=0.0).max()), at_least)
    return float(difference) / scale if scale > 0 else float(difference)


def size_of(tensor: Tensor) -> float:
    """Its largest absolute value."""
    return float(dense(tensor).abs().max()) if tensor.numel() else 0.0


def dense(tensor: Tensor) -> Tensor:
    """A tensor as it is or, if it is sparse, such as the gradient of a sparse embedding, a dense one."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def tolerance(tensor: Tensor, computed_in: torch.dtype = torch.float64) -> float:
    """Tolerance for rounding errors in the tensor's dtype or a coarser one, relative to the largest value."""
    if torch.is_autocast_enabled(tensor.device.type) if tensor.device.type != "meta" else False:
        return _TOLERANCES[torch.bfloat16]
    own = _TOLERANCES.get(tensor.dtype, 0.0)
    return max(own, _TOLERANCES[computed_in]) if own else own


class CoarsestType(TorchFunctionMode):
    """Notes the coarsest floating type that operations return: norms of a float64 model may compute in float32.

    Args:
        limit: coarser types do not count. With the tolerance of half precision, samples that are mixed would pass.
    """

    def __init__(self, limit: torch.dtype) -> None:
        super().__init__()
        self.found = torch.float64
        self._limit = _TOLERANCES[limit]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and _TOLERANCES[self.found] < _TOLERANCES.get(leaf.dtype, 0.0) <= self._limit:
                self.found = leaf.dtype
        return output


def some_of(num_samples: int, start: float = 0.0) -> Tensor:
    """About half of the samples, (num_samples,), in no order that arguments may have too, nor the same backwards.

    Few of the first and many of the last, so that what a child takes for the first half of its samples is another half.
    """
    index = torch.arange(num_samples)
    some = (0.618 * index + start) % 1 < (index + 0.5) / num_samples
    some[0], some[-1] = True, False
    half = num_samples // 2
    if num_samples > 3 and some[:half].sum() == some[half:].sum():
        some[half - 1] = ~some[half - 1]
    return some
