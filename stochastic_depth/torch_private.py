"""All private PyTorch names that the library uses, why, and what breaks without them.

No other module uses private names. `tests/library/test_torch_private.py` has a test for each, which fails first when
PyTorch changes it.
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
from torch.nn.utils import parametrize
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
    """The autograd node whose backward this thread computes; None outside a backward.

    It identifies a recomputation in a reentrant checkpoint. Compiled autograd evaluates no nodes.
    """
    return torch._C._current_autograd_node()  # pyright: ignore


graph_task: Callable[[], int] = torch._C._current_graph_task_id  # pyright: ignore
"""The number of the backward that runs in this thread, -1 outside one; compiled autograd has one too.

Without it, a recomputation would look like a new forward and draw new gates.
"""


def number_of(node: Node) -> int:
    """Number of a node. Each thread numbers its nodes in the order of their creation.

    It shows which forward of its thread created a node.
    """
    return node._sequence_nr()  # pyright: ignore


def next_node() -> int:
    """Number of the next autograd node of this thread, which marks where a forward begins and ends."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore


def keeps_its_result(tensor: Tensor) -> bool:
    """Whether the function that made a tensor saves it for its backward, as ReLU does.

    Without it, samples gathered from such a tensor would be stored twice.
    """
    return hasattr(type(tensor.grad_fn), "_saved_result")


def mend_gradients_of_batch_norms(output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Give gradients of the BatchNorms between inputs and output of one sample the strides of channels-last images.

    Without it, PyTorch's kernel for CPUs computes wrong gradients of a single sample if either its input or its
    gradient comes from tokens, `(1, H * W, C)`: the stride of the samples, which no element uses, is then another
    (seen with PyTorch 2.8, 2.11 and 2.13). With these strides, they are right for inputs of any.
    """
    pending, seen = [output.grad_fn], {each.grad_fn for each in inputs}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "BatchNorm" in node.name():
            node.register_prehook(_with_channels_last)
        pending += [following for following, _ in node.next_functions]


def _with_channels_last(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad, *rest = grads
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if grad is None or grad.dim() not in formats:
        return tuple(grads)
    return torch.empty_like(grad, memory_format=formats[grad.dim()]).copy_(grad), *rest


def version_of(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor.

    Without it, a branch that changes its input in place would silently compute wrong sums.
    """
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that a view is of; None for other tensors.

    Without it, the base of a view that a child returns would look like a value that the child leaves behind.
    """
    return tensor._base


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply` without binding the arguments to their names.

    The binding takes 40 to 60 us of each call, more than the rest of a gate. A step of a ResNet-110 makes 108 calls.
    """
    if torch.compiler.is_compiling() or transforms_are_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore


def is_reentrant_checkpoint(node: Node) -> bool:
    """Whether a node belongs to a reentrant checkpoint. PyTorch creates it just before it runs the function."""
    return node.name() == "CheckpointFunctionBackward"


# ------------------------------------------------------------------------------------------ saved tensors, checkpoints

top_saved_tensors_hooks: Callable[[bool], tuple[Any, Any] | None] = _autograd._top_saved_tensors_default_hooks
"""The innermost `saved_tensors_hooks` of this thread; the argument is True. There is no public way to read them."""


def saves_as_usual() -> bool:
    """Whether the running code is not a recomputation, and no other hooks handle its saved tensors.

    Replayed branches and samples that are not stored twice would interfere with other hooks.
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
        repeats: whether its recomputation is running.
    """

    frame: object
    repeats: bool


def innermost_checkpoint() -> Checkpoint | None:
    """The checkpoint whose hooks are the innermost of this thread; None if there are none or they are other hooks."""
    hooks = top_saved_tensors_hooks(True)
    return None if hooks is None else _checkpoint_of(hooks[0])


def running_checkpoints() -> list[Checkpoint]:
    """The running non-reentrant checkpoints of this thread, innermost first.

    PyTorch's object for a checkpoint is the only exact mark that a forward shares with its recomputation. It is in the
    closure of the checkpoint's hooks. Only the innermost hooks are visible: to read the others, hooks are removed and
    put back.
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
"""The compiler of the Python frames that this thread enters; None without one.

Checking it costs less than PyTorch's way out of compilation, which is used only during compilation.
"""


def outside_compiler(function: Callable[..., Any], *, recursive: bool) -> Callable[..., Any]:
    """`function`, not compiled; what it calls is compiled unless `recursive`.

    The public `torch.compiler.disable` does the same, but imports the compiler at once, which would make
    `import stochastic_depth` take seconds longer.
    """
    return torch._disable_dynamo(function, recursive=recursive)  # pyright: ignore


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled: wrapped by `torch.compile(module)`, or in place by `module.compile()`.

    Without it, a compiled model would be made stochastic, but its graph would still run without gates.
    """
    return is_compiled_wrapper(module) or module._compiled_call_impl is not None


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is the wrapper from `torch.compile(module)`; its calls are those of the module inside."""
    return hasattr(module, "_orig_mod")


# TorchDispatchMode, imported above, sees every operation: FLOPs and memory are counted with it. PyTorch documents it in
# a private module.

current_dispatch_mode = cast("Callable[[], object]", _get_current_dispatch_mode)
"""The innermost mode that sees operations; None without one. Without it, a selective checkpoint would look plain."""


@contextmanager
def without_parametrizations_cached() -> Generator[None]:
    """Context in which `torch.nn.utils.parametrize.cached` has no effect.

    It caches weights by modules, and a stand-in's would be those of the module that it stands for.
    """
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


disable_current_modes = cast("Callable[[], Any]", _disable_current_modes)
"""Context in which no FLOP counter or other dispatch mode sees operations. Without it, dry runs would be counted."""


without_torch_function: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""Context in which no mode that replaces PyTorch's functions is active.

A proof removes noise with such a mode. Without this, draws of gates and samples would be affected too.
"""


# ------------------------------------------------------------------------------------------ torch.func


transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore
"""Whether `vmap` or `grad` of `torch.func` is active: `apply` would skip the code that makes them work."""


def is_mapped() -> bool:
    """Whether `torch.vmap` runs."""
    if not transforms_are_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()  # pyright: ignore
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in stack)  # pyright: ignore


