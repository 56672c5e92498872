"""Records a block's forward as a graph of calls to its children, without running it.

Only the block itself is traced (torch.fx). Its children are single calls, which keep their hooks, their own control
flow and their compilation. A forward is recorded for one *signature*: tensors are symbols; other values, above all
`None`, stay as they are, so `if mask is not None` takes the same path as in the call. Sizes are symbols too, so one
recording is valid for all batch sizes and resolutions, unless the control flow depends on them: then each decision
becomes a condition for using the recording again.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from stochastic_depth.copies import own_class
from stochastic_depth.random_states import same_random_states
from stochastic_depth.retrofit.classes import Unannounced
from stochastic_depth.retrofit.code.effects import differ, outside
from stochastic_depth.retrofit.code.own_forward import own_forward
from stochastic_depth.retrofit.code.reads import reads_of
from stochastic_depth.retrofit.code.signatures import PLAIN_TYPES, unflatten
from stochastic_depth.retrofit.code.user_data import copied
from stochastic_depth.retrofit.errors import GivenCodeError, StoredError, TraceError, why_it_failed
from stochastic_depth.retrofit.recording.sizes import may_be_size, size_value
from stochastic_depth.retrofit.recording.symbols import BlockTracer, Decide, SymbolsForNoise, context
from stochastic_depth.torch_private import (
    TENSORS_AND_CHILDREN,
    TorchDispatchMode,
    assert_in_graph,
    buffer_dict,
    child_dict,
    parameter_dict,
    storage_number,
    tree_leaves,
)


@dataclass
class Recording:
    """The recording of a block's forward for one signature.

    Attributes:
        graph: calls to children have targets relative to the block; placeholders are the opaque arguments in order.
            Nodes of inlined children have their paths in the metadata (`inlined`).
        conditions: nodes of sizes with the values for which the recording holds.
    """

    graph: fx.Graph
    conditions: list[tuple[fx.Node, Any]] = field(default_factory=list[tuple[fx.Node, Any]])

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Whether a call with these opaque arguments would take the same path through the code."""
        if not self.conditions:
            return True
        values = self.placeholder_values(leaves)
        return all(size_value(node, values) == value for node, value in self.conditions)

    def placeholder_values(self, leaves: Sequence[Any]) -> dict[fx.Node, Any]:
        """The opaque arguments by their nodes."""
        placeholders = (node for node in self.graph.nodes if node.op == "placeholder")
        return dict(zip(placeholders, leaves, strict=True))


def record(
    block: nn.Module,
    signature: Any,
    num_leaves: int,
    decide: Decide,
    *,
    with_buffers: bool = False,
    other_mode: bool = False,
    guess_sizes: bool = False,
    may_store: bool = False,
    inlined: Collection[str] = (),
) -> Recording:
    """Record the forward of a block.

    Args:
        block: the block; neither it nor its children run or change.
        signature: signature of its (args, kwargs), from `flatten`.
        num_leaves: number of opaque arguments.
        decide: returns the value of a node that the control flow depends on, or raises `TraceError`.
        with_buffers: whether buffers are symbols too, so that computations with them are recorded instead of their
            results. Otherwise only their sizes are symbols.
        other_mode: whether to record the block in the mode that it is not in.
        guess_sizes: whether sizes are guessed numbers, for code that needs numbers. Such a recording only shows which
            operations belong together.
        may_store: whether the forward may leave something on the block. Such a recording cannot stand for the forward.
        inlined: paths of the children whose own code is recorded as part of the block's code.

    Raises:
        StoredError: if the forward leaves something on the block and may not.
        TraceError: if it cannot be recorded for another reason; the message says why.
    """
    call = _Call(block, signature, other_mode=other_mode, inlined=inlined)
    graph, conditions = _traced(call, num_leaves, decide, with_buffers=with_buffers, guess_sizes=guess_sizes)
    if not may_store:
        names = _state_stored(
            call, block, signature, num_leaves, conditions, with_buffers=with_buffers, other_mode=other_mode
        )
        if names:
            raise StoredError(f"the forward stores {', '.join(names)} on the block")
    for node in reversed(list(graph.nodes)):
        # Unused items of an unpacked value do not count as uses of it, and neither do parameters that are only
        # inspected. Assertions about sizes are removed: the views that follow fail by themselves.
        unused = node.op == "get_attr" or node.target is operator.getitem or node.target is assert_in_graph
        if unused and not node.users:
            graph.erase_node(node)
    return Recording(graph, conditions)


