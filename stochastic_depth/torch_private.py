"""The private PyTorch calls of the library: what each is for, and what breaks without it. The tests pin them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore

_autograd = torch._C._autograd  # pyright: ignore


# ------------------------------------------------------------------------------------------ the autograd graph


class Node(Protocol):
    """A node of the autograd graph."""

    def name(self) -> str:
        """Name of its class."""
        ...


def evaluated_node() -> Node | None:
    """The autograd node whose backward is being computed in this thread, None outside a backward.

    A recomputation in a reentrant checkpoint is recognized by it. Compiled autograd evaluates no nodes.
    """
    return torch._C._current_autograd_node()  # pyright: ignore


graph_task: Callable[[], int] = torch._C._current_graph_task_id  # pyright: ignore
"""The number of the backward that runs in this thread, -1 outside one; compiled autograd has one too.

Without it a recomputation would be taken for a new forward, which draws new gates.
"""


def number_of(node: Node) -> int:
    """Number of a node: each thread numbers its nodes in the order of their creation.

    It tells in which forward of its thread a node was made.
    """
    return node._sequence_nr()  # pyright: ignore


def next_node() -> int:
    """Number that the next autograd node of this thread gets: where a forward begins and ends among the nodes."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore


def is_reentrant_checkpoint(node: Node) -> bool:
    """Whether a node is that of a reentrant checkpoint, which PyTorch makes just before it runs the function."""
    return node.name() == "CheckpointFunctionBackward"


# ------------------------------------------------------------------------------------------ saved tensors, checkpoints

top_saved_tensors_hooks: Callable[[bool], tuple[Any, Any] | None] = _autograd._top_saved_tensors_default_hooks
"""The innermost `saved_tensors_hooks` of this thread; the argument is True. There is no public way to see them."""


def saves_as_usual() -> bool:
    """Whether what runs now is no recomputation, and nobody else decides how what it saves for its backward is kept.

    A recording of a branch, and samples that are not kept twice, would interfere with other hooks.
    """
    return (
        evaluated_node() is None
        and _autograd._saved_tensors_hooks_is_enabled()
        and _autograd._top_saved_tensors_default_hooks(True) is None
    )


class Checkpoint(NamedTuple):
    """A non-reentrant checkpoint that is running.

    Attributes:
        frame: PyTorch's object for it, the same in its forward and in its recomputation.
        repeats: whether it is its recomputation that runs.
    """

    frame: object
    repeats: bool


def innermost_checkpoint() -> Checkpoint | None:
    """The checkpoint whose hooks are the innermost of this thread; None if there are none, or somebody else's."""
    hooks = top_saved_tensors_hooks(True)
    return None if hooks is None else _checkpoint_of(hooks[0])


def running_checkpoints() -> list[Checkpoint]:
    """The non-reentrant checkpoints that this thread runs in, innermost first.

    PyTorch's object for a checkpoint is the one exact mark that a forward shares with its recomputation. It is found in
    the closure of the checkpoint's hooks. Only the innermost hooks can be seen: the others are seen by taking hooks off
    and putting them back.
    """
    found: list[Checkpoint] = []
    taken: list[tuple[Any, Any]] = []
    try:
        while (hooks := top_saved_tensors_hooks(True)) is not None:
            _autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
            checkpoint = _checkpoint_of(hooks[0])
            if checkpoint is not None:
                found.append(checkpoint)
    finally:
        for hooks in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(*hooks)
    return found


def _checkpoint_of(pack: Any) -> Checkpoint | None:
    # PyTorch 2.13 keeps the hook of the recomputation out of compilation; the hook itself is inside.
    pack = getattr(pack, "_torchdynamo_orig_callable", pack)
    owner = getattr(pack, "__qualname__", "").partition(".")[0]
    if owner not in ("_checkpoint_hook", "_recomputation_hook"):
        return None
    held = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    if owner == "_checkpoint_hook":
        return Checkpoint(held["frame"].cell_contents, repeats=False)
    return Checkpoint(held["target_frame_ref"].cell_contents(), repeats=True)


# ------------------------------------------------------------------------------------------ compilers, modes


compiler_of_frames: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore
"""What compiles the Python frames that this thread enters, None where nothing does.

Asking costs less than PyTorch's way out of compilation, which is only taken where there is something to get out of.
"""


def outside_compiler(function: Callable[..., Any], *, recursive: bool) -> Callable[..., Any]:
    """`function`, not compiled; what it calls is compiled unless `recursive`. The public form is always recursive."""
    return torch._disable_dynamo(function, recursive=recursive)  # pyright: ignore


def _is_never_exporting() -> bool:
    return False


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", _is_never_exporting)
"""Whether torch.export is tracing. The name is public, but PyTorch 2.6 does not have it and cannot tell."""


disable_current_modes = cast("Callable[[], Any]", _disable_current_modes)
"""Within, no FLOP counter or other dispatch mode sees what runs."""