def is_traced() -> bool:
    """Whether `torch.jit.trace`, `make_fx` or `aot_module` records what runs, but not why."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)  # pyright: ignore
    return torch.jit.is_tracing() or mode is not None


@contextmanager
def outside_trace() -> Generator[None]:
    """Context that `torch.jit.trace` does not record, where sizes are numbers."""
    state = torch._C._get_tracing_state()  # pyright: ignore
    torch._C._set_tracing_state(None)  # pyright: ignore
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to `torch.func` and has no memory of its own to copy."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore


@contextmanager
def outside_transforms() -> Generator[None]:
    """Context outside `vmap` and `grad` of `torch.func`; a proof inside one would become part of it.

    They forbid hooks on saved tensors, with which a proof detects in-place changes; here, hooks are allowed.
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
"""The attributes that every module has, which do not affect its own code."""

TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")
"""Names of the dictionaries below among a module's attributes."""

HOOKS = tuple(
    name for name in vars(nn.Module()) if "forward" in name or name in ("_backward_hooks", "_backward_pre_hooks")
)
"""Names of the dictionaries of hooks for a module's forward and backward, and of how they are called."""


def call_instead(module: nn.Module, call: Callable[..., Any]) -> None:
    """Replace the call of a module, because global module hooks must not see calls that run for a proof."""
    module.__dict__["_compiled_call_impl"] = call


def call_with_own_hooks(module: nn.Module, before_forward: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
    """Call a module with its own hooks and without global module hooks."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if number in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        else:
            changed = hook(module, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    before_forward()
    output = module.forward(*args, **kwargs)
    for number, hook in list(module._forward_hooks.items()):
        given = (args, kwargs) if number in module._forward_hooks_with_kwargs else (args,)
        changed = hook(module, *given, output)
        output = output if changed is None else changed
    return output


def parameter_dict(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary of a module's own parameters.

    The public iterators are too slow for each step, skip repeated parameters, and cannot replace one.
    """
    return module._parameters


def buffer_dict(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary of a module's own buffers, see `parameter_dict`."""
    return module._buffers


def child_dict(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary of a module's children. `named_children` skips a child that occurs twice."""
    return module._modules


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """The dictionaries of the hooks for a module's forward and backward.

    No public function lists them. Without them, a branch with hooks would be replayed, folded or copied, and its hooks
    would not run, or would run in a dry run.
    """
    return [getattr(module, name) for name in _HOOKS]


def pre_hook_dict(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The dictionary of the hooks that run before a module's forward, including weight norm and pruning."""
    return module._forward_pre_hooks


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run with a module's forward: a factor cannot be folded into weights that they use or change."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


BatchNorm = _BatchNorm
"""The base class of every batch normalization, including those of other libraries."""

InstanceNorm = _InstanceNorm
"""The same for instance normalization; each public class has a fixed number of dimensions."""

RunningNorm = _NormBase
"""The base class of both, for modules that may have running statistics."""


# ------------------------------------------------------------------------------------------ tensors and structures


def storage_number(tensor: Tensor) -> int:
    """A number that identifies a tensor's memory, shared with its views.

    Not `data_ptr()`, which is 0 for all tensors on the meta device. Without it, activations would be counted twice.
    """
    return tensor.untyped_storage()._cdata


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no data, as under torch.export, so a stand-in cannot copy its values."""
    return isinstance(tensor, FakeTensor)


foreach_zero_: Callable[[list[Tensor]], None] = torch._foreach_zero_
"""Fills many tensors with zeros at once, instead of one GPU call per parameter of a closed branch."""

foreach_copy_: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_
"""Copies many tensors at once, see `foreach_zero_`."""

tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
"""The leaves of nested lists, tuples, dictionaries and registered classes, such as model outputs.

PyTorch's own function, because models register their output classes there; the public one came after PyTorch 2.8.
"""

tree_map: Callable[..., Any] = _pytree.tree_map
"""The same structure with a function of each leaf, see `tree_leaves`."""

tree_map_only: Callable[[type, Callable[[Any], Any], Any], Any] = _pytree.tree_map_only
"""The same structure with a function of the leaves of one type, see `tree_leaves`."""

tree_flatten: Callable[[Any], tuple[list[Any], Any]] = _pytree.tree_flatten
"""The leaves of a structure and its form, see `tree_leaves`."""

tree_unflatten: Callable[[Sequence[Any], Any], Any] = _pytree.tree_unflatten
"""The structure of this form with these leaves, see `tree_leaves`."""

assert_in_graph: Callable[[Any, str], None] = torch._assert
"""An assertion that `torch.fx` records, so a smaller network rejects inputs that its code was not recorded for."""


# ------------------------------------------------------------------------------------------ many processes


def keys_of_fsdp() -> tuple[str, str]:
    """The attribute names of FSDP2's state in a module. A dry run would copy it, which fails."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return REGISTRY_KEY, STATE_KEY


def running_ddp() -> DistributedDataParallel | None:
    """The `DistributedDataParallel` whose forward is running.

    The model cannot see its wrapper. Without this, settings of the wrapper that do not work with gates would not be
    refused.
    """
    return DistributedDataParallel._get_active_ddp_module()
