"""Which node of a recording each value belongs to, by identity: tensors, structures, and what the block holds."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Collection, Mapping
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from stochastic_depth.retrofit.code.effects import parts_of
from stochastic_depth.retrofit.code.held import Cached, Outside, held_tensors, name_of, tensors_in
from stochastic_depth.retrofit.code.reads import Reads
from stochastic_depth.retrofit.code.user_data import CONSTANTS
from stochastic_depth.retrofit.errors import GivenCodeError, TraceError
from stochastic_depth.retrofit.recording.layouts import order_of
from stochastic_depth.retrofit.recording.maps import is_attention_map
from stochastic_depth.torch_private import tree_flatten, tree_leaves, tree_unflatten, version_of


class Graph(fx.Graph):
    """A graph whose nodes record the inlined children and the checkpoint that they were created in."""

    inside: tuple[str, ...] = ()
    checkpoint: int | None = None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node."""
        node = super().create_node(*args, **kwargs)
        if self.inside:
            node.meta["inlined"] = self.inside
        if self.checkpoint is not None:
            node.meta["checkpoint"] = self.checkpoint
        return node


class Values:
    """The values of a recording and their nodes.

    Args:
        block: the block, or a stand-in.
        inlined: paths of the children whose own code is recorded as a part of the block's.
        reads: what the code may read besides its arguments.

    Attributes:
        graph: the recording.
        called: paths of the children, parameters and buffers that were used.
        constants: tensors that existed before and that other objects hold.
    """

    def __init__(self, block: nn.Module, inlined: Collection[str], reads: Reads) -> None:
        self.graph = Graph()
        self.called: set[str] = set()
        self.constants: list[Tensor] = []
        self._nodes: dict[int, fx.Node] = {}
        self._objects: dict[int, fx.Node] = {}
        # Tensors that are looked up by identity must stay alive; the version shows in-place changes.
        self._alive: list[Any] = []
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._held: dict[int, tuple[Any, ...]] = {}
        for path, value in held_tensors(block):
            self._held.setdefault(id(value), path)  # One that has several names goes by its first.
        # Those of other modules and of plain structures, by place. What the stand-in has copied goes by its path.
        self._outside = {
            id(tensor): (place, inner) for place in reversed(reads.places) for inner, tensor in tensors_in(place(), 3)
        }
        self._may_cache = reads.may_cache
        self._held_objects = {
            id(value): (*path, name)
            for path in ((), *(tuple(each.split(".")) for each in inlined))
            for name, value in block.get_submodule(".".join(path)).__dict__.items()
            if hasattr(value, "__dict__")
        }

    def is_held(self, value: Any) -> bool:
        """Whether it is a parameter or buffer of the block."""
        return id(value) in self._held

    def is_known(self, value: Any) -> bool:
        """Whether a tensor belongs to the block or to a node."""
        return id(value) in self._nodes or id(value) in self._held

    def name_of_held(self, value: Tensor) -> str:
        """The name of a parameter or buffer of the block."""
        return name_of(self._held[id(value)])

    def changed(self) -> list[Tensor]:
        """The tensors that were changed in place since they were bound."""
        return [tensor for tensor, version in self._versions.values() if version_of(tensor) != version]

    def object_of(self, value: Any) -> fx.Node:
        """The node of a structure or object."""
        return self._objects[id(value)]

    def replace(self, value: Tensor, new: Tensor) -> None:
        """Let another tensor belong to the node of a value."""
        self._nodes[id(new)] = self.node(value)
        self._alive.append(new)

    def bind(self, value: Any, node: fx.Node, depth: int = 3) -> None:
        """Let a value, and what it holds to some depth, belong to a node."""
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
                    self.bind(part, self.graph.call_function(function, (node, key)), depth - 1)

    def node(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor.

        Raises:
            TraceError: if it is unknown where it comes from.
        """
        node = self._nodes.get(id(tensor))
        if node is None:
            path = self._held.get(id(tensor))
            if path is None and (tensor.grad_fn is not None or tensor.requires_grad):
                raise TraceError("the forward uses a tensor that is neither an argument nor held by the block")
            if path is not None:
                node = self._get_attribute(path)
            elif id(tensor) in self._outside:
                node = self.graph.call_function(Outside(*self._outside[id(tensor)]), ())
            elif not self._may_cache:
                raise TraceError(
                    "the forward takes a tensor from where it cannot be followed (autograd.Function, another library, "
                    "torch.FloatTensor, which torch.tensor can replace)"
                )
            else:
                # One that is the same in the next run; `constants` tells.
                self.constants.append(tensor)
                node = self.graph.call_function(Cached(tensor), ())
            self.bind(tensor, node)
        elif tensor.grad_fn is not None and not node.meta.get("settings", (True,))[0]:
            # Computed without gradients, and yet it has some: by a backward that no operation tells.
            function = type(tensor.grad_fn).__name__.removesuffix("Backward")
            raise TraceError(
                f"the forward calls {function}, an autograd.Function, whose backward cannot be recorded: call it in a "
                "child module of the block"
            )
        return node

    def _get_attribute(self, path: tuple[Any, ...]) -> fx.Node:
        name = name_of(path)
        self.called.add(name)
        node = self.graph.create_node("get_attr", name)
        node.meta["path"] = path
        return node

    def argument(self, value: Any) -> Any:
        """A value as the argument of a node.

        Raises:
            TraceError: if it is unknown where it comes from.
        """
        if isinstance(value, Tensor):
            return self.node(value)
        if type(value) in (tuple, list, torch.Size):
            kind = tuple if type(value) is torch.Size else type(value)
            items = cast("list[Any]", value)
            if id(value) in self._objects and any(isinstance(item, Tensor) for item in items):
                return self._objects[id(value)]
            return kind(self.argument(item) for item in items)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._objects.get(id(value)) or type(value)(*[self.argument(i) for i in cast("tuple[Any]", value)])
        if type(value) is dict:
            return self._objects.get(id(value)) or {
                key: self.argument(item) for key, item in cast("dict[Any, Any]", value).items()
            }
        if isinstance(value, slice):
            part = cast("slice[Any, Any, Any]", value)
            return slice(self.argument(part.start), self.argument(part.stop), self.argument(part.step))
        if isinstance(value, torch.SymInt):
            return int(value)
        if id(value) in self._objects:
            return self._objects[id(value)]
        if id(value) in self._held_objects:
            return self._get_attribute(self._held_objects[id(value)])
        if is_code(value):
            raise GivenCodeError(value)
        if isinstance(value, CONSTANTS):
            return value
        if tree_leaves(value) != [value]:
            leaves, spec = tree_flatten(value)
            built = self.graph.call_function(_unflatten, cast(Any, ([self.argument(leaf) for leaf in leaves], spec)))
            return built
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            values = {f.name: self.argument(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return self.graph.call_function(_replaced, cast(Any, (type(value), values)))
        if callable(value) and not hasattr(value, "__self__"):
            return value
        raise TraceError(f"the forward passes on a {type(value).__name__} that is neither an argument nor the block's")


def is_code(value: Any) -> bool:
    """Whether a value is code that is made of a block's modules and tensors, not a function that is always the same."""
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return any(is_code(part) or not (callable(part) or isinstance(part, CONSTANTS)) for part in parts)
    return isinstance(value, (nn.Module, MethodType)) or (isinstance(value, FunctionType) and bool(value.__closure__))


def _meta_of(tensor: Tensor) -> dict[str, Any]:
    return {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "order": order_of(tensor)}


def _unflatten(leaves: list[Any], spec: Any) -> Any:
    return tree_unflatten(leaves, spec)


def _replaced(kind: Any, values: Mapping[str, Any]) -> Any:
    return kind(**values)
