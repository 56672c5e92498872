"""Counts the bytes that a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from stochastic_depth.torch_private import TorchDispatchMode, storage_number, tree_leaves


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the tensors that a forward pass created and that still exist when it has ended.

    The forward pass runs unchanged, unlike under `torch.autograd.graph.saved_tensors_hooks`.

    Args:
        forward: returns the start of the backward pass, such as the loss, which counts too.
    """
    with _Storages() as storages:
        output = forward()
    # As long as the output is alive, so is what its backward pass needs.
    kept = sum(num_bytes for storage, num_bytes in storages.met.values() if not storage.expired())
    del output
    return kept


class _Storages(TorchDispatchMode):
    """Records the storages that operators use without keeping them alive; those they did not make count 0 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # the last operation of `torch.tensor`, whose argument is new
            self._note_storages((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._note_storages(result, made=True)
        return result

    def _note_storages(self, tensors: Any, *, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # Unique as long as a reference exists.
                number = storage_number(tensor)
                self.met.setdefault(number, (StorageWeakRef(storage), storage.nbytes() if made else 0))
