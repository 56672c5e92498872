"""Keeps draws out of torch.compile, torch.export and CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from stochastic_depth.torch_private import compiler_of_frames, outside_compiler

Function = TypeVar("Function", bound=Callable[..., Any])


def graph_break(function: Function, *, recursive: bool, exported: Callable[..., Any] | None = None) -> Function:
    """Keep `function` out of the graphs of torch.compile, but not out of exports.

    torch.compile must never see a draw, because it would freeze it. Exported models are in evaluation mode and draw
    nothing.

    Args:
        function: the function.
        recursive: whether the functions that it calls stay out too.
        exported: replaces the function in an export; None: the function itself.
    """
    outside = outside_compiler(function, recursive=recursive)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return ((exported or function) if torch.compiler.is_exporting() else outside)(*args, **kwargs)
        # PyTorch's way out of compilation takes several microseconds per call and is not needed here.
        return (function if compiler_of_frames() is None else outside)(*args, **kwargs)

    return cast(Function, either)


eager = functools.partial(graph_break, recursive=True)


def is_capturing() -> bool:
    """Whether the running code is being captured as a CUDA graph, which repeats it without Python."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
