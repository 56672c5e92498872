"""Runs a block's own code and records it, as a graph of calls to its children and to PyTorch.

The code sees real tensors, so `isinstance`, sizes of intermediate values, the gradient mode, autocast and all decisions
that depend on them are those of the call. A recording is valid only for calls of the same form. Children are single
calls. Code that a recording could not repeat is refused: decisions that depend on the values of tensors, random
numbers, side effects, tensors of unknown origin.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from stochastic_depth.retrofit.code.called import watched
from stochastic_depth.retrofit.code.effects import check_arguments, containers_in, contents_of, stores_of
from stochastic_depth.retrofit.code.surroundings import unchanged_surroundings
from stochastic_depth.retrofit.recording.edits import Edits
from stochastic_depth.retrofit.recording.recorder import Recorder
from stochastic_depth.retrofit.recording.scripted import scripted_children_called


@dataclass
class Run:
    """A run of a block's code.

    Attributes:
        output: its return value.
        graph: its operations. Targets are relative to the block; placeholders are the opaque arguments in order. The
            metadata of a node has the number of its `call`, the `shape` of a tensor, the `order` of its dimensions in
            memory, these of the `items` of a tuple or list, the nodes that it `writes`, and what a child `stores`.
        called: paths of the children, parameters and buffers that were used.
        stores: plain numbers that the code set on the block.
        constants: tensors that existed before and that other objects hold.
        asks_for_sizes: whether the code asked for the size of a value, so that it may do something else for another.
        telling: paths of the children that gave plain values, such as a factor or a size.
    """

    output: Any
    graph: fx.Graph
    called: set[str]
    stores: dict[str, Any]
    constants: list[Tensor]
    asks_for_sizes: bool
    telling: set[str]


def run_block(
    block: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaves: Sequence[Any],
    edits: Edits | None = None,
    inlined: Collection[str] = (),
) -> Run:
    """Run a stand-in's own code and record it.

    Args:
        block: from `stand_in`.
        args: arguments of the call.
        kwargs: arguments by name.
        leaves: those of its tensors and objects that the recording treats as arguments, in order.
        edits: calls to change, by their numbers.
        inlined: paths of the children whose own code is recorded as a part of the block's.

    Raises:
        ChangedObjectError: if the code changes its arguments.
        StoredError: if it stores anything else on the block or on its arguments.
        TraceError: if it cannot be recorded for another reason.
    """
    recorder = Recorder(block, leaves, edits or {}, inlined)
    before = contents_of(block, (args, kwargs))
    with (
        unchanged_surroundings(block, inlined, recorder.arguments),
        recorder.watching(block),
        watched(recorder.called_objects, recorder),
    ):
        output = block.forward(*args, **kwargs)
    recorder.check_outside()
    recorder.end(output)
    after = contents_of(block, (args, kwargs))
    check_arguments(before, after, list(containers_in((args, kwargs))))
    stores = stores_of(before, after, recorder.changed_by_children)
    return Run(
        output,
        recorder.graph,
        recorder.called,
        stores,
        recorder.constants,
        recorder.asks_for_sizes,
        recorder.telling,
    )


def run_with_edits(
    block: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaves: Sequence[Any],
    edits: Edits,
    inlined: Collection[str] = (),
) -> Any:
    """The result of a block's own code, on the block itself, with some of its calls changed.

    Args:
        block: the block.
        forward: its own code.
        args: arguments of the call.
        kwargs: arguments by name.
        leaves: those of its tensors and objects that the recording treats as arguments, in order.
        edits: calls to change, by their numbers.
        inlined: see `run_block`.
    """
    with scripted_children_called(block):
        recorder = Recorder(block, leaves, edits, inlined, is_recording=False)
        with recorder.watching(block), watched(recorder.called_objects, recorder):
            return forward(*args, **kwargs)
