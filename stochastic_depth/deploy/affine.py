"""Finds the last affine operations of a branch: multiplying their weights by a factor multiplies the branch's output.

The search follows the recording back from the branch's output, through operations that commute with a positive factor
(views, pooling, ReLU, dropout, sums) and into called children, to the weights and biases that the whole output depends
on. Other users of a value on this path must not see the factor. If they start with a linear map, as in
squeeze-and-excitation, x * sigmoid(W2 relu(W1 mean(x))), the weights of that map, W1, are divided by the factor.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.deploy.batches import Call
from stochastic_depth.deploy.branches import BranchWithGate
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit.errors import CutError, TraceError
from stochastic_depth.retrofit.finding.find import find_branches
from stochastic_depth.retrofit.finding.ways import optional_arguments, recordings
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.plain_forms import name_values_changed_in_place
from stochastic_depth.retrofit.rewriting.sums import Key, inlined_of, known_sums
from stochastic_depth.retrofit.rules import drop_path_rule
from stochastic_depth.torch_private import BatchNorm, InstanceNorm, RunningNorm, has_forward_hooks


class NotAffineError(Exception):
    """The factor of a branch cannot go into its weights; the message says why."""


class Holder(NamedTuple):
    """A parameter, by the module that holds it; `inverse` if it must be divided by the factor."""

    module: nn.Module
    name: str
    inverse: bool = False


class _Passed(NamedTuple):
    """Marks a call that passes the factor from its first argument to its result, instead of a parameter."""


_PASSED = _Passed()
_Ends = list[Holder | _Passed]


_AFFINE: set[Callable[..., Any]] = {
    cls.forward
    for cls in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        BatchNorm, nn.SyncBatchNorm, InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    )
}  # fmt: skip
_LINEAR: set[Callable[..., Any]] = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_HOMOGENEOUS: set[Callable[..., Any]] = {
    cls.forward
    for cls in (
        nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.LeakyReLU, nn.PReLU,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.Upsample,
        nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
        nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Fold, nn.Unfold,
    )
}  # fmt: skip
# Positions of weights and biases among the arguments of the functions that these modules call.
_WEIGHT_AND_BIAS: dict[Any, tuple[int, int]] = {
    F.linear: (1, 2), F.conv1d: (1, 2), F.conv2d: (1, 2), F.conv3d: (1, 2),
    F.batch_norm: (3, 4), F.instance_norm: (3, 4), F.layer_norm: (2, 3), F.group_norm: (2, 3), F.rms_norm: (2, -1),
}  # fmt: skip
# torchvision's Swin passes the last linear map of its attention to a function that cannot be traced.
_ATTENTION = {"shifted_window_attention": (2, 10)}
# Functions and methods that commute with a positive factor of their first argument.
_HOMOGENEOUS_NAMES = {
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "unsqueeze", "squeeze", "to",
    "type_as", "float", "half", "double", "bfloat16", "movedim", "swapaxes", "clone", "type", "view_as", "reshape_as",
    "chunk", "split", "unbind", "expand", "expand_as", "repeat", "roll", "flip", "narrow", "select", "neg", "t",
    "index_select", "mean", "sum", "relu", "relu_", "leaky_relu", "dropout", "dropout_", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d", "max_pool2d",
    "max_pool3d", "interpolate", "pixel_shuffle", "pixel_unshuffle", "fold", "unfold", "truediv", "itruediv",
    "div", "div_",
}  # fmt: skip
# Those of them that return several values.
_PARTS = {"chunk", "split", "unbind"}
# Methods that use only the size or type of their second argument.
_LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}
_SUMS = {"add", "add_", "iadd", "sub", "sub_", "isub", "__add__", "__radd__", "__iadd__", "__sub__"}
_PRODUCTS = {"mul", "mul_", "imul", "multiply", "__mul__", "__rmul__", "matmul", "imatmul", "bmm", "__matmul__"}
_LISTS = {"cat", "concat", "stack", "hstack", "vstack"}


Calls = Mapping[nn.Module, Sequence[Call]]
"""Calls of blocks in an example."""


def last_affine(model: nn.Module, branch: BranchWithGate, calls: Calls) -> list[Holder]:
    """The parameters that scale a branch's output when all are multiplied (or divided) by one positive factor.

    For a whole layer with drop paths inside, they scale the output of each of its branches.

    Args:
        model: the stochastic model.
        branch: one of its branches.
        calls: calls in which the same weights must come last as in a call with the defaults; may be empty.

    Raises:
        NotAffineError: if there are none: the branch ends in something else, or other code uses its weights too.
    """
    found = branch.found
    if found.kind == "layer":
        if not found.drop_paths:
            raise NotAffineError("the branch is a whole layer, whose output also contains its input")
        return [holder for inner in _inner_branches(branch) for holder in last_affine(model, inner, calls)]
    if found.key is None and not isinstance(found.module, Residual):
        raise NotAffineError(found.cause)
    holders: list[Holder] = []
    for end in _ends_in_all_calls(branch, calls):
        if isinstance(end, _Passed):
            raise NotAffineError("it ends in what it was given")
        holders.append(end)
    # If the block itself is used in several places, each of them has the same factor.
    places = num_places(model, found.module)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for holder in holders:
        if uses[id(parameter_of(holder))] != places:
            raise NotAffineError(f"{_described(holder)} is shared with another part of the model")
    if len({id(parameter_of(holder)) for holder in holders}) < len(holders):
        raise NotAffineError("one of its last weights is used in several ways")
    return holders


def num_places(model: nn.Module, module: nn.Module) -> int:
    """The number of places in a model that hold a module."""
    return sum(other is module for _, other in model.named_modules(remove_duplicate=False))


def _inner_branches(layer: BranchWithGate) -> list[BranchWithGate]:
    """The branches of the drop paths inside a whole layer; each has the layer's factor."""
    try:
        inner = find_branches(layer.found.module, None, None, with_schedule=False)
    except ValueError as error:
        raise NotAffineError(f"the branches inside the layer cannot be found: {error}") from None
    return [BranchWithGate(each, layer.gated, inner.drop_paths.get(each.module, ())) for each in inner.branches]


