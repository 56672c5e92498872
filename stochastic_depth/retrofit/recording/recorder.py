"""What notes the calls of a block's own code as it runs, and to which values they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.retrofit.code.called import Called, method_of
from stochastic_depth.retrofit.code.effects import (
    containers_in,
    contents_of,
    differ,
    generators_of,
    is_same,
    outside,
    parts_of,
)
from stochastic_depth.retrofit.code.forms import is_plain
from stochastic_depth.retrofit.code.reads import reads_of
from stochastic_depth.retrofit.code.user_data import CONSTANTS
from stochastic_depth.retrofit.errors import GivenCodeError, StoredError, TraceError, why_it_failed
from stochastic_depth.retrofit.recording.checkpoints import Regions, kept
from stochastic_depth.retrofit.recording.edits import Edits
from stochastic_depth.retrofit.recording.left_behind import Intermediates
from stochastic_depth.retrofit.recording.quiet import QUIETED
from stochastic_depth.retrofit.recording.torch_calls import (
    ORIGIN,
    UNDONE_SETTINGS,
    ReadValues,
    as_method,
    is_structure,
    is_value,
    may_size_by_values,
    name_of_function,
    named_call,
    operands_by_position,
    set_item,
    tells_sizes,
)
from stochastic_depth.retrofit.recording.values import Values
from stochastic_depth.retrofit.rules import is_drop_path
from stochastic_depth.torch_private import (
    EndOfRecomputation,
    parameter_dict,
    tree_leaves,
    tree_map_only,
)


def _changed_in_children(before: dict[str, Any], now: dict[str, Any], by_children: set[str]) -> str | None:
    """What of its children a block has changed, whose calls a recording would make without that."""
    for name in {**before, **now}:
        if "." in name and name not in by_children and not is_same(before.get(name), now.get(name)):
            return name
    return None


def _is_computed(block: nn.Module, path: str, value: Any) -> bool:
    """Whether a module stores what it computes from its inputs, such as a loss, for code that may be anywhere.

    A weight that is computed from other parameters of the module (`weight_norm`) is not for others.
    """
    parent, _, name = path.rpartition(".")
    if any(key.startswith(f"{name}_") for key in parameter_dict(block.get_submodule(parent))):
        return False
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in tree_leaves(value))


def _may_hold_numbers(value: Any, depth: int = 5) -> bool:
    """Whether a value is or holds a number, as far as can be seen."""
    if value is None or isinstance(value, Tensor):
        return False
    if isinstance(value, (*CONSTANTS, torch.Size)) or not depth:
        return True
    parts = [part for _, part in parts_of(value)]
    is_transparent = bool(parts) or isinstance(value, (tuple, list, Mapping))
    return not is_transparent or any(_may_hold_numbers(part, depth - 1) for part in parts)


_SIZE_OF_VALUES = "the forward's control flow depends on a size that depends on the values of a tensor"


def _after(value: Any, _change: Any) -> Any:
    """A value after an in-place change."""
    return value


def _under(target: Callable[..., Any], context: tuple[Any, ...]) -> Callable[..., Any]:
    """A function that runs under its own gradient and autocast settings."""
    grad, device, enabled, dtype = context

    def under(*args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(grad), torch.autocast(device, dtype=dtype, enabled=enabled):
            return target(*args, **kwargs)

    under.__name__ = getattr(target, "__name__", "under")
    return under


class Recorder(TorchFunctionMode):
    """Records the calls of a block's own code as it runs.

    Args:
        block: the block, or a stand-in.
        leaves: the tensors and objects among the arguments that the recording treats as arguments, in order.
        edits: calls to change, by their numbers.
        inlined: paths of the children whose own code is recorded as a part of the block's.
        is_recording: whether the recording is used, not only the edits.

    Attributes:
        graph: see `Run.graph`.
        called: paths of the children, parameters and buffers that were used.
        changed_by_children: attributes of the block and its children that calls of children have changed.
        constants: tensors that existed before and that other objects hold.
        asks_for_sizes: whether the code asked for the size of a value, or a child may have told it one.
        telling: paths of the children that gave plain values.
        arguments: the arguments that are structures or objects.
        called_objects: the arguments whose methods are single calls.
    """

    def __init__(
        self,
        block: nn.Module,
        leaves: Sequence[Any],
        edits: Edits,
        inlined: Collection[str],
        *,
        is_recording: bool = True,
    ) -> None:
        super().__init__()
        self._is_recording = is_recording
        self.changed_by_children: set[str] = set()
        self._block = block
        self._edits = edits
        self._inlined = inlined
        self._num_calls = 0
        self._inside = 0
        self._refusal: TraceError | None = None
        self._entered: list[Any] = []
        self._intermediates = Intermediates()
        self._first_contents: dict[str, Any] = {}
        self._regions = Regions()
        self._kept = ExitStack()
        self.arguments = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, Called))]
        self._reads = reads_of(block, inlined, self.arguments)
        if is_recording and self._reads.asks_for_itself:
            raise TraceError("its code asks which module it runs on (`self is …`, or a dictionary of modules)")
        self._values = Values(block, inlined, self._reads)
        self.graph, self.called, self.constants = self._values.graph, self._values.called, self._values.constants
        self._valued: set[int] = set()
        self._read_values = ReadValues()
        self.asks_for_sizes = False
        self.telling: set[str] = set()
        self._generators = generators_of(block, self._reads, self.arguments)
        self._device = "cpu"
        self.called_objects = [leaf for leaf in leaves if isinstance(leaf, Called)]
        for index, leaf in enumerate(leaves):
            node = self.graph.placeholder(f"argument_{index}")
            node.meta["called"] = isinstance(leaf, Called)
            self._values.bind(leaf, node, 0 if isinstance(leaf, Called) else 3)
            if isinstance(leaf, Tensor):
                self._device = leaf.device.type
        self._base = self._context()
        self._state = outside(self._generators)

    # Settings and random states.
    def _context(self) -> tuple[Any, ...]:
        device = self._device
        return (
            torch.is_grad_enabled(),
            device,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )

    def check_outside(self) -> None:
        """Raise if a random state has changed since the last recorded call."""
        now = outside(self._generators)
        if differ(self._state, now):
            by_others = ", or another thread does" if threading.active_count() > 1 else ""
            raise TraceError(f"the forward draws random numbers itself, outside its children{by_others}")

    def _keep(self) -> AbstractContextManager[None]:
        """Context that records the checkpoint of the next call and keeps its saved tensors."""
        self.graph.checkpoint = self._regions.now()
        return nullcontext() if self.graph.checkpoint is None else kept()

    # Calls.
    @contextmanager
    def watching(self, block: nn.Module) -> Generator[None]:
        """Context that records the calls of the block's children and of PyTorch's functions."""
        handles: list[Any] = []
        for path, module in block.named_modules():
            if path in self._inlined:
                handles.append(module.register_forward_pre_hook(self._opening(path)))
                handles.append(module.register_forward_hook(self._close))
            elif path:
                handles.append(module.register_forward_pre_hook(self._entering(path), prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(path), with_kwargs=True))
        self._first_contents = contents_of(block, ())
        try:
            with self, self._read_values:
                yield
            if self._refusal is not None:
                raise self._refusal
        except (TraceError, KeyboardInterrupt, EndOfRecomputation):
            raise
        except Exception as error:
            raise TraceError(why_it_failed(error, self._reads.names)) from error
        finally:
            self._kept.close()
            for handle in handles:
                handle.remove()

    def _opening(self, path: str) -> Callable[..., None]:
        def open_(_module: nn.Module, _args: Any) -> None:
            self.graph.inside = (*self.graph.inside, path)

        return open_

    def _close(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.graph.inside = self.graph.inside[:-1]

    def _entering(self, path: str) -> Callable[..., Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            try:
                return self._enter(module, args, kwargs)
            except GivenCodeError as error:
                raise GivenCodeError(error.value, path) from None

        return self._noting_refusals()(enter)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._inside += 1  # Code that runs here is not part of the block's code either.
        if self._inside > 1:
            return None
        self._intermediates = Intermediates()
        self.check_outside()
        keep = self._keep()
        if is_drop_path(module) and any(isinstance(value, float) for value in (*args, *kwargs.values())):
            raise TraceError("its drop path is called with a number, which would be its rate")
        self._kept.enter_context(keep)
        args, kwargs = self._edited(self._num_calls, args, kwargs)
        now = contents_of(self._block, ())
        if changed := _changed_in_children(self._first_contents, now, self.changed_by_children):
            raise TraceError(f"it changes {changed} and then calls its children")
        self._entered = [self._values.argument(args), self._values.argument(kwargs), now]
        self._read_values.any = False
        return args, kwargs

    def _leaving(self, path: str) -> Callable[..., Any]:
        def leave(_module: nn.Module, given: Any, named: Any, output: Any) -> Any:
            if self._inside > 1:
                self._inside -= 1
                return None
            has_read = self._read_values.any
            args, kwargs, before = self._entered
            self.called.add(path)
            context = self._context()
            if context == self._base:
                node = self.graph.call_module(path, args, kwargs)
            else:
                raise TraceError(f"{path} runs under its own gradient or autocast settings")
            after = contents_of(self._block, ())
            changed = {name for name in {**before, **after} if not is_same(before.get(name), after.get(name))}
            for name in changed:
                if is_plain(after.get(name)) and name.rpartition(".")[2] in self._reads.names:
                    raise TraceError(f"it reads {name}, which {path} sets")
            self.changed_by_children.update(changed)
            # A child may tell the block a size, in its output or in a list that it is given.
            is_told = _may_hold_numbers(output) or any(True for _ in containers_in((*given, *named.values())))
            self.asks_for_sizes |= bool(changed) or is_told
            if any(isinstance(leaf, (bool, int, float, str)) for leaf in tree_leaves(output)):
                if has_read or self._is_valued((given, named)):
                    raise TraceError(f"{path} gives a number that may depend on the values of a tensor")
                self.telling.add(path)
            if computed := [name for name in sorted(changed) if _is_computed(self._block, name, after[name])]:
                node.meta["stores"] = computed[0]
            elif self._intermediates.are_left((given, named), output, self._block, self.called_objects):
                node.meta["stores"] = "a value that it computes"
            self._kept.close()
            output = self._result(node, output)
            self._note_valued(output, (given, named), has_read=has_read)
            self._state = outside(self._generators)
            self._inside -= 1
            return output

        return self._noting_refusals()(leave)

    @contextmanager
    def _noting_refusals(self) -> Generator[None]:
        """Context whose refusals are raised again at the end: the block's code may catch every `Exception`."""
        try:
            yield
        except TraceError as error:
            self._refusal = self._refusal or error
            raise

    @property
    def is_inside(self) -> bool:
        """Whether the running code is part of a recorded call."""
        return self._inside > 0

    def call_of_object(self, value: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a method call on one of the block's arguments."""
        with self._noting_refusals():
            return self._called(value, name, method, args, kwargs)

    def _called(self, value: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._inside += 1
        try:
            self.check_outside()
            nodes, named = self._values.argument(tuple(args)), self._values.argument(dict(kwargs))
            self._read_values.any = False
            output = method(*args, **kwargs)
            has_read = self._read_values.any
            if is_value(output):
                raise TraceError(
                    f"the forward's control flow depends on the content of a {type(value).__name__} ({name})"
                )
            node = self.graph.call_function(method_of, (self._values.object_of(value), name, *nodes), named)
            output = self._result(node, output)
            self._note_valued(output, (args, kwargs), has_read=has_read)
            self._state = outside(self._generators)
            return output
        finally:
            self._inside -= 1

    def _edited(self, number: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for edit in self._edits.get(number, ()):
            # A setting, such as the end of `with torch.enable_grad():`, is no call that counts.
            if edit.operand is not None and any(isinstance(leaf, Tensor) for leaf in tree_leaves(args)):
                before = args[edit.operand]
                after = edit.of(before)
                self._values.replace(before, after)
                args = (*args[: edit.operand], after, *args[edit.operand + 1 :])
        return args, kwargs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            result = func(*args, **kwargs)
            if self._is_recording:
                self._intermediates.note(result)
            return result
        with self._noting_refusals():
            return self._recorded(func, args, kwargs)

    def _recorded(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function of PyTorch, which is recorded."""
        if name_of_function(func) in ORIGIN:
            raise TraceError(f"the forward reads where a tensor is stored ({name_of_function(func)})")
        if name_of_function(func).startswith("_record_function"):
            return func(*args, **kwargs)  # a mark for a profiler
        if tells_sizes(func) and not (args and self._values.is_held(args[0])):
            self.asks_for_sizes = True
        if tells_sizes(func) and self._is_valued((args, kwargs)):
            raise TraceError(_SIZE_OF_VALUES)
        if is_structure(func, args, kwargs):
            return func(*args, **kwargs)
        self._inside += 1
        try:
            self.check_outside()
            with self._keep():
                args, kwargs = operands_by_position(name_of_function(func), args, kwargs)
                first = args[0] if args else None
                args, kwargs = self._edited(self._num_calls, args, kwargs)
                op, target, given = named_call(func, args)
                nodes, named = self._values.argument(tuple(given)), self._values.argument(dict(kwargs))
                context = self._context()
                self._read_values.any = False
                output = func(*args, **kwargs)
                if args and output is args[0] is not first:
                    output = cast(Tensor, first).copy_(output)  # After `y.add_(x)` the code goes on with y.
                has_read = self._read_values.any and may_size_by_values(func, args)
            if has_read and tells_sizes(func):
                raise TraceError(_SIZE_OF_VALUES)
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, output))):
                # Settings under which later calls are made, which these note; a recording does not set them.
                if name_of_function(func) not in UNDONE_SETTINGS and output is None:
                    raise TraceError(f"the forward changes a setting of PyTorch ({name_of_function(func)})")
                return output
            if is_value(output) or differ(self._state, outside(self._generators)):
                name = getattr(func, "__name__", str(func))
                if is_value(output):
                    drawn = any(getattr(node.target, "__name__", node.target) in QUIETED for node in self.graph.nodes)
                    of = "a tensor, and it draws random numbers" if drawn else "a tensor"
                    raise TraceError(f"the forward's control flow depends on the values of {of} ({name})")
                raise TraceError(f"the forward draws random numbers itself ({name})")
            if target is set_item:
                output = args[0]
            if context != self._base:
                function = as_method(target) if op == "call_method" else target
                op, target = "call_function", _under(function, context)
            node = self.graph.create_node(op, target, nodes, named)
            if context != self._base:
                node.meta["settings"] = context
            result = self._result(node, output)
            self._note_valued(result, (args, kwargs), has_read=has_read)
        finally:
            self._inside -= 1
        return None if target is set_item else result

    def _is_valued(self, given: Any) -> bool:
        """Whether the sizes of a tensor in a structure may depend on the values of others."""
        return bool(self._valued) and any(id(leaf) in self._valued for leaf in tree_leaves(given))

    def _note_valued(self, result: Any, given: Any, *, has_read: bool) -> None:
        """Note that the sizes of results may depend on values: the call has read some, or its arguments' sizes do."""
        if has_read or self._is_valued(given):
            self._valued.update(id(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))

    def _result(self, node: fx.Node, output: Any) -> Any:
        """The result of a call, bound to its node."""
        number = self._num_calls
        self._num_calls += 1
        node.meta["call"] = number
        changed = self._values.changed()
        node.meta["writes"] = [self._values.node(tensor) for tensor in changed]
        for tensor in changed:
            if self._values.is_held(tensor) and node.op != "call_module":
                raise StoredError(f"the forward changes its buffer {self._values.name_of_held(tensor)} in place")
        if self._edits.get(number):
            with self._keep():
                for edit in self._edits[number]:
                    if edit.operand is None:
                        edited = edit.of(output)
                        # After `x.mul_(noise)` the code goes on with x.
                        is_in_place = any(tensor is output for tensor in changed)
                        output = output.copy_(edited) if is_in_place else edited
        output = self._fresh(output, {id(tensor) for tensor in changed})
        for tensor in changed:
            if tensor is not output:
                self._values.bind(tensor, self.graph.call_function(_after, (self._values.node(tensor), node)))
        self._values.bind(output, node)
        return output

    def _fresh(self, output: Any, changed: set[int]) -> Any:
        """The output, with a new tensor instead of a known one that this call did not change.

        Values that a call passes on besides its output, as attention does with a position bias, stay the same.
        """

        def new(tensor: Tensor) -> Tensor:
            known = self._values.is_known(tensor)
            return tensor.view_as(tensor) if known and id(tensor) not in changed else tensor

        if isinstance(output, Tensor):
            return new(output)
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            first, *others = cast("list[Any]", output)
            return output if new(first) is first else type(output)([new(first), *others])
        if any(isinstance(leaf, Tensor) and new(leaf) is not leaf for leaf in tree_leaves(output)):
            return tree_map_only(Tensor, new, output)
        return output

    def end(self, output: Any) -> None:
        """Record the return value of the forward."""
        self.graph.output(self._values.argument(output))
        for node in reversed(list(self.graph.nodes)):
            # A checkpoint detaches its inputs, which has no effect here.
            does_nothing = "call" not in node.meta or getattr(node.target, "__name__", node.target) == "detach"
            if not node.users and does_nothing and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