def _traced(
    call: _Call, num_leaves: int, decide: Decide, *, with_buffers: bool, guess_sizes: bool = False
) -> tuple[fx.Graph, list[tuple[fx.Node, Any]]]:
    """The graph of a call, and the values that its code branched on."""
    conditions: list[tuple[fx.Node, Any]] = []
    tracer = BlockTracer(conditions, decide, guess_sizes=guess_sizes)
    # Settings of a part of the forward, such as autocast, show as a change of this state.
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad(), same_random_states():
        tracer.expected_state = context()
        before = outside()
        try:
            with _UnchangedBuffers(call.original), warnings.catch_warnings(), SymbolsForNoise(tracer):
                warnings.simplefilter("ignore")  # The arguments are not a user's.
                leaves = [tracer.create_proxy("placeholder", f"leaves_{i}", (), {}) for i in range(num_leaves)]
                _put_symbols(call.block, call.original, tracer, with_buffers=with_buffers, inlined=call.inlined)
                call.start = _attributes(call.block)
                output = call(*leaves)
                tracer.create_node("output", "output", (tracer.create_arg(output),), {})
        except TraceError:
            raise
        except Exception as error:  # The block's own code needs a value where there is a symbol.
            if "not supported in symbolic tracing" in str(error):  # whose advice is for users of torch.fx
                raise TraceError("the code asks for the number of dimensions (as einops does)") from error
            if "does not support item assignment" in str(error):
                raise TraceError("the code assigns to a part of a value (x[i] = ...)") from error
            raise TraceError(why_it_failed(error, reads_of(call.original, call.inlined).names)) from error
        if differ(before, outside()):
            raise TraceError("the forward draws random numbers itself, outside its children")
    return tracer.graph, conditions


def _put_symbols(
    shadow: nn.Module,
    module: nn.Module,
    tracer: BlockTracer,
    path: str = "",
    *,
    with_buffers: bool,
    inlined: Collection[str],
) -> None:
    """Replace the parameters of a block's shadow by symbols, and its children by callable stand-ins."""
    for name, parameter in parameter_dict(module).items():
        if parameter is not None:
            parameter_dict(shadow)[name] = tracer.attribute(f"{path}{name}", parameter)  # pyright: ignore
    for name, buffer in buffer_dict(module).items():
        if buffer is not None and with_buffers:
            buffer_dict(shadow)[name] = tracer.attribute(f"{path}{name}", buffer)  # pyright: ignore
        elif buffer is not None:
            tracer.buffers[id(buffer)] = f"{path}{name}"
    for name, child in child_dict(module).items():
        if child is None:
            continue
        if child in tracer.stand_ins:
            child_dict(shadow)[name] = tracer.stand_ins[child]
            continue
        plain = nn.Module if isinstance(child, torch.jit.ScriptModule) else own_class(child)
        kind = _inlined_class(plain) if f"{path}{name}" in inlined else _called_class(plain)
        stand_in = tracer.stand_ins[child] = object.__new__(kind)
        stand_in.__dict__.update(copied(child.__dict__))
        stand_in.__dict__.pop("forward", None)
        stand_in.__dict__["_symbolic_call"] = (tracer, f"{path}{name}")
        for group in TENSORS_AND_CHILDREN:
            stand_in.__dict__[group] = dict(child.__dict__.get(group, {}))
        child_dict(shadow)[name] = stand_in
        _put_symbols(stand_in, child, tracer, f"{path}{name}.", with_buffers=with_buffers, inlined=inlined)


