"""Blocks of other libraries without some of their branches, as `torch.fx.GraphModule`s of the rest of their forward.

Such a module does not need this library, not even for loading. Its parts keep their names. It takes the block's
arguments, and raises an error for a call that would have taken another path through the block's code than the recorded
one.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import fx, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.deploy.affine import drop_path_call
from stochastic_depth.deploy.batches import Call
from stochastic_depth.retrofit.code.signatures import OPAQUE, PLAIN_TYPES, Opaque, flatten
from stochastic_depth.retrofit.errors import CutError, TraceError
from stochastic_depth.retrofit.finding.ways import recordings
from stochastic_depth.retrofit.hidden_states import (
    adding_children,
    continued_input,
    leaf_names,
    number_of_hidden_states,
)
from stochastic_depth.retrofit.layers import with_first
from stochastic_depth.retrofit.recording.sizes import decide_by, is_size
from stochastic_depth.retrofit.recording.trace import Recording, record
from stochastic_depth.retrofit.rewriting.cuts import Sum, cut
from stochastic_depth.retrofit.rewriting.operations import added, writes_in_place
from stochastic_depth.retrofit.rewriting.sums import Key, inlined_of, known_sums
from stochastic_depth.torch_private import assert_in_graph, child_dict, tree_map

_Recorded = TypeVar("_Recorded")


def without_branches(
    block: nn.Module,
    drop_paths: Sequence[str],
    dropped: Collection[Key],
    factors: Mapping[Key, float],
    call: Call | None,
) -> fx.GraphModule:
    """A block without the dropped branches, and others multiplied by factors.

    Args:
        block: the block, plain or stochastic; it is not changed and shares the remaining children with the result.
        drop_paths: paths of its drop paths, whose calls are branches; empty if the branches are additions.
        dropped: the branches to drop.
        factors: the branches to multiply.
        call: an example call; None if the defaults of its arguments are enough.

    Returns:
        The `GraphModule`.

    Raises:
        ValueError: if this is impossible; the message says why.
    """
    try:
        parameters, recording = _recorded(block, call, inlined_of(drop_paths))
        graph = recording.graph
        sums = known_sums(graph, block, drop_paths)
        writes = [node for node in graph.nodes if _writes(node, block)]
        gone: set[fx.Node] = set()
        replaced: dict[fx.Node, fx.Node] = {}
        for key, residual in sums.items():
            if key in dropped:
                if isinstance(residual, CutError):
                    raise residual
                gone.update(_drop(residual.after(replaced), block, replaced))
            elif key in factors:
                _scale(key, residual, replaced, factors[key], graph)
        _erase_idle(recording, [node for node in writes if node not in gone], block)
        return _with_signature(block, recording, parameters)
    except (CutError, TraceError) as error:
        raise ValueError(f"The branch of {plain_class(block).__name__} cannot be removed: {error}.") from error


def without_layer(layer: nn.Module, call: Call | None) -> fx.GraphModule:
    """The replacement of a dropped layer, which returns its hidden states, and what else it was given and returns.

    Raises:
        ValueError: if the structure of the layer's output cannot be determined.
    """
    try:
        parameters, recording = _recorded(layer, call)
        end = next(iter(reversed(recording.graph.nodes)))
        inputs = [node for node in recording.graph.nodes if node.op == "placeholder"]
        output: Any = fx.map_arg(end.args[0], lambda node: node if node in inputs else cast(fx.Node, None))
        leaves: list[Any] = []
        flatten(list(parameters.values()), leaves)
        number = number_of_hidden_states(
            leaves,
            leaf_names(parameters.items()),
            plain_class(layer),
            lambda: continued_input(_recorded(layer, call, adding_children(layer))[1].graph, layer),
        )
        end.args = (with_first(output, inputs[number or 0]),)
        _erase_idle(recording, (), layer)
        return _with_signature(layer, recording, parameters)
    except TraceError as error:
        raise ValueError(f"The structure that {plain_class(layer).__name__} returns is unknown: {error}.") from error


def _recorded(block: nn.Module, call: Call | None, inlined: Collection[str] = ()) -> tuple[dict[str, Any], Recording]:
    """The values of the block's parameters in a call, and the recording of that call."""
    signature = inspect.signature(plain_class(block).forward.__get__(block))
    if call is None:
        args: list[Any] = []
        for parameter in signature.parameters.values():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.KEYWORD_ONLY):
                args.append(OPAQUE if parameter.default is parameter.empty else parameter.default)
        bound = signature.bind(*args)
    else:
        bound = signature.bind(*call[0], **call[1])
    bound.apply_defaults()
    if call is None:
        defaults = bound.args, bound.kwargs
        ways = _in_either_mode(
            lambda other_mode: list(recordings(block, defaults, other_mode=other_mode, inlined=inlined))
        )
        if len({str(way.graph) for way in ways}) > 1:
            raise TraceError("its code depends on the sizes of its inputs: pass an example as inputs")
        return dict(bound.arguments), ways[0]
    leaves: list[Any] = []
    structure = flatten((bound.args, dict(bound.kwargs)), leaves)
    decide = functools.partial(decide_by, leaves)
    recording = _in_either_mode(
        lambda other_mode: record(block, structure, len(leaves), decide, other_mode=other_mode, inlined=inlined)
    )
    return dict(bound.arguments), recording


