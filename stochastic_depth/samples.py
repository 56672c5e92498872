"""Gathers some samples of a batch and adds them back, in memory order and without storing them twice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from stochastic_depth.compiling import eager
from stochastic_depth.torch_private import apply, keeps_its_result, saves_as_usual, version_of


def take(batch: Tensor, indices: Tensor) -> Tensor:
    """Samples (K, ...) of a batch (N, ...), by their indices (K,)."""
    return cast(Tensor, apply(_Take, batch, indices))


def take_and_carry(batch: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Samples (K, ...) of a batch (N, ...), by their indices (K,), and the batch itself, if both are used."""
    return cast("tuple[Tensor, Tensor]", apply(_TakeAndCarry, batch, indices))


def add_samples(batch: Tensor, samples: Tensor, indices: Tensor, factor: float) -> Tensor:
    """A batch (N, ...) plus `factor` times samples (K, ...), added to those at indices (K,); a new tensor."""
    return cast(Tensor, apply(_AddSamples, batch, samples, indices, factor))


@eager
def kept_once(taken: Sequence[Tensor], batches: Sequence[Tensor], indices: Tensor) -> AbstractContextManager[None]:
    """Context in which autograd does not store gathered samples whose batch it stores; the backward gathers them again.

    A batch is stored anyway if the function that made it stores its result, as ReLU does. Otherwise the samples take
    less memory than the batch.

    Args:
        taken: samples (K, ...) of each batch.
        batches: (N, ...), the batches.
        indices: (K,), indices of the samples.
    """
    sources = [
        (samples, _Kept(batch.detach(), version_of(batch)))
        for samples, batch in zip(taken, batches, strict=True)
        if keeps_its_result(batch)
    ]
    if not sources or not torch.is_grad_enabled() or not saves_as_usual():
        return nullcontext()
    return _KeptOnce(sources, indices)


class _Kept(NamedTuple):
    batch: Tensor
    version: int


class _KeptOnce(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self, sources: list[tuple[Tensor, _Kept]], indices: Tensor) -> None:
        super().__init__(self._pack, partial(_unpack, indices))
        self._sources = sources

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._sources.clear()  # autograd holds on to `_pack`, which would hold on to the samples

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        for samples, kept in self._sources:
            if samples is tensor:
                return kept
        return tensor


def _unpack(indices: Tensor, packed: Tensor | _Kept) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    if version_of(packed.batch) != packed.version:
        raise RuntimeError(
            "The input of a residual branch was changed in place before its backward, which needs the original values."
        )
    return _take(packed.batch, indices)


@eager
def unchanged(taken: Sequence[Tensor], branch: str) -> AbstractContextManager[None]:
    """Context in which gathered samples must not be changed in place: the batch would not change with them.

    Args:
        taken: the samples.
        branch: name of the branch that uses them.

    Raises:
        RuntimeError: if they are changed.
    """
    return _Unchanged(taken, branch)


class _Unchanged(AbstractContextManager[None]):
    def __init__(self, taken: Sequence[Tensor], branch: str) -> None:
        self._branch = branch
        self._before = [(samples, version_of(samples)) for samples in taken if not samples.is_inference()]

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        # PyTorch itself raises if the samples have gradients, but names neither the branch nor the cause.
        refused = isinstance(error, RuntimeError) and "modified inplace" in str(error)
        changed = error is None and any(version_of(samples) != version for samples, version in self._before)
        if refused or changed:
            raise RuntimeError(
                f"The branch {self._branch} changes its input in place (as ReLU(inplace=True) does). In the plain "
                "network that changes the shortcut too; here it cannot, as the branch runs on some of the samples. "
                "Make its first operation one that is not in place, or choose granularity='batch'."
            ) from error


# Samples are gathered and added in memory order, forward and backward: PyTorch's index_select and index_add turn
# channels-last tensors into contiguous ones, and convolutions and BatchNorm then run several times slower.
class _Take(torch.autograd.Function):
    """Some samples (K, ...) of a batch (N, ...), by their indices (K,)."""

    @staticmethod
    def forward(x: Tensor, indices: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _take(x, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.indices = inputs[1]
        ctx.num_samples = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        dims, back = _memory_order(grad)
        grad = grad.permute(dims)
        full = grad.new_zeros(ctx.num_samples, *grad.shape[1:]).index_add_(0, ctx.indices, grad)
        return full.permute(back), None


class _TakeAndCarry(torch.autograd.Function):
    """Some samples (K, ...) of a batch (N, ...), and the batch itself, if both are used.

    Their gradients meet here: those of the samples are added to that of the batch without building a batch of zeros.
    """

    @staticmethod
    def forward(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _take(x, indices), x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.indices = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        of_samples, of_batch = grad_outputs
        dims, back = _memory_order(of_batch)
        total = of_batch.permute(dims).index_add(0, ctx.indices, of_samples.permute(dims))
        return total.permute(back), None


class _AddSamples(torch.autograd.Function):
    """A batch (N, ...) plus `factor` times other samples (K, ...), added to those with the indices (K,)."""

    @staticmethod
    def forward(batch: Tensor, samples: Tensor, indices: Tensor, factor: float) -> Tensor:  # pyright: ignore
        dims, _ = _memory_order(batch)
        dtype = torch.promote_types(batch.dtype, samples.dtype)  # As in the plain sum, for example under autocast.
        result = batch.to(dtype, copy=True)
        result.permute(dims).index_add_(0, indices, samples.to(dtype).permute(dims), alpha=factor)
        return result  # Not a view: later code may change it in place.

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        batch, samples, ctx.indices, ctx.factor = inputs
        ctx.dtypes = batch.dtype, samples.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        of_batch, of_samples = ctx.dtypes
        taken = _take(grad, ctx.indices).to(of_samples)
        return grad.to(of_batch), taken if ctx.factor == 1.0 else taken.mul_(ctx.factor), None, None


def _take(batch: Tensor, indices: Tensor) -> Tensor:
    dims, back = _memory_order(batch)
    return batch.permute(dims).index_select(0, indices).permute(back)


def _memory_order(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Dimensions from the outermost in memory to the innermost, samples first; and the permutation back."""
    dims = [0, *sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)]
    return dims, [dims.index(dim) for dim in range(tensor.dim())]