@functools.cache
def _called_class(plain: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer, path = self.__dict__["_symbolic_call"]
        try:
            return tracer.create_proxy("call_module", path, args, kwargs)
        except GivenCodeError as error:
            raise GivenCodeError(error.value, path) from None

    return type(plain.__name__, (Unannounced, plain), {"__call__": call})


@functools.cache
def _inlined_class(plain: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer, path = self.__dict__["_symbolic_call"]
        outer = tracer.inside
        tracer.inside = (*outer, path)
        try:
            return self.forward(*args, **kwargs)
        finally:
            tracer.inside = outer

    return type(plain.__name__, (Unannounced, plain), {"__call__": call})


class _Call:
    def __init__(
        self,
        block: nn.Module,
        signature: Any,
        *,
        other_mode: bool,
        changed: Mapping[str, int] | None = None,
        inlined: Collection[str] = (),
    ) -> None:
        plain: type[nn.Module] = own_class(block)
        # A shallow copy: assignments of the forward to `self`, or to its own cache, are discarded.
        shadow = object.__new__(plain)
        shadow.__dict__.update(copied(block.__dict__))
        for name in TENSORS_AND_CHILDREN:
            shadow.__dict__[name] = dict(block.__dict__[name])
        # Layers of transformers checkpoint their own forward; the checkpointed code is recorded.
        shadow.__dict__["gradient_checkpointing"] = False
        shadow.__dict__["training"] = block.training != other_mode
        shadow.__dict__.update(changed or {})
        self.block = shadow
        self.start = _attributes(shadow)
        self.original = block
        self.inlined = inlined
        self._plain = plain
        self._signature = signature

    def __call__(self, *leaves: Any) -> Any:
        args, kwargs = unflatten(self._signature, leaves)
        return own_forward(self.original, self.block)(*args, **kwargs)

    def stored(self) -> dict[str, Any]:
        """The attributes that the forward set, changed or deleted on the block, with their values."""
        end = _attributes(self.block)
        return {
            name: end.get(name)
            for name in {**self.start, **end}
            if name not in self.start or name not in end or not _is_same(self.start[name], end[name])
        }


def _state_stored(
    call: _Call,
    block: nn.Module,
    signature: Any,
    num_leaves: int,
    conditions: Sequence[tuple[fx.Node, Any]],
    *,
    with_buffers: bool,
    other_mode: bool,
) -> list[str]:
    """Names of attributes that a recorded call stored on its block and that later calls may depend on.

    Sizes do not count, and neither do numbers that do not depend on earlier ones: transformers' Swin sets its window to
    the image size if that is smaller.
    """
    stored = {name: value for name, value in call.stored().items() if not _is_number(value)}
    numbers = {name for name, value in stored.items() if type(value) is int is type(call.start.get(name, 0))}
    if numbers:
        changed = {name: call.start.get(name, 0) + 1 for name in numbers}
        again = _Call(block, signature, other_mode=other_mode, changed=changed, inlined=call.inlined)
        decisions = iter([value for _, value in conditions])
        try:
            _traced(again, num_leaves, lambda _: next(decisions), with_buffers=with_buffers)
        except TraceError:
            return list(stored)
        ends = _attributes(again.block)
        numbers = {name for name in numbers if ends[name] == stored[name]}
    return [name for name in stored if name not in numbers]


def _is_number(value: Any) -> bool:
    return isinstance(value, fx.Proxy) and value.node.op != "placeholder" and may_be_size(value.node)


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if type(value) in (dict, list) else value for name, value in attributes.items()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """All attributes of a module with their current values."""
    found = _copied(module.__dict__)
    for group in TENSORS_AND_CHILDREN:
        found.update(found.pop(group))
    return found


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is dict:
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    if type(a) is list:
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return isinstance(a, PLAIN_TYPES) and a == b


class _UnchangedBuffers(TorchDispatchMode):
    """Context that refuses writes to buffers: buffers are not symbols, so a write would happen now and never again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._names = {_storage(buffer): name for name, buffer in block.named_buffers()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor) and _storage(tensor) in self._names:
                raise StoredError(f"the forward changes its buffer {self._names[_storage(tensor)]} in place")
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    try:
        return storage_number(tensor)
    except NotImplementedError:  # a sparse tensor, or one of torch.func
        return id(tensor)