def _in_either_mode(recorded: Callable[[bool], _Recorded]) -> _Recorded:
    """A recording in the block's mode, or in the other mode if that fails.

    In evaluation, PyTorch's encoder layer checks with code that cannot be recorded whether a fused operation applies.
    If none does, it computes the same as in training.
    """
    try:
        return recorded(False)
    except TraceError:
        try:
            return recorded(True)
        except TraceError:
            pass
        raise


def _drop(residual: Sum, block: nn.Module, replaced: dict[fx.Node, fx.Node]) -> Sequence[fx.Node]:
    """Remove a branch from its sum, and return the nodes that only the branch needed, including the sum."""
    if residual.shortcut is None:
        raise CutError("the branch is added to nothing, so nothing would be left without it")
    branch = cut(residual, block)
    add, instead = residual.add, residual.shortcut
    if _may_be_changed(add, block):
        # Code that changes the sum in place would now change the shortcut, which other code uses.
        with add.graph.inserting_before(add):
            instead = add.graph.call_method("clone", (residual.shortcut,))
    add.replace_all_uses_with(instead)
    add.graph.erase_node(add)
    replaced[add] = instead
    for side in branch.sides:  # attention maps
        side.replace_all_uses_with(cast(fx.Node, None))
    return (*branch.nodes, add)


def _may_be_changed(value: fx.Node, block: nn.Module) -> bool:
    """Whether a user of a value may change it in place, directly, through a view, or in a child."""
    for user in value.users:
        if user.op == "output" or is_size(user) or user.all_input_nodes[0] is not value:
            continue
        is_own = added(user) is not None  # returns a new tensor
        if user.op == "call_module":
            child = block.get_submodule(cast(str, user.target))
            if any(getattr(module, "inplace", False) for module in child.modules()):
                return True
            is_own = next(child.parameters(), None) is not None
        if writes_in_place(user, block) or (not is_own and _may_be_changed(user, block)):
            return True
    return False


