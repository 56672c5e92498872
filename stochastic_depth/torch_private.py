"""Every private PyTorch name that the library uses, why, and what breaks without it.

No other module uses one. `tests/library/test_torch_private.py` has a test for each, which fails first when PyTorch
changes it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils.checkpoint import _StopRecomputationError

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


def keeps_its_result(tensor: Tensor) -> bool:
    """Whether the function that made a tensor keeps it for its backward, as ReLU does.

    Without it, samples that were taken from such a tensor would be kept twice.
    """
    return hasattr(type(tensor.grad_fn), "_saved_result")


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place.

    Without it, a branch that changes its input in place would compute wrong sums, and nothing would tell.
    """
    return tensor._version


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """What `function.apply` does, without binding the arguments to their names.

    The binding takes 40 to 60 us of each call, more than the rest of a gate. A step of a ResNet-110 makes 108 calls.
    """
    if torch.compiler.is_compiling() or transforms_are_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore


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


EndOfRecomputation = _StopRecomputationError
"""What ends the recomputation of a non-reentrant checkpoint early. A recording would take it for an error."""


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
    """`function`, not compiled; what it calls is compiled unless `recursive`.

    The public `torch.compiler.disable` does the same, but imports the compiler at once, which would make
    `import stochastic_depth` take seconds longer.
    """
    return torch._disable_dynamo(function, recursive=recursive)  # pyright: ignore


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled: wrapped by `torch.compile(module)`, or in place by `module.compile()`.

    Without it, a compiled model would be made stochastic, and its graph would go on without gates.
    """
    return is_compiled_wrapper(module) or module._compiled_call_impl is not None


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile(module)` gives; its calls are those of the module inside."""
    return hasattr(module, "_orig_mod")


# TorchDispatchMode, imported above, sees every operation: FLOPs and memory are counted with it. PyTorch documents it in
# a private module.

current_dispatch_mode = cast("Callable[[], object]", _get_current_dispatch_mode)
"""The innermost mode that sees operations, None without one. A selective checkpoint would be taken for a plain one."""

disable_current_modes = cast("Callable[[], Any]", _disable_current_modes)
"""Within, no FLOP counter or other dispatch mode sees what runs. A dry run would be counted without it."""


without_torch_function: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""Within, no mode that replaces PyTorch's functions sees what runs.

A proof holds noise still by such a mode. Without this, the draws of gates and of samples would be held still too.
"""


# ------------------------------------------------------------------------------------------ torch.func


transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore
"""Whether `vmap` or `grad` of `torch.func` is transforming what runs: `apply` would skip what makes them work."""


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is one of `torch.func`'s, which has no memory of its own that a copy could be made of."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore


@contextmanager
def outside_transforms() -> Generator[None]:
    """Within, `vmap` and `grad` of `torch.func` do not see what runs; a proof within one would be a part of it.

    They forbid hooks of saved tensors, by which a proof sees what is changed in place: within, hooks are allowed.
    """
    if not transforms_are_active():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    message = _autograd._saved_tensors_hooks_get_disabled_error_message()
    with temporarily_clear_interpreter_stack():
        _autograd._saved_tensors_hooks_enable()
        try:
            yield
        finally:
            if message is not None:
                _autograd._saved_tensors_hooks_disable(message)


# ------------------------------------------------------------------------------------------ modules

MODULE_ATTRIBUTES = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
"""The attributes that every module has, which say nothing of how its own code computes."""

TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")
"""Names of the dictionaries below among a module's attributes."""

HOOKS = tuple(
    name for name in vars(nn.Module()) if "forward" in name or name in ("_backward_hooks", "_backward_pre_hooks")
)
"""Names of the dictionaries of the hooks that run with a module's forward and backward, and of how they are called."""


def call_instead(module: nn.Module, call: Callable[..., Any]) -> None:
    """Let a call of a module be this function: the hooks of the process would count what runs for a proof only."""
    module.__dict__["_compiled_call_impl"] = call


