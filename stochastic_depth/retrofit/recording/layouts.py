"""The order in which the dimensions of a tensor lie in memory, which a sum takes from its first operand."""

from __future__ import annotations

import torch
from torch import Tensor


def order_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of more than one entry, from the outermost to the innermost; None if there is no such order."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    dims = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    strides = tensor.stride()
    is_dense = all(strides[dim] for dim in dims)
    # What is expanded is written out in the usual order.
    return tuple(sorted(dims, key=lambda dim: -strides[dim])) if is_dense else tuple(dims)


def in_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The tensor with its dimensions in this order in memory."""
    if order_of(tensor) == order:
        return tensor
    dims = (*[dim for dim in range(tensor.dim()) if dim not in order], *order)
    return tensor.permute(dims).contiguous().permute([dims.index(dim) for dim in range(tensor.dim())])
