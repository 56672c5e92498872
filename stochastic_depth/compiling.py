"""Keeps draws out of torch.compile, torch.export, torch.fx and CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

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


def call_in_trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy | None:
    """The call of a stochastic module in a trace of `torch.fx`; None if nothing is traced.

    It is one node of the graph, as for PyTorch's own modules, so that gates are drawn whenever the graph runs.

    Raises:
        RuntimeError: if it is the traced module itself.
    """
    proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
    if proxy is None:
        return None
    path = cast(Any, proxy.tracer).path_of_module(module)
    if not path:
        raise RuntimeError(
            f"torch.fx cannot trace a {type(module).__name__} that is itself stochastic: its gates would be frozen. "
            "Trace a model around it, or call restore_ or fold_ on a copy first."
        )
    return proxy.tracer.create_proxy("call_module", path, args, kwargs)
