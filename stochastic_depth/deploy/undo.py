"""Restores a model after a failed change or a trial forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.cost import undisturbed

_CONTAINERS = (dict, OrderedDict, list, set)


class Snapshot:
    """Classes and attributes of all modules of a model, including hooks, to be restored.

    Values of tensors are kept only for those passed to `keep_values`; containers are kept one level deep.

    Args:
        model: the model.
        others: other objects whose attributes belong to it.
    """

    def __init__(self, model: nn.Module, others: Iterable[object] = ()) -> None:
        owners: list[Any] = [*model.modules(), *others]
        self._kept = [(owner, type(owner), dict(owner.__dict__), _contents(owner.__dict__)) for owner in owners]
        self._values: list[tuple[Tensor, Tensor]] = []

    def keep_values(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values of these tensors too, which are about to change."""
        self._values += [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def put_back_(self) -> None:
        """Restore everything."""
        for owner, kind, attributes, contents in self._kept:
            if type(owner) is not kind:
                object.__setattr__(owner, "__class__", kind)  # `classes.set_class_`, for any object
            for name in owner.__dict__.keys() - attributes.keys():
                del owner.__dict__[name]
            owner.__dict__.update(attributes)
            for own, content in contents:
                if _is_unchanged(own, content):  # other threads must not see it empty for a moment
                    continue
                if type(own) is list:
                    own[:] = content
                else:
                    own.clear()
                    own.update(content)
        for tensor, value in reversed(self._values):
            tensor.copy_(value)


def _is_unchanged(own: Any, content: Any) -> bool:
    if type(own) is set:
        return own == content
    if len(own) != len(content):
        return False
    if type(own) is list:
        return all(a is b for a, b in zip(own, content, strict=True))
    return all(a == b and own[a] is content[b] for a, b in zip(own, content, strict=True))


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in attributes.values() if type(value) in _CONTAINERS]


@contextmanager
def without_traces(model: nn.Module) -> Generator[None]:
    """Context that restores the modules' attributes, modes and buffers, and all random states of this process.

    Other effects of a forward stay: in objects that the modules hold, and whatever hooks write.
    """
    before = Snapshot(model)
    try:
        with undisturbed(model):
            yield
    finally:
        before.put_back_()
