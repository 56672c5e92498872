"""What a forward keeps for its backward, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from stochastic_depth.torch_private import TorchDispatchMode, storage_number, tree_leaves


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the tensors that a forward made and that are still there when it has ended.

    The forward runs as it would unobserved, unlike under `torch.autograd.graph.saved_tensors_hooks`.

    Args:
        forward: gives what the backward starts from, such as the loss, which counts too.
    """
    with _Storages() as storages:
        output = forward()
    # Only while the output is alive is what its backward needs.
    kept = sum(num_bytes for storage, num_bytes in storages.met.values() if not storage.expired())
    del output
    return kept


class _Storages(TorchDispatchMode):
    """Remembers the memory that operations meet, without holding it: what they make with its bytes, other with 0."""

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # which `torch.tensor` ends with: its argument is new
            self._meet((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._meet(result, made=True)
        return result

    def _meet(self, tensors: Any, *, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # As long as it is referred to, no other has its number.
                number = storage_number(tensor)
                self.met.setdefault(number, (StorageWeakRef(storage), storage.nbytes() if made else 0))
