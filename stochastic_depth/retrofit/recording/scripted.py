"""Scripted children of a block (`torch.jit.script`), which take no hooks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stochastic_depth.torch_private import child_dict


class Scripted(nn.Module):
    """A plain module that calls a scripted one, with the same parameters and buffers.

    Args:
        scripted: the scripted module.
        quiet: whether it runs as in evaluation: its noise cannot be turned off otherwise.
    """

    def __init__(self, scripted: torch.jit.ScriptModule, *, quiet: bool = False) -> None:
        super().__init__()
        self.training = scripted.training
        self.__dict__["_quiet"] = quiet
        # Not as a child, whose attributes are in C++.
        self.__dict__["_scripted"] = scripted
        self.__dict__["_parameters"] = dict(scripted.named_parameters())
        self.__dict__["_buffers"] = dict(scripted.named_buffers())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the scripted module."""
        scripted: torch.jit.ScriptModule = self.__dict__["_scripted"]
        if not self.__dict__["_quiet"]:
            return scripted(*args, **kwargs)
        modes = [(module, module.training) for module in scripted.modules()]
        scripted.eval()
        try:
            return scripted(*args, **kwargs)
        finally:
            for module, training in modes:  # A part of it may be frozen.
                module.training = training

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scripted"], name)


@contextmanager
def scripted_children_called(block: nn.Module) -> Generator[None]:
    """Context in which a block calls its scripted children through modules that take hooks."""
    swapped = [
        (child_dict(parent), name, child)
        for parent in block.modules()
        if not isinstance(parent, torch.jit.ScriptModule)
        for name, child in child_dict(parent).items()
        if isinstance(child, torch.jit.ScriptModule)
    ]
    made = {id(child): Scripted(child) for _, _, child in swapped}
    try:
        for children, name, child in swapped:
            children[name] = made[id(child)]
        yield
    finally:
        for children, name, child in swapped:
            children[name] = child
