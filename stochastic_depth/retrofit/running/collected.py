"""Outputs that transformers collects by hooks on modules inside a block: attention maps, logits of routers."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from stochastic_depth.torch_private import hooks_of

MASKED = "transformers collects outputs of its modules in this call, such as attention maps or logits of routers"
"""Why such a block is masked."""


def are_collected(block: nn.Module) -> bool:
    """Whether outputs of modules inside a block are collected in this call.

    A branch that does not run, or runs on some of the samples, would leave them out, and those of other layers would
    take their places. Hidden states, which are outputs of whole layers, are there in any case.
    """
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    if not collected or all("hidden_states" in key for key in collected):
        return False
    return any(
        getattr(hook, "__module__", "") == capturing.__name__
        for module in block.modules()
        if module is not block
        for hooks in hooks_of(module)
        for hook in hooks.values()
    )
