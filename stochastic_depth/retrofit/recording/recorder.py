"""What notes the calls of a block's own code as it runs, and to which values they belong."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.retrofit.code.called import Called, method_of
from stochastic_depth.retrofit.code.effects import (
    CONSTANTS,
    contents_of,
    differ,
    generators_of,
    is_same,
    outside,
    parts_of,
)
from stochastic_depth.retrofit.code.forms import is_plain
from stochastic_depth.retrofit.code.held import Cached, Outside, held_tensors, name_of, tensors_in
from stochastic_depth.retrofit.code.reads import reads_of
from stochastic_depth.retrofit.errors import StoredError, TraceError
from stochastic_depth.retrofit.recording.checkpoints import Regions, kept
from stochastic_depth.retrofit.recording.edits import Edits
from stochastic_depth.retrofit.recording.layouts import order_of
from stochastic_depth.retrofit.recording.left_behind import Intermediates
from stochastic_depth.retrofit.recording.maps import is_attention_map
from stochastic_depth.retrofit.recording.torch_calls import (
    ORIGIN,
    UNDONE_SETTINGS,
    as_method,
    gives_sizes_of_values,
    is_size,
    is_structure,
    is_value,
    name_of_function,
    named_call,
    set_item,
    tells_sizes,
)
from stochastic_depth.retrofit.rules import is_drop_path
from stochastic_depth.torch_private import (
    EndOfRecomputation,
    parameter_dict,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
    version_of,
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


def _meta_of(tensor: Tensor) -> dict[str, Any]:
    return {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "order": order_of(tensor)}


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


class _Graph(fx.Graph):
    """A graph whose nodes record the inlined children and the checkpoint that they were created in."""

    inside: tuple[str, ...] = ()
    checkpoint: int | None = None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self.inside:
            node.meta["inlined"] = self.inside
        if self.checkpoint is not None:
            node.meta["checkpoint"] = self.checkpoint
        return node


class Recorder(TorchFunctionMode):
    """Records the calls of a block's own code as it runs.

    Args:
        block: the block, or a stand-in.
        leaves: the tensors and objects among the arguments that the recording treats as arguments, in order.
        edits: calls to change, by their numbers.
        inlined: paths of the children whose own code is recorded as a part of the block's.

    Attributes:
        graph: see `Run.graph`.
        called: paths of the children, parameters and buffers that were used.
        changed_by_children: attributes of the block and its children that calls of children have changed.
        constants: tensors that existed before and that other objects hold.
        asks_for_sizes: whether the code asked for the size of a value.
        arguments: the arguments that are structures or objects.
        called_objects: the arguments whose methods are single calls.
    """

    def __init__(self, block: nn.Module, leaves: Sequence[Any], edits: Edits, inlined: Collection[str]) -> None:
        super().__init__()
        self.graph = _Graph()
        self.called: set[str] = set()
        self.changed_by_children: set[str] = set()
        self._block = block
        self._edits = edits
        self._inlined = inlined
        self._num_calls = 0
        self._inside = 0
        self._entered: list[Any] = []
        self._intermediates = Intermediates()
        self._first_contents: dict[str, Any] = {}
        self._regions = Regions()
        self._kept = ExitStack()
        self._nodes: dict[int, fx.Node] = {}
        self._objects: dict[int, fx.Node] = {}
        # Tensors that are looked up by identity must stay alive; the version shows in-place changes.
        self._alive: list[Any] = []
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._held: dict[int, tuple[Any, ...]] = {}
        for path, value in held_tensors(block):
            self._held.setdefault(id(value), path)  # One that has several names goes by its first.
        # Those of other modules and of plain structures, by place. What the stand-in has copied goes by its path.
        self.arguments = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, Called))]
        self._reads = reads_of(block, inlined, self.arguments)
        self._outside = {
            id(tensor): (place, inner)
            for place in reversed(self._reads.places)
            for inner, tensor in tensors_in(place(), 3)
        }
        self._valued: set[int] = set()
        self.constants: list[Tensor] = []
        self.asks_for_sizes = False
        self._generators = generators_of(block, inlined, self._reads)
        self._held_objects = {
            id(value): (*path, name)
            for path in ((), *(tuple(each.split(".")) for each in inlined))
            for name, value in block.get_submodule(".".join(path)).__dict__.items()
            if hasattr(value, "__dict__")
        }
        self._device = "cpu"
        self.called_objects = [leaf for leaf in leaves if isinstance(leaf, Called)]
        for index, leaf in enumerate(leaves):
            node = self.graph.placeholder(f"argument_{index}")
            node.meta["called"] = isinstance(leaf, Called)
            self._bind(leaf, node, 0 if isinstance(leaf, Called) else 3)
            if isinstance(leaf, Tensor):
                self._device = leaf.device.type
        self._base = self._context()
        self._state = outside(self._generators)

    # What is known of values.
    def _bind(self, value: Any, node: fx.Node, depth: int = 3) -> None:
        if isinstance(value, Tensor):
            self._alive.append(value)
            self._nodes[id(value)] = node
            node.meta.update(_meta_of(value))
            if node.target is operator.getitem and cast(fx.Node, node.args[0]).op == "call_module":
                node.meta["attention_map"] = is_attention_map(value)
            if not value.is_inference():
                self._versions[id(value)] = (value, version_of(value))
        elif not isinstance(value, CONSTANTS):
            self._alive.append(value)
            self._objects[id(value)] = node
            if type(value) in (tuple, list) and all(isinstance(item, Tensor) for item in value):
                node.meta["items"] = type(value)(_meta_of(item) for item in value)
            for (kind, key), part in parts_of(value) if depth else ():
                known = id(part) in self._nodes or id(part) in self._objects
                if not known and not isinstance(part, (*CONSTANTS, nn.Module)):
                    function = operator.getitem if kind == "item" else getattr
                    self._bind(part, self.graph.call_function(function, (node, key)), depth - 1)

    def _node(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            path = self._held.get(id(tensor))
            if path is None and (tensor.grad_fn is not None or tensor.requires_grad):
                raise TraceError("the forward uses a tensor that is neither an argument nor held by the block")
            if path is not None:
                node = self._get_attribute(path)
            elif id(tensor) in self._outside:
                node = self.graph.call_function(Outside(*self._outside[id(tensor)]), ())
            elif not self._reads.may_cache:
                raise TraceError(
                    "the forward takes a tensor from where it cannot be followed (autograd.Function, another library)"
                )
            else:
                # One that is the same in the next run; `constants` tells.
                self.constants.append(tensor)
                node = self.graph.call_function(Cached(tensor), ())
            self._bind(tensor, node)
        return node

    def _get_attribute(self, path: tuple[Any, ...]) -> fx.Node:
        name = name_of(path)
        self.called.add(name)
        node = self.graph.create_node("get_attr", name)
        node.meta["path"] = path
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node(value)
        if type(value) in (tuple, list, torch.Size):
            kind = tuple if type(value) is torch.Size else type(value)
            items = cast("list[Any]", value)
            if id(value) in self._objects and any(isinstance(item, Tensor) for item in items):
                return self._objects[id(value)]
            return kind(self._argument(item) for item in items)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._objects.get(id(value)) or type(value)(*[self._argument(i) for i in cast("tuple[Any]", value)])
        if type(value) is dict:
            return self._objects.get(id(value)) or {
                key: self._argument(item) for key, item in cast("dict[Any, Any]", value).items()
            }
        if isinstance(value, slice):
            part = cast("slice[Any, Any, Any]", value)
            return slice(self._argument(part.start), self._argument(part.stop), self._argument(part.step))
        if isinstance(value, torch.SymInt):
            return int(value)
        if isinstance(value, CONSTANTS):
            return value
        if id(value) in self._objects:
            return self._objects[id(value)]
        if id(value) in self._held_objects:
            return self._get_attribute(self._held_objects[id(value)])
        if isinstance(value, nn.Module):
            raise TraceError("the block passes a module as an argument")
        if tree_leaves(value) != [value]:
            leaves, spec = tree_flatten(value)
            built = self.graph.call_function(_unflatten, cast(Any, ([self._argument(leaf) for leaf in leaves], spec)))
            return built
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            values = {f.name: self._argument(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return self.graph.call_function(_replaced, cast(Any, (type(value), values)))
        if callable(value) and not hasattr(value, "__self__"):
            return value
        raise TraceError(f"the forward passes on a {type(value).__name__} that is neither an argument nor the block's")

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
            raise TraceError("the forward draws random numbers itself, outside its children")

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
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(path), with_kwargs=True))
        self._first_contents = contents_of(block, ())
        try:
            with self:
                yield
        except (TraceError, KeyboardInterrupt, EndOfRecomputation):
            raise
        except Exception as error:
            raise TraceError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
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
        self._entered = [self._argument(args), self._argument(kwargs), now]
        return args, kwargs

    def _leaving(self, path: str) -> Callable[..., Any]:
        def leave(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            if self._inside > 1:
                self._inside -= 1
                return None
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
            if computed := [name for name in sorted(changed) if _is_computed(self._block, name, after[name])]:
                node.meta["stores"] = computed[0]
            elif self._intermediates.are_left(output, self._block, self.called_objects):
                node.meta["stores"] = "a value that it computes"
            self._kept.close()
            output = self._result(node, output)
            self._state = outside(self._generators)
            self._inside -= 1
            return output

        return leave

    @property
    def is_inside(self) -> bool:
        """Whether the running code is part of a recorded call."""
        return self._inside > 0

    def call_of_object(self, value: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a method call on one of the block's arguments."""
        self._inside += 1
        try:
            self.check_outside()
            nodes, named = self._argument(tuple(args)), self._argument(dict(kwargs))
            output = method(*args, **kwargs)
            if is_value(output):
                raise TraceError(
                    f"the forward's control flow depends on the content of a {type(value).__name__} ({name})"
                )
            node = self.graph.call_function(method_of, (self._objects[id(value)], name, *nodes), named)
            output = self._result(node, output)
            self._state = outside(self._generators)
            return output
        finally:
            self._inside -= 1

    def _edited(self, number: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for edit in self._edits.get(number, ()):
            if edit.operand is not None:
                before = args[edit.operand]
                after = edit.of(before)
                self._nodes[id(after)] = self._node(before)
                self._alive.append(after)
                args = (*args[: edit.operand], after, *args[edit.operand + 1 :])
        return args, kwargs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            result = func(*args, **kwargs)
            self._intermediates.note(result)
            return result
        if name_of_function(func) in ORIGIN:
            raise TraceError(f"the forward reads where a tensor is stored ({name_of_function(func)})")
        if name_of_function(func).startswith("_record_function"):
            return func(*args, **kwargs)  # a mark for a profiler
        if tells_sizes(func) and not (args and id(args[0]) in self._held):
            self.asks_for_sizes = True
        if is_structure(func):
            if args and id(args[0]) in self._valued and is_size(func):
                raise TraceError("the forward's control flow depends on a size that depends on the values of a tensor")
            return func(*args, **kwargs)
        self._inside += 1
        try:
            self.check_outside()
            with self._keep():
                args, kwargs = self._edited(self._num_calls, args, kwargs)
                op, target, given = named_call(func, args)
                nodes, named = self._argument(tuple(given)), self._argument(dict(kwargs))
                context = self._context()
                output = func(*args, **kwargs)
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, output))):
                # Settings under which later calls are made, which these note; a recording does not set them.
                if name_of_function(func) not in UNDONE_SETTINGS and output is None:
                    raise TraceError(f"the forward changes a setting of PyTorch ({name_of_function(func)})")
                return output
            if is_value(output) or differ(self._state, outside(self._generators)):
                name = getattr(func, "__name__", str(func))
                if is_value(output):
                    raise TraceError(f"the forward's control flow depends on the values of a tensor ({name})")
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
            if gives_sizes_of_values(func, args, kwargs) or any(
                id(leaf) in self._valued for leaf in tree_leaves((args, kwargs))
            ):
                self._valued.update(id(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        finally:
            self._inside -= 1
        return None if target is set_item else result

    def _result(self, node: fx.Node, output: Any) -> Any:
        """The result of a call, bound to its node."""
        number = self._num_calls
        self._num_calls += 1
        node.meta["call"] = number
        changed = [tensor for tensor, version in self._versions.values() if version_of(tensor) != version]
        node.meta["writes"] = [self._nodes[id(tensor)] for tensor in changed]
        for tensor in changed:
            if id(tensor) in self._held and node.op != "call_module":
                raise StoredError(f"the forward changes its buffer {name_of(self._held[id(tensor)])} in place")
        if self._edits.get(number):
            with self._keep():
                for edit in self._edits[number]:
                    if edit.operand is None:
                        output = edit.of(output)
        output = self._fresh(output, {id(tensor) for tensor in changed})
        for tensor in changed:
            if tensor is not output:
                self._bind(tensor, self.graph.call_function(_after, (self._nodes[id(tensor)], node)))
        self._bind(output, node)
        return output

    def _fresh(self, output: Any, changed: set[int]) -> Any:
        """The output, with a new tensor instead of a known one that this call did not change.

        Values that a call passes on besides its output, as attention does with a position bias, stay the same.
        """

        def new(tensor: Tensor) -> Tensor:
            known = id(tensor) in self._nodes or id(tensor) in self._held
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
        self.graph.output(self._argument(output))
        for node in reversed(list(self.graph.nodes)):
            # A checkpoint detaches its inputs, which has no effect here.
            does_nothing = "call" not in node.meta or getattr(node.target, "__name__", node.target) == "detach"
            if not node.users and does_nothing and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)


def _unflatten(leaves: list[Any], spec: Any) -> Any:
    return tree_unflatten(leaves, spec)


def _replaced(kind: Any, values: Mapping[str, Any]) -> Any:
    return kind(**values)
