"""Values that a child computes and leaves behind for code that may be anywhere, such as a loss in a global list.

A branch that does not run leaves no such value, and code that needs it computes something else than under a mask.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.retrofit.code.held import tensors_in
from stochastic_depth.torch_private import base_of, tree_leaves

# How deep a child's output and the objects it is given are searched.
_MAX_DEPTH = 5


class Intermediates:
    """The intermediate values of a call, as long as anything holds them. Only values that have a gradient count."""

    def __init__(self) -> None:
        self._values: list[weakref.ref[Tensor]] = []

    def note(self, result: Any) -> None:
        """Note the result of a function that the call has run."""
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                self._values.append(weakref.ref(value))

    def are_left(self, given: Any, output: Any, block: nn.Module, objects: Iterable[Any]) -> bool:
        """Whether anything but the output holds one of them after the call.

        What is stored on the block's own modules, or in a list that the block is given, is noticed elsewhere.

        Args:
            given: the arguments of the call; in their lists, the block itself finds values that it uses.
            output: what the call has returned.
            block: the block that made the call.
            objects: arguments whose methods are called, such as a cache, which may hold more than single numbers.
        """
        if not self._values:
            return False
        outputs = [tensor for _, tensor in tensors_in(output, _MAX_DEPTH)]
        outputs += [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        known = {id(leaf) for leaf in (*outputs, *tree_leaves(given))}
        known |= {id(base_of(tensor)) for tensor in outputs}
        known |= {id(value) for module in block.modules() for value in module.__dict__.values()}
        cached = {id(tensor) for each in objects for _, tensor in tensors_in(each, _MAX_DEPTH) if tensor.dim()}
        if not self._are_held(known | cached, outputs):
            return False
        gc.collect()  # What only a cycle held. It is slow in a process with many objects, and rarely needed.
        return self._are_held(known | cached, outputs)

    def _are_held(self, known: set[int], outputs: Sequence[Tensor]) -> bool:
        """Whether anything holds values that are not known; it holds none itself once it has returned."""
        values = (reference() for reference in self._values)  # no list, which would be one of the holders
        held = tuple(value for value in values if value is not None and id(value) not in known)
        if not held:
            return False
        # What the output is computed from may be held by autograd too.
        needed = _ancestors(outputs)
        return any(value.grad_fn not in needed for value in held) or _are_in_containers(held)


def _ancestors(outputs: Iterable[Tensor]) -> set[Any]:
    """The nodes of autograd that outputs are computed by."""
    found: set[Any] = set()
    pending: list[Any] = [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += [each for each, _ in node.next_functions]
    return found


def _are_in_containers(values: Sequence[Tensor]) -> bool:
    """Whether a list, set or dictionary holds one of them, other than the attributes of an autograd.Function."""
    holders = [holder for holder in gc.get_referrers(*values) if isinstance(holder, (list, set, deque, dict))]
    of_autograd = torch.autograd.function.FunctionCtx
    return any(not any(isinstance(each, of_autograd) for each in gc.get_referrers(holder)) for holder in holders)