def _writes(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node changes a value in place, or may exist to do so: a child whose result is ignored."""
    if node.op == "call_module" and not node.users:
        child = block.get_submodule(cast(str, node.target))
        return any(getattr(module, "inplace", False) for module in child.modules())
    return writes_in_place(node, block)


def _erase_idle(recording: Recording, writes: Collection[fx.Node], block: nn.Module) -> None:
    """Erase nodes that nothing needs anymore; `writes` are needed if the values that they change are."""
    nodes = list(recording.graph.nodes)
    needed = {node for node in nodes if node.op == "placeholder"}
    pending = [nodes[-1], *(node for node, _ in recording.conditions)]
    while pending:
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending.extend(node.all_input_nodes)
        pending = [node for node in writes if node not in needed and _memory_written(node, block) in needed]
    for node in reversed(nodes):
        if node not in needed:
            recording.graph.erase_node(node)


def _memory_written(node: fx.Node, block: nn.Module) -> fx.Node:
    """The first value whose memory a node may change, found through the chain of first arguments."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op == "call_module":
            child = block.get_submodule(cast(str, node.target))
            if next(child.parameters(), None) is not None:
                break  # it returns a new tensor
    return node


class ScaledForward(NamedTuple):
    """A block's forward with scaled branches, for one form of call.

    Attributes:
        function: takes the block and the opaque arguments.
        recording: tells which calls it is valid for.
    """

    function: Callable[..., Any]
    recording: Recording


def scaled_forward(
    block: nn.Module, drop_paths: Sequence[str], factors: Mapping[Key, float], signature: Any, leaves: Sequence[Any]
) -> ScaledForward:
    """A block's forward with some of its branches multiplied by factors.

    Args:
        block: the block.
        drop_paths: paths of its drop paths, whose calls are branches; empty if the branches are additions.
        factors: the branches to multiply; branches that do not occur in the call are left out.
        signature: signature of the call, from `flatten`.
        leaves: its opaque arguments.

    Raises:
        CutError: if a branch cannot be separated from the rest of the code.
        TraceError: if the code cannot be recorded.
    """
    decide = functools.partial(decide_by, leaves)
    recording = record(block, signature, len(leaves), decide, inlined=inlined_of(drop_paths))
    graph = fx.Graph()
    graph.output(graph.graph_copy(recording.graph, {}))
    for key, residual in known_sums(graph, block, drop_paths).items():
        if key in factors:
            if isinstance(residual, CutError) and not drop_paths:
                raise residual
            _scale(key, residual, {}, factors[key], graph)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{plain_class(block).__name__}: the forward with scaled branches>", "exec"), namespace)
    return ScaledForward(namespace["forward"], recording)


def _scale(
    key: Key, residual: Sum | CutError, replaced: Mapping[fx.Node, fx.Node], factor: float, graph: fx.Graph
) -> None:
    value = drop_path_call(graph, key) if isinstance(residual, CutError) else residual.after(replaced).output
    consumer = None if isinstance(residual, CutError) or residual.add is value else residual.add
    _multiply(value, consumer, factor)


def _multiply(value: fx.Node, consumer: fx.Node | None, factor: float) -> None:
    with value.graph.inserting_after(value):
        product = value.graph.call_function(operator.mul, (value, factor))
    value.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product and consumer in (None, user))