def last_child(model: nn.Module, branch: BranchWithGate, calls: Calls) -> tuple[nn.Module, tuple[int, ...]]:
    """The child whose output is the branch's output, up to operations that commute with a factor.

    Returns:
        The child, and the position of the branch's values in its output: () for the output itself, (0,) for its first
        entry.

    Raises:
        NotAffineError: if there is none, or other code uses it too.
    """
    block, key = branch.found.module, branch.found.key
    assert key is not None
    ends = {
        _last_child(*end, block)
        for graph in _graphs_of_all_calls(block, branch.drop_paths, calls)
        if (end := _branch_end(graph, block, key, branch.drop_paths)) is not None
    }
    if len(ends) != 1:
        raise NotAffineError("which child comes last depends on the call")
    (end,) = ends
    if num_places(model, end[0]) != num_places(model, block):
        raise NotAffineError(f"another part of the model uses {type(end[0]).__name__} too")
    return end


def _last_child(value: fx.Node, consumer: fx.Node, block: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    path: tuple[int, ...] = ()
    while True:
        others = [user for user in _users(value) if user is not consumer]
        if not all(path and _is_other_entry(user, path[0]) for user in others):
            raise NotAffineError(f"{value.name} is used several times")
        function: Any = value.target
        if value.op == "call_module":
            child = block.get_submodule(cast(str, value.target))
            if not _passes_on(child):
                _refuse_several_uses(value, child, block)
                return child, path
        elif function is operator.getitem and isinstance(value.args[1], int) and not path:
            path = (value.args[1],)
        elif value.op not in ("call_function", "call_method") or _name_of(value) not in _HOMOGENEOUS_NAMES or path:
            raise NotAffineError(f"it ends in {value.name}")
        if not value.args or not isinstance(value.args[0], fx.Node):
            raise NotAffineError(f"it ends in {value.name}")
        value, consumer = value.args[0], value


def _passes_on(child: nn.Module) -> bool:
    """Whether a child commutes with a positive factor of its first argument."""
    is_homogeneous = drop_path_rule(child) is not None or plain_class(child).forward in _HOMOGENEOUS
    return is_homogeneous and not is_customized(child)


def is_customized(module: nn.Module) -> bool:
    """Whether a module has hooks or its own forward, so that a call does more than its class's forward."""
    return "forward" in module.__dict__ or has_forward_hooks(module) or type(module).__call__ is not nn.Module.__call__


def _refuse_customized(module: nn.Module) -> None:
    if is_customized(module):
        raise NotAffineError(f"a {plain_class(module).__name__} at its end has a hook or its own forward")


def _ends_in_all_calls(branch: BranchWithGate, calls: Calls) -> _Ends:
    block, key = branch.found.module, branch.found.key
    if key is None:
        return _of_child(cast(Residual, block).branch, ((object(),), {}), ())
    ends = [
        _branch_end(graph, block, key, branch.drop_paths)
        for graph in _graphs_of_all_calls(block, branch.drop_paths, calls)
    ]
    return _agreed([_follow(*end, block) for end in ends if end is not None])


def _graphs_of_all_calls(block: nn.Module, drop_paths: Sequence[str], calls: Calls) -> list[fx.Graph]:
    """Recordings of a block in these calls, and in calls with its defaults and all that may be given, in both modes.

    A drop path may be called in training only, and code that can be recorded in one mode may branch on values in the
    other.
    """
    graphs: dict[str, fx.Graph] = {}  # without duplicates
    first_error: TraceError | None = None
    optional = optional_arguments(block)
    for arguments in (*calls.get(block, ()), None, *([optional] if optional else [])):
        for other_mode in (False, True):
            try:
                for way in recordings(block, arguments, other_mode=other_mode, inlined=inlined_of(drop_paths)):
                    graphs.setdefault(str(way.graph), way.graph)
            except TraceError as error:
                first_error = first_error or error
    if not graphs:
        raise NotAffineError(str(first_error))
    return list(graphs.values())


def _branch_end(
    graph: fx.Graph, block: nn.Module, key: Key, drop_paths: Sequence[str]
) -> tuple[fx.Node, fx.Node] | None:
    """The branch's output and its user; None if the branch does not occur in the recording."""
    residual = known_sums(graph, block, drop_paths).get(key)
    if residual is None:
        return None
    if isinstance(residual, CutError):
        if not drop_paths:
            return None
        node = drop_path_call(graph, key)  # It is masked at its drop path.
        return cast(fx.Node, node.args[0]), node
    return residual.output, residual.add


def drop_path_call(graph: fx.Graph, key: Key) -> fx.Node:
    """The call of a branch's drop path in a recording."""
    return [node for node in graph.nodes if node.op == "call_module" and node.target == key[0]][key[1]]


def _agreed(found: Sequence[_Ends]) -> _Ends:
    if not found or any(set(other) != set(found[0]) for other in found):
        raise NotAffineError("which weights come last depends on the call")
    return found[0]


def _follow(value: fx.Node, consumer: fx.Node, block: nn.Module, path: tuple[int, ...] = ()) -> _Ends:
    """The parameters that scale `value`, which `consumer` uses; with `path`, its entry at that index."""
    others = [user for user in _users(value) if user is not consumer]
    if path and all(_is_other_entry(user, path[0]) for user in others):
        others = []
    hidden = _compensating(others, value, block)
    if _PASSED in hidden:
        raise NotAffineError(f"{value.name} leaves the block too")
    if value.op == "get_attr":
        return [*hidden, *_holder(block, cast(str, value.target), value.graph)]
    if value.op == "call_module":
        return [*hidden, *_of_call(value, block, path)]
    if value.op in ("call_function", "call_method"):
        return [*hidden, *_of_function(value, block, path)]
    if value is next(iter(value.graph.nodes)):
        return [*hidden, _PASSED]
    raise NotAffineError("it ends in what it was given")


def _compensating(users: Iterable[fx.Node], value: fx.Node, block: nn.Module) -> _Ends:
    """The parameters to divide by the factor so that these users compute the same as without a factor in `value`."""
    return [end for user in users for end in _compensating_one(user, value, block)]


def _compensating_one(user: fx.Node, value: fx.Node, block: nn.Module) -> _Ends:
    if user.op == "output" and user.args[0] is value:
        return [_PASSED]
    if not (
        user.args and user.args[0] is value and all(is_size(each) or each is value for each in user.all_input_nodes)
    ):
        raise NotAffineError(f"{value.name} is used by {user.name} too")
    if user.op == "call_module":
        child = block.get_submodule(cast(str, user.target))
        _refuse_customized(child)
        if plain_class(child).forward not in _HOMOGENEOUS:
            _refuse_several_uses(user, child, block)
            if plain_class(child).forward in _LINEAR:
                return [Holder(child, holder.name, inverse=True) for holder in _weight_and_bias(child)[:1]]
            if plain_class(child).forward in _AFFINE:
                raise NotAffineError(f"{value.name} is used by a {type(child).__name__} too")
            graphs = _graphs(child, (user.args, dict(user.kwargs)))
            inputs = [next(iter(graph.nodes)) for graph in graphs]
            ends = _agreed([_compensating(_users(own), own, child) for own in inputs])
            if _PASSED not in ends:
                return ends
            return [*(end for end in ends if end != _PASSED), *_compensating(_users(user), user, block)]
    elif _name_of(user) not in _HOMOGENEOUS_NAMES:
        raise NotAffineError(f"{value.name} is used by {user.name} too")
    return _compensating(_users(user), user, block)


def _users(value: fx.Node) -> list[fx.Node]:
    """The nodes that use a value, not only its size or type."""
    return [
        user for user in value.users if not is_size(user) and not (user.target in _LIKE and user.args[0] is not value)
    ]


def _is_other_entry(node: fx.Node, index: int) -> bool:
    return node.target is operator.getitem and isinstance(node.args[1], int) and node.args[1] != index


def _of_call(call: fx.Node, block: nn.Module, path: tuple[int, ...]) -> _Ends:
    child = block.get_submodule(cast(str, call.target))
    if _passes_on(child):
        return _follow(cast(fx.Node, call.args[0]), call, block, path)
    _refuse_several_uses(call, child, block)
    ends: _Ends = []
    for end in _of_child(child, (call.args, dict(call.kwargs)), path):
        if not isinstance(end, _Passed):
            ends.append(end)
        elif call.args and isinstance(call.args[0], fx.Node):
            ends += _follow(call.args[0], call, block)
        else:
            raise NotAffineError("it ends in what it was given")
    return ends


def _refuse_several_uses(call: fx.Node, child: nn.Module, block: nn.Module) -> None:
    calls = [node for node in call.graph.nodes if node.op == "call_module"]
    if sum(block.get_submodule(cast(str, node.target)) is child for node in calls) > 1:
        raise NotAffineError(f"{call.target} ({type(child).__name__}) is called several times")
    read = [cast(str, node.target) for node in call.graph.nodes if node.op == "get_attr" and node.users]
    if target := next((each for each in read if each.startswith(f"{call.target}.")), None):
        raise NotAffineError(f"the code uses {target} beside the call of {call.target} ({type(child).__name__})")


def _of_child(child: nn.Module, arguments: Any, path: tuple[int, ...]) -> _Ends:
    _refuse_customized(child)
    plain = plain_class(child)
    if plain.forward is nn.MultiheadAttention.forward and path[:1] == (0,):
        return [*_weight_and_bias(cast(nn.MultiheadAttention, child).out_proj)]
    if plain.forward in _AFFINE:
        return [*_weight_and_bias(child)]
    return _agreed([_of_output(graph, child, path) for graph in _graphs(child, arguments)])


def _graphs(child: nn.Module, arguments: Any) -> list[fx.Graph]:
    """Recordings of a child in a call, one for each path that its decisions on sizes allow."""
    try:
        try:
            ways = list(recordings(child, arguments))
        except TraceError:
            ways = list(recordings(child, arguments, with_buffers=True))
    except TraceError as error:
        raise NotAffineError(f"the forward of {type(child).__name__} cannot be recorded: {error}") from None
    for way in ways:
        name_values_changed_in_place(way.graph, child)
    return [way.graph for way in ways]


def _of_output(graph: fx.Graph, module: nn.Module, path: tuple[int, ...]) -> _Ends:
    end = next(iter(reversed(graph.nodes)))
    output = end.args[0]
    while isinstance(output, (tuple, list)) and path:
        output, path = cast("list[Any]", output)[path[0]], path[1:]
    if not isinstance(output, fx.Node):
        raise NotAffineError(f"{type(module).__name__} returns more than one value")
    return _follow(output, end, module, path)


def _name_of(node: fx.Node) -> str:
    function: Any = node.target
    return function if isinstance(function, str) else getattr(function, "__name__", str(function))


def _of_function(node: fx.Node, block: nn.Module, path: tuple[int, ...]) -> _Ends:
    function: Any = node.target
    name = _name_of(node)
    args = node.args
    if function in _WEIGHT_AND_BIAS or name in _ATTENTION:
        indices, prefix = (_ATTENTION[name], "proj_") if name in _ATTENTION else (_WEIGHT_AND_BIAS[function], "")
        weight, bias = (
            _argument(node, index, prefix + key) for index, key in zip(indices, ("weight", "bias"), strict=True)
        )
        if not isinstance(weight, fx.Node):
            raise NotAffineError(f"it ends in a call of {name} without weights")
        return [part for each in (weight, bias) if isinstance(each, fx.Node) for part in _follow(each, node, block)]
    if function is operator.getitem and isinstance(args[0], fx.Node):
        is_entry = isinstance(args[1], int) and args[0].op == "call_module"
        return _follow(args[0], node, block, (cast(int, args[1]), *path) if is_entry else path)
    if function is getattr and args[1] in ("T", "mT"):
        return _follow(cast(fx.Node, args[0]), node, block)
    if function is F.scaled_dot_product_attention:
        return _follow(cast(fx.Node, _argument(node, 2, "value")), node, block)
    if function is F.pad:
        if (_argument(node, 3, "value") or 0) != 0:
            raise NotAffineError("it ends in padding with a number")
        return _follow(cast(fx.Node, args[0]), node, block)
    if name in _SUMS:
        if not all(isinstance(each, fx.Node) for each in args[:2]):
            raise NotAffineError("it ends in an addition of a number")
        operands = dict.fromkeys(cast("tuple[fx.Node, ...]", args[:2]))
        return [part for each in operands for part in _follow(each, node, block)]
    if name in _LISTS:
        entries = dict.fromkeys(cast("Sequence[fx.Node]", args[0]))
        return [part for each in entries for part in _follow(each, node, block)]
    if name in _PRODUCTS:
        return _of_product([each for each in args[:2] if isinstance(each, fx.Node)], node, block)
    if name in _PARTS and path:
        raise NotAffineError(f"it ends in one of several parts of {args[0]}")  # The others are used elsewhere.
    if name in _HOMOGENEOUS_NAMES and args and isinstance(args[0], fx.Node):
        return _follow(args[0], node, block)
    raise NotAffineError(f"it ends in a call of {name}")


def _argument(node: fx.Node, index: int, name: str) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[index] if 0 <= index < len(node.args) else None


def _of_product(factors: list[fx.Node], product: fx.Node, block: nn.Module) -> _Ends:
    reasons: list[NotAffineError] = []
    # A parameter comes first, such as a LayerScale: then nothing else needs to be traced.
    for factor in sorted(dict.fromkeys(factors), key=lambda each: not _is_parameter(each)):
        try:
            if factors.count(factor) > 1:
                raise NotAffineError(f"it ends in the square of {factor.name}")
            return _follow(factor, product, block)
        except NotAffineError as reason:
            reasons.append(reason)
    raise reasons[0]


def _is_parameter(node: fx.Node) -> bool:
    while node.op in ("call_method", "call_function") and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"


def _holder(block: nn.Module, target: str, graph: fx.Graph) -> list[Holder]:
    path, _, name = target.rpartition(".")
    module = block.get_submodule(path)
    if name not in dict(module.named_parameters(recurse=False)):
        raise NotAffineError(f"it ends in {target}, which is not a parameter")
    if sum(node.op == "get_attr" and node.target == target and bool(node.users) for node in graph.nodes) > 1:
        raise NotAffineError(f"the parameter {target} is used several times")
    return [Holder(module, name)]


def _weight_and_bias(module: nn.Module) -> list[Holder]:
    plain = dict(module.named_parameters(recurse=False))
    holders = [Holder(module, name) for name in ("weight", "bias") if name in plain]
    if not holders or holders[0].name != "weight":
        what = "without weights" if isinstance(module, RunningNorm) else "whose weight is no plain parameter"
        raise NotAffineError(f"it ends in a {type(module).__name__} {what}")
    if len(holders) == 1 and getattr(module, "bias", None) is not None:
        raise NotAffineError(f"it ends in a {type(module).__name__} whose bias is no plain parameter")
    return holders


def parameter_of(holder: Holder) -> nn.Parameter:
    """What is multiplied."""
    return cast(nn.Parameter, getattr(holder.module, holder.name))


def _described(holder: Holder) -> str:
    return f"the {holder.name} of its last {type(holder.module).__name__}"


@torch.no_grad()
def multiply_(holders: Sequence[Holder], factor: float) -> None:
    """Multiply the parameters in place, and divide the inverse ones."""
    for holder in holders:
        parameter_of(holder).mul_(1 / factor if holder.inverse else factor)