def call_with_own_hooks(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of a module with its own hooks and without those of the process."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if number in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        else:
            changed = hook(module, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    output = module.forward(*args, **kwargs)
    for number, hook in list(module._forward_hooks.items()):
        given = (args, kwargs) if number in module._forward_hooks_with_kwargs else (args,)
        changed = hook(module, *given, output)
        output = output if changed is None else changed
    return output


def parameter_dict(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary of a module's own parameters.

    The public iterators are too slow for each step, pass over repeated ones, and cannot replace one.
    """
    return module._parameters


def buffer_dict(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary of a module's own buffers, see `parameter_dict`."""
    return module._buffers


def child_dict(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary of a module's children. `named_children` passes over a child that is held twice."""
    return module._modules


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """The dictionaries of the hooks that run with a module's forward and backward.

    Nothing public lists them. Without them, a branch with hooks would be replayed, folded or copied, and its hooks
    would not run, or run in a dry run.
    """
    return [getattr(module, name) for name in _HOOKS]


def pre_hook_dict(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The dictionary of the hooks that run before a module's forward. Weight norm and pruning live in it."""
    return module._forward_pre_hooks


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run with a module's forward: a weight that they use or change cannot be folded into."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


BatchNorm = _BatchNorm
"""The class that every batch normalization is derived from, those of other libraries as well."""

InstanceNorm = _InstanceNorm
"""The same for instance normalization; the public classes have one number of dimensions each."""

RunningNorm = _NormBase
"""The base of both: what may have running statistics."""


# ------------------------------------------------------------------------------------------ tensors and structures


def storage_number(tensor: Tensor) -> int:
    """A number of the memory that a tensor lies in, shared with its views.

    Not `data_ptr()`, which is 0 for all tensors on the meta device. Without it, activations would be counted twice.
    """
    return tensor.untyped_storage()._cdata


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no data, as under torch.export: a stand-in cannot take its values from it."""
    return isinstance(tensor, FakeTensor)


foreach_zero_: Callable[[list[Tensor]], None] = torch._foreach_zero_
"""Fills many tensors with zeros at once: a GPU would be called for each parameter of a closed branch without it."""

foreach_copy_: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_
"""Copies many tensors at once, see `foreach_zero_`."""

tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
"""The leaves of nested lists, tuples, dictionaries and what PyTorch's users have registered, such as model outputs.

PyTorch's own is used, because models register their output classes there; the public form came after PyTorch 2.8.
"""

tree_map: Callable[[Callable[[Any], Any], Any], Any] = _pytree.tree_map
"""The same structure with a function of each leaf, see `tree_leaves`."""

tree_map_only: Callable[[type, Callable[[Any], Any], Any], Any] = _pytree.tree_map_only
"""The same structure with a function of the leaves of one type, see `tree_leaves`."""

tree_flatten: Callable[[Any], tuple[list[Any], Any]] = _pytree.tree_flatten
"""The leaves of a structure and its form, see `tree_leaves`."""

tree_unflatten: Callable[[Sequence[Any], Any], Any] = _pytree.tree_unflatten
"""The structure of this form with these leaves, see `tree_leaves`."""

assert_in_graph: Callable[[Any, str], None] = torch._assert
"""An assertion that `torch.fx` records: a smaller network would accept inputs that its code was not recorded for."""


# ------------------------------------------------------------------------------------------ many processes


def keys_of_fsdp() -> tuple[str, str]:
    """Under which names FSDP2 keeps its state in a module. A dry run would copy it, which fails."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return REGISTRY_KEY, STATE_KEY


def running_ddp() -> DistributedDataParallel | None:
    """The `DistributedDataParallel` whose forward runs.

    The model cannot see its wrapper. Without it, settings of the wrapper that do not work with gates would not be
    refused.
    """
    return DistributedDataParallel._get_active_ddp_module()
