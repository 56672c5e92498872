"""Remembers small example calls of a model, on which results after training are checked."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import eager, is_capturing
from stochastic_depth.retrofit.code.signatures import PLAIN_TYPES
from stochastic_depth.torch_private import disable_current_modes, is_transformed, tree_flatten, tree_unflatten

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a call, by position and by name."""

_NUM_FORMS = 4
_NUM_SAMPLES = 2
_KEPT_WHOLE = 4 * 2**20  # bytes
_MOST_KEPT = 64 * 2**20


class RememberedCalls:
    """The arguments of a model's first forwards in each mode, one of each form, copied; large ones cut to two samples.

    They stay in this process: copies and pickles of the model, which may be shared, contain none.
    """

    def __init__(self) -> None:
        self._calls: dict[bool, list[tuple[Any, Call | None]]] = {True: [], False: []}
        self._is_paused = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_calls": {True: [], False: []}, "_is_paused": False}

    @contextmanager
    def paused(self) -> Generator[None]:
        """Context in which calls are not remembered, because they are trials."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @eager
    def note(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a successful call of the root, if it is the first of its form in its mode."""
        calls = self._calls[root.training]
        if len(calls) == _NUM_FORMS or self._is_paused or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return
        form = form_of_call(args, kwargs)
        if is_capturing() or any(form == known for known, _ in calls):
            return
        # Counters of operations and inference mode must not affect the copies.
        with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            calls.append((form, _copied(args, kwargs)))

    def evaluation_first(self) -> list[Call]:
        """The calls: first evaluation, then training."""
        return [call for mode in (False, True) for _, call in self._calls[mode] if call is not None]


def form_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The structure of a call's arguments: which are given, with switches and names, but not sizes and numbers."""
    leaves, structure = tree_flatten((args, kwargs))
    return structure, [leaf if isinstance(leaf, (bool, str)) or leaf is None else type(leaf) for leaf in leaves]


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The arguments, cut and copied; None if they are too large or contain more than tensors and plain values."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(_is_copyable(leaf) for leaf in leaves):
        return None
    num_samples = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 0)
    is_cut = sum(tensor.nbytes for tensor in tensors) > _KEPT_WHOLE and num_samples > _NUM_SAMPLES

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[:_NUM_SAMPLES] if is_cut and leaf.dim() and leaf.shape[0] == num_samples else leaf

    kept = [cut(leaf) for leaf in leaves]
    if sum(leaf.nbytes for leaf in kept if isinstance(leaf, Tensor)) > _MOST_KEPT:
        return None
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in kept], structure)


def _is_copyable(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return isinstance(leaf, PLAIN_TYPES)
    is_own_kind = type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided and not leaf.is_nested
    return is_own_kind and not leaf.is_meta and not is_transformed(leaf)
