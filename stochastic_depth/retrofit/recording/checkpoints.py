"""Activation checkpoints inside a block: code that was recorded in a checkpoint runs in one after rewriting."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.torch_calls import ReadValues
from stochastic_depth.torch_private import current_dispatch_mode, innermost_checkpoint, top_saved_tensors_hooks

_Compile = Callable[[fx.Graph, str], Callable[..., Any]]


class Regions:
    """Identifies the checkpoint in which the recorded code runs, by a number in the order of first calls.

    The reference of a proof is code with changed calls, and a recomputation would not repeat the changes. So saved
    tensors are kept here, and nothing is recomputed.
    """

    def __init__(self) -> None:
        self._base = top_saved_tensors_hooks(True)
        self._frames: list[object] = []

    def now(self) -> int | None:
        """The number of the innermost checkpoint; None outside.

        Raises:
            TraceError: if it is a kind that cannot be repeated.
        """
        if top_saved_tensors_hooks(True) == self._base:
            return None
        found = innermost_checkpoint()
        if found is None or found.repeats:
            raise TraceError("the forward sets its own hooks for saved tensors")
        if not isinstance(current_dispatch_mode(), ReadValues):
            raise TraceError("a part of the forward runs inside a selective activation checkpoint")
        if not any(frame is found.frame for frame in self._frames):
            self._frames.append(found.frame)
        return next(index for index, frame in enumerate(self._frames) if frame is found.frame)


@contextmanager
def kept() -> Generator[None]:
    """Context in which tensors saved for the backward are kept and not recomputed."""
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        yield


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Node(Protocol):
    meta: dict[str, Any]


def region_of(node: _Node) -> int | None:
    """The checkpoint in which a node was recorded."""
    return node.meta.get("checkpoint")


def put_in_checkpoints(graph: fx.Graph, compile_: _Compile, description: str) -> None:
    """Put each sequence of nodes that was recorded in one checkpoint into a checkpoint.

    Args:
        graph: it is changed.
        compile_: makes code `(block, *inputs)` of a graph.
        description: description of the graph.
    """
    for nodes in _runs(graph):
        inside = set(nodes)
        inputs = list(dict.fromkeys(used for node in nodes for used in node.all_input_nodes if used not in inside))
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        part = fx.Graph()
        copies = {node: part.placeholder(f"input_{index}") for index, node in enumerate(inputs)}
        for node in nodes:
            copies[node] = part.node_copy(node, copies.__getitem__)
        part.output(tuple(copies[node] for node in outputs))
        code = compile_(part, f"{description}, a checkpoint")
        with graph.inserting_before(nodes[0]):
            call = graph.call_function(_Checkpointed(code), tuple(inputs))
            call.meta["takes_block"] = True
            for index, node in enumerate(outputs):
                own = graph.call_function(operator.getitem, (call, index))
                own.meta.update(
                    {key: value for key, value in node.meta.items() if key not in ("takes_block", "checkpoint")}
                )
                node.replace_all_uses_with(own, delete_user_cb=lambda user: user not in inside)  # noqa: B023
        for node in reversed(nodes):
            graph.erase_node(node)


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    runs: list[list[fx.Node]] = []
    last: int | None = None
    for node in graph.nodes:
        region = None if node.op in ("placeholder", "output") else region_of(cast(_Node, node))
        if region is not None:
            if region != last:
                runs.append([])
            runs[-1].append(node)
        last = region
    return [nodes for nodes in runs if any(node.op != "get_attr" for node in nodes)]


class _Checkpointed:
    """Runs code in an activation checkpoint."""

    def __init__(self, code: Callable[..., Any]) -> None:
        self._code = code
        self.__name__ = "checkpointed"

    def __call__(self, block: Any, *inputs: Any) -> Any:
        """Run the code."""
        return checkpoint(self._code, block, *inputs, use_reentrant=False)