def _with_signature(block: nn.Module, recording: Recording, values: Mapping[str, Any]) -> fx.GraphModule:
    """The module of a recording. It takes the block's arguments and checks those that the recording depends on."""
    graph = fx.Graph()
    leaves: list[fx.Node] = []
    checks: list[tuple[fx.Node, Any]] = []
    parameters = inspect.signature(plain_class(block).forward.__get__(block)).parameters
    nodes: list[fx.Node] = []
    for name, parameter in parameters.items():
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        nodes.append(graph.placeholder(star + name, default_value=parameter.default))
    for node, value in zip(nodes, values.values(), strict=True):
        _unpack(node, flatten(value, []), leaves, checks)
    recorded = [node for node in recording.graph.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = dict(zip(recorded, leaves, strict=True))
    graph.output(graph.graph_copy(recording.graph, copies))
    for leaf in reversed(leaves):
        while not leaf.users and leaf.op != "placeholder":  # unpacked but unused
            leaf, unpacked = cast(fx.Node, leaf.args[0]), leaf
            graph.erase_node(unpacked)
    with graph.inserting_before(next(iter(reversed(graph.nodes)))):
        for node, value in checks:
            _assert(graph, graph.call_function(operator.eq, (node, value)), f"{node.name} must be {value!r}", block)
        for node, value in recording.conditions:
            _assert_condition(graph, copies[node], value, block)
    graph.lint()
    made = fx.GraphModule(block, graph, plain_class(block).__name__)
    for path, module in made.named_modules():  # a GraphModule makes all buffers persistent
        of_state = block.get_submodule(path).state_dict(keep_vars=True)
        for name, _ in list(module.named_buffers(recurse=False)):
            if name not in of_state:
                module.register_buffer(name, getattr(module, name), persistent=False)
    for name, value in block.__dict__.items():  # a model's code may read the block's attributes
        if isinstance(value, PLAIN_TYPES) and not name.startswith("_") and name != "training":
            setattr(made, name, value)
    return made


def is_identity(module: fx.GraphModule) -> bool:
    """Whether a module only returns its first argument."""
    end = next(iter(reversed(module.graph.nodes)))
    return unchanged_outputs(module) == [end.args[0]]


def unchanged_outputs(module: fx.GraphModule) -> list[fx.Node]:
    """The outputs of a module that are its first argument itself."""
    end = next(iter(reversed(module.graph.nodes)))
    return [node for node in end.all_input_nodes if _is_first_argument(node, module)]


def _is_first_argument(node: fx.Node, module: fx.GraphModule) -> bool:
    while node.op == "call_module" and type(module.get_submodule(cast(str, node.target))) is nn.Identity:
        node = cast(fx.Node, node.args[0])
    return node is next(iter(node.graph.nodes))


def takes_one_argument(module: nn.Module) -> bool:
    """Whether a module's forward can be called with one argument only.

    A model may iterate over its Sequential and pass more arguments to the modules, as timm's ViT does.
    """
    _, *parameters = inspect.signature(plain_class(module).forward).parameters.values()  # without self
    return [each.kind for each in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _unpack(node: fx.Node, signature: Any, leaves: list[fx.Node], checks: list[tuple[fx.Node, Any]]) -> None:
    if isinstance(signature, Opaque):
        leaves.append(node)
        return
    kind, content = signature
    if _is_structure(kind) and _has_opaque(signature):
        entries = content if kind is dict else enumerate(content)
        for key, entry in entries:
            _unpack(node.graph.call_function(operator.getitem, (node, key)), entry, leaves, checks)
    else:
        checks.append((node, _value(signature)))


def _has_opaque(signature: Any) -> bool:
    if isinstance(signature, Opaque):
        return True
    kind, content = signature
    if kind is dict:
        return any(_has_opaque(entry) for _, entry in content)
    return _is_structure(kind) and any(_has_opaque(entry) for entry in content)


def _is_structure(kind: type) -> bool:
    return kind in (tuple, list, dict) or hasattr(kind, "_fields")  # a named tuple


def _value(signature: Any) -> Any:
    kind, content = signature
    if kind is dict:
        return {key: _value(entry) for key, entry in content}
    if hasattr(kind, "_fields"):
        return kind(*map(_value, content))
    return kind(map(_value, content)) if kind in (tuple, list) else content


def _assert_condition(graph: fx.Graph, node: fx.Node, value: Any, block: nn.Module) -> None:
    # Unpickling a GraphModule records it again, which bool() and len() do not allow.
    inner = cast(fx.Node, node.args[0])
    if node.target is bool:
        same = graph.call_function(operator.ne, (inner, 0))
    elif node.target is builtins.len:
        same = graph.call_method("__len__", (inner,))
    else:
        raise TraceError(f"its code depends on {node.name}")
    node.replace_all_uses_with(same)
    graph.erase_node(node)
    _assert(graph, graph.call_function(operator.eq, (same, value)), "it has another size", block)


def _assert(graph: fx.Graph, holds: fx.Node, what: str, block: nn.Module) -> None:
    message = (
        f"This {plain_class(block).__name__} was recorded for another call: {what}. Pass an example of the model's "
        "inputs to subnetwork."
    )
    graph.call_function(assert_in_graph, (holds, message))


def _of_same_form(value: Any) -> Any:
    """A tensor with the same shape, type and device but without its own memory; other values stay as they are."""
    return value.new_zeros(()).expand(value.shape) if type(value) is torch.Tensor else value


@contextmanager
def noted_calls(blocks: Collection[nn.Module]) -> Generator[dict[nn.Module, list[Call]]]:
    """Context that records how each of the blocks is called, one call per form."""
    calls: dict[nn.Module, list[Call]] = {}
    known: set[tuple[int, Any]] = set()

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        form = (id(block), flatten((args, kwargs), []))
        if form not in known:
            known.add(form)
            calls.setdefault(block, []).append(cast(Call, tree_map(_of_same_form, (args, kwargs))))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def replaced_(root: nn.Module, module: nn.Module, new: nn.Module) -> nn.Module:
    """Replace `module` with `new` everywhere in `root`, and return the root, which may be `new` itself."""
    if module is root:
        return new
    for parent, name in holders(root, module):
        setattr(parent, name, new)
    return root


def holders(root: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that hold a module, each with the attribute name."""
    return [
        (parent, name) for parent in root.modules() for name, child in child_dict(parent).items() if child is module
    ]
