"""Rewrites the recording of a block: every gated branch goes behind its gate; the rest stays the same."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import builtins
import keyword
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, fx, nn

from stochastic_depth.residual import GatedBranch, masked, outside_graph
from stochastic_depth.retrofit import cuts
from stochastic_depth.retrofit.checkpoints import put_in_checkpoints
from stochastic_depth.retrofit.cuts import CutError, SidesError, Sum
from stochastic_depth.retrofit.functional import FUNCTIONAL, FunctionalDropPath, put_functional
from stochastic_depth.retrofit.maps import NotComputed
from stochastic_depth.retrofit.recorder import Edit, Edits
from stochastic_depth.retrofit.sums import (
    DropPaths,
    Identity,
    Key,
    Paths,
    additions_of,
    calls_of,
    find_sums,
    identity,
    match,
    paths_of,
)
from stochastic_depth.retrofit.trace import TraceError, is_size
from stochastic_depth.torch_private import child_dict

Code = Callable[..., Any]


class BlockGates(Protocol):
    """What a block knows about its branches, as far as its rewritten code needs it."""

    name: str
    drop_paths: DropPaths
    known: dict[Key, Identity]
    gated: dict[Key, GatedBranch]
    rates: dict[Key, float]

    def parts_at(self, block: nn.Module, key: Key, paths: Paths) -> nn.Module:
        """What holds the parameters that a branch has on one way through the code."""
        ...


class GatedUse(NamedTuple):
    """Where a gated branch stands in a recording.

    Attributes:
        key: which of the known branches it is.
        call: number of the call that the plain reference changes: the sum, or the drop path.
        operand: which argument of that call is the branch's output; None where it is the result.
        scale: what the block's own code multiplies that by where nothing is dropped.
        cause: why the branch is masked; empty where it is skipped.
    """

    key: Key
    call: int
    operand: int | None
    scale: float = 1.0
    cause: str = ""


def edits_of(uses: Sequence[GatedUse], weights: Callable[[GatedUse], Any]) -> Edits:
    """The changes of a block's own code that multiply its branches by these weights."""
    edits: dict[int, list[Edit]] = {}
    for use in uses:
        edits.setdefault(use.call, []).append(Edit(use.operand, weights(use)))
    return edits


# Sizes that depend on the number of samples.


def generalize(graph: fx.Graph, other: fx.Graph) -> bool:
    """Let a recording hold for any number of samples, by comparison with one for another number of them.

    Numbers in the code that differ become sizes of the tensors beside them. Each node is told whether the first
    dimension of its value is one of samples (metadata `samples`).

    Args:
        graph: the recording; it is changed.
        other: of the same call with another number of samples.

    Returns:
        Whether that is possible; if not, nothing is changed.
    """
    nodes, others = list(graph.nodes), list(other.nodes)
    if len(nodes) != len(others):
        return False
    twin = dict(zip(nodes, others, strict=True))
    changes: list[tuple[fx.Node, Any, Any]] = []
    for node, its in twin.items():
        same_call = node.op == its.op and (node.target == its.target or _is_wrapped(node, its))
        if not same_call or not _same_form(node.args, its.args, twin) or not _same_form(node.kwargs, its.kwargs, twin):
            return False
        if _differ(node.args, its.args) or _differ(node.kwargs, its.kwargs):
            changes.append((node, its, _rows(node, twin)))
    if any(rows is None for _, _, rows in changes):
        return False
    for node, its in twin.items():
        shape, its_shape = node.meta.get("shape"), its.meta.get("shape")
        if shape is not None and its_shape is not None:
            node.meta["samples"] = shape[:1] != its_shape[:1]
    for node, its, (source, here, there) in changes:
        with graph.inserting_before(node):
            rows = graph.call_function(operator.getitem, (graph.call_function(getattr, (source, "shape")), 0))

            def sized(a: Any, b: Any, rows: fx.Node = rows, here: int = here, there: int = there) -> Any:
                return _map_two(a, b, lambda x, y: _affine(graph, rows, here, there, x, y))

            args, kwargs = sized(node.args, its.args), sized(node.kwargs, its.kwargs)
        node.args, node.kwargs = args, kwargs
    return True


def _is_wrapped(node: fx.Node, its: fx.Node) -> bool:
    """Whether both are a function under settings of its own, which is another object in every recording."""
    return getattr(node.target, "__name__", 0) == getattr(its.target, "__name__", 1) and "settings" in node.meta


def _same_form(a: Any, b: Any, twin: Mapping[fx.Node, fx.Node]) -> bool:
    if isinstance(a, fx.Node):
        return twin.get(a) is b
    if type(a) is not type(b) and not (isinstance(a, (tuple, list)) and isinstance(b, (tuple, list))):
        return False
    if isinstance(a, (tuple, list)):
        first, second = cast("list[Any]", a), cast("list[Any]", b)
        return len(first) == len(second) and all(_same_form(x, y, twin) for x, y in zip(first, second, strict=True))
    if isinstance(a, dict):
        mine, its = cast("dict[Any, Any]", a), cast("dict[Any, Any]", b)
        return mine.keys() == its.keys() and all(_same_form(mine[key], its[key], twin) for key in mine)
    if isinstance(a, slice):
        return all(_same_form(getattr(a, n), getattr(b, n), twin) for n in ("start", "stop", "step"))
    return a is b or a == b or (type(a) is int and type(b) is int)


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node):
        return False
    if isinstance(a, (tuple, list)):
        return any(_differ(x, y) for x, y in zip(cast("list[Any]", a), b, strict=True))
    if isinstance(a, dict):
        return any(_differ(a[key], b[key]) for key in cast("dict[Any, Any]", a))
    if isinstance(a, slice):
        return any(_differ(getattr(a, name), getattr(b, name)) for name in ("start", "stop", "step"))
    return type(a) is int and a != b


def _rows(node: fx.Node, twin: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, int, int] | None:
    """A tensor whose first dimension follows the number of samples, best one that the node itself uses."""
    earlier = list(node.all_input_nodes)
    earlier += [other for other in node.graph.nodes if other.op == "placeholder"]
    for source in earlier:
        shape, its = source.meta.get("shape"), twin[source].meta.get("shape")
        if shape and its and shape[0] != its[0]:
            return source, shape[0], its[0]
    return None


def _map_two(a: Any, b: Any, function: Callable[[int, int], Any]) -> Any:
    if isinstance(a, (tuple, list)):
        kind = tuple if isinstance(a, tuple) else list
        return kind(_map_two(x, y, function) for x, y in zip(cast("list[Any]", a), b, strict=True))
    if isinstance(a, dict):
        return {key: _map_two(value, b[key], function) for key, value in cast("dict[Any, Any]", a).items()}
    if isinstance(a, slice):
        return slice(*(_map_two(getattr(a, n), getattr(b, n), function) for n in ("start", "stop", "step")))
    return function(a, b) if type(a) is int and a != b else a


def _affine(graph: fx.Graph, rows: fx.Node, here: int, there: int, x: int, y: int) -> fx.Node:
    """The number that is `x` for as many rows as `here` and `y` for as many as `there`."""
    slope = Fraction(x - y, here - there)
    node = rows if slope.numerator == 1 else graph.call_function(operator.mul, (rows, slope.numerator))
    if slope.denominator != 1:
        node = graph.call_function(operator.floordiv, (node, slope.denominator))
    offset = x - slope * here
    if offset != 0:
        node = graph.call_function(operator.add, (node, int(offset)))
    return node


def skeleton(graph: fx.Graph, *, with_numbers: bool = False) -> tuple[Any, ...]:
    """What a recording does, to be compared with another.

    Args:
        graph: the recording.
        with_numbers: whether the real numbers in it count; a factor that changes with every step changes nothing else.
    """
    index = {node: position for position, node in enumerate(graph.nodes)}

    def of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return index[value]
        if isinstance(value, (tuple, list)):
            return type(value).__name__, tuple(of(item) for item in cast("list[Any]", value))
        if isinstance(value, dict):
            return tuple((key, of(item)) for key, item in cast("dict[Any, Any]", value).items())
        if isinstance(value, slice):
            return "slice", of(value.start), of(value.stop), of(value.step)
        return type(value).__name__ if type(value) is float and not with_numbers else repr(value)

    return tuple(
        (
            node.op,
            node.target if isinstance(node.target, str) or "settings" not in node.meta else str(node.meta["settings"]),
            of(node.args),
            of(node.kwargs),
            node.meta.get("samples"),
            len(node.meta.get("shape", ())),
            tuple(index[each] for each in node.meta.get("writes", ()) if each in index),
            node.meta.get("checkpoint"),
        )
        for node in graph.nodes
    )


# Gated code.


class Rewritten(NamedTuple):
    """The rewritten recording of a block.

    Attributes:
        code: its forward, taking the block and its opaque arguments, with every gated branch behind its gate.
        uses: where the gated branches stand.
        ungated: of each addition that was not found before the call, and always runs, what it uses.
    """

    code: Code
    uses: list[GatedUse]
    ungated: tuple[str, ...]


def rewrite(graph: fx.Graph, block: nn.Module, gates: BlockGates, granularity: str) -> Rewritten:
    """Put every gated branch of a recording behind its gate.

    Args:
        graph: the recording of a call; it is changed.
        block: the block or its stand-in, for the kinds of its children.
        gates: the block's branches.
        granularity: "sample" where a branch runs on some of the samples.

    Raises:
        CutError: if a branch that is no drop path's cannot be separated, or is not there although what it uses is.
        TraceError: if the code cannot be written.
    """
    functional = put_functional(graph, block)
    _check_rates(functional, gates)
    called = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    sums = find_sums(graph, block, gates.drop_paths)
    calls = calls_of(graph, gates.drop_paths)
    identities = {key: identity(residual, block) for key, residual in sums.items()}
    matched = match(identities, gates.known)
    met = {(key[0], gates.known[key]) for key in matched.values()}
    # A drop path whose uses are the same, in a loop, may be used less often.
    missing = [
        key
        for key in gates.gated
        if key not in matched.values() and _is_met(key, gates, called) and (key[0], gates.known[key]) not in met
    ]
    if missing and gates.drop_paths:
        for key, (place, residual) in additions_of(graph, block, {key: gates.known[key] for key in missing}).items():
            sums["", -1 - place[1]], matched["", -1 - place[1]] = residual, key
        missing = [key for key in missing if key not in matched.values()]
    if missing:
        raise CutError(f"the branch of {_names(missing, gates)} is computed, but not added in a way that can be gated")
    unknown = [key for key in sums if key not in matched and not (key[0] == "" and isinstance(sums[key], CutError))]
    if unknown and gates.drop_paths:
        raise CutError(f"{_of(unknown[0])} is used more often than in the code that was read")
    ungated = tuple(", ".join(sorted(identities[key])) or "its parameters" for key in unknown)
    if unknown and not any(key in gates.gated for key in matched.values()):
        raise CutError(f"it adds a branch that was not found in its code ({ungated[0]})")
    paths = paths_of({key: cuts.cut(each, block) for key, each in sums.items() if not isinstance(each, CutError)})
    uses: list[GatedUse] = []
    replaced: dict[fx.Node, fx.Node] = {}
    for here, residual in sums.items():
        key = matched.get(here)
        if key is None or key not in gates.gated:
            continue
        try:
            if isinstance(residual, CutError):
                raise residual
            call, operand, scale = _reference(residual.after(replaced), calls.get(here))
            replaced[residual.add] = _gate(residual.after(replaced), key, block, gates, granularity, paths[here])
            uses.append(GatedUse(key, call, operand, scale))
        except CutError as error:
            if here in calls:
                call, operand, scale = _reference(None, calls[here])
                _mask(calls[here], key, gates)
            elif isinstance(error, SidesError) and isinstance(residual, Sum):
                call, operand, scale = _reference(residual.after(replaced), None)
                _mask_operand(residual.after(replaced), key, gates)
            else:
                raise
            uses.append(GatedUse(key, call, operand, scale, str(error)))
    graph.lint()
    return Rewritten(_written(graph, f"{gates.name}: the forward that runs open branches only"), uses, ungated)


def _written(graph: fx.Graph, description: str) -> Code:
    """The code of a graph, with its checkpoints."""
    put_in_checkpoints(graph, compiled, description)
    return compiled(graph, description)


def _check_rates(functional: Sequence[FunctionalDropPath], gates: BlockGates) -> None:
    """Refuse a change of the rate that a functional drop path had when the model was made stochastic.

    Raises:
        CutError: if it has another one.
    """
    for index, each in enumerate(functional):
        rate = gates.rates.get((FUNCTIONAL, index))
        if rate is not None and rate != each.rule.drop_rate:
            raise CutError(
                f"the rate of its drop path function was changed from {rate:g} to {each.rule.drop_rate:g}: set it "
                "back, and call controller(model).set_survival_probs"
            )


def _is_met(key: Key, gates: BlockGates, called: set[str]) -> bool:
    """Whether anything that only this branch uses is used in a call."""
    shared = {path for other, paths in gates.known.items() if other != key for path in paths}
    own = gates.known[key] - shared
    is_only_use = sum(other[0] == key[0] for other in gates.known) == 1
    return (is_only_use and key[0] in called) or bool((own or gates.known[key]) & called)


def _names(keys: Sequence[Key], gates: BlockGates) -> str:
    return ", ".join(gates.gated[key].passes.names[gates.gated[key].index] for key in keys)


def _of(key: Key) -> str:
    return f"the drop path {key[0]}" if key[0] else "an addition"


def _reference(residual: Sum | None, call: fx.Node | None) -> tuple[int, int | None, float]:
    """Which call the plain reference changes, which of its arguments, and what is multiplied there anyway."""
    if call is not None:
        return call.meta["call"], None, call.meta.get("scale", 1.0)
    assert residual is not None
    own = residual.add.meta.get("operand")
    return residual.add.meta["call"], residual.add.args.index(residual.output) if own is None else own, 1.0


class _Input(NamedTuple):
    """What is known of an input of a branch.

    Attributes:
        samples: whether its first dimension is one of samples.
        carried: whether it is the shortcut or what that is computed from.
    """

    samples: bool
    carried: bool


def _gate(residual: Sum, key: Key, block: nn.Module, gates: BlockGates, granularity: str, paths: Paths) -> fx.Node:
    branch = cuts.cut(residual, block)
    graph = residual.add.graph
    inner = _branch_graph(branch, residual)
    function = _written(inner, f"{gates.name}: branch {key[0]}#{key[1] + 1}")
    others = [side for side in branch.sides if not side.meta.get("attention_map")]
    if others or (branch.sides and residual.shortcut is None):
        side = (others or branch.sides)[0]
        raise SidesError(f"what {side.all_input_nodes[0].target} gives beside the branch's output is used too")
    source = residual.shortcut if residual.shortcut is not None else residual.add
    if granularity == "sample":
        _check_samples(branch, source)
    # Where the branch does not run, the shortcut carries no gradient to these inputs.
    carried: set[fx.Node] = set() if residual.shortcut is None else cuts.ancestors(residual.shortcut)
    inputs = [_Input(bool(node.meta.get("samples")), node in carried) for node in branch.inputs]
    if residual.shortcut is None:
        gated_sum = _gated_value(key, paths, function, inputs, residual.add.meta["shape"])
    elif branch.sides:
        gated_sum = _gated_sum_and_maps(key, paths, function, inputs, len(branch.sides))
    else:
        gated_sum = _gated_sum(key, paths, function, inputs)
    with graph.inserting_before(residual.add):
        shortcut = () if residual.shortcut is None else (residual.shortcut,)
        gated_node = graph.call_function(gated_sum, (*shortcut, *branch.inputs))
    gated_node.meta.update(residual.add.meta, takes_block=True)
    result = gated_node
    if branch.sides:
        with graph.inserting_before(residual.add):
            result = graph.call_function(operator.getitem, (gated_node, 0))
            maps = [graph.call_function(operator.getitem, (gated_node, i + 1)) for i in range(len(branch.sides))]
        result.meta.update(residual.add.meta)
        for side, new in zip(branch.sides, maps, strict=True):
            side.replace_all_uses_with(new)
            graph.erase_node(side)
    residual.add.replace_all_uses_with(result)
    graph.erase_node(residual.add)
    inner_nodes = set(branch.nodes)
    for node in reversed(list(graph.nodes)):
        if node in inner_nodes or (is_size(node) and not node.users):
            graph.erase_node(node)
    return result


def _check_samples(branch: cuts.Branch, shortcut: fx.Node) -> None:
    """Refuse a branch that cannot run on some of the samples.

    Raises:
        CutError: if it cannot.
    """
    if "samples" not in shortcut.meta:
        raise CutError("its code is another for another number of samples")
    if not shortcut.meta["samples"]:
        raise CutError("the first dimension of what the branch is added to is not one of samples")
    num_samples = shortcut.meta["shape"][0]
    for node in branch.inputs:
        if node.meta.get("called"):
            raise CutError("it keeps what belongs to samples in an object that it is given, such as a cache")
        shape = cast("tuple[int, ...]", node.meta.get("shape", (0,)))
        if node.meta.get("samples") and shape[0] != num_samples:
            raise CutError(
                f"an input of the branch has {shape[0]} entries, where the shortcut has {num_samples} samples"
            )


def _branch_graph(branch: cuts.Branch, residual: Sum) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(branch.inputs):
        copies[node] = graph.placeholder(f"input_{index}")

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # A size, which is read again from the branch's own samples.
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in branch.nodes:
        if node is residual.drop_path:
            copies[node] = copied(cast(fx.Node, node.args[0]))
        else:
            copied(node)
    output = copies[residual.output]
    graph.output((output, *(copied(side) for side in branch.sides)) if branch.sides else output)
    return graph


def _gates_of(block: nn.Module) -> BlockGates | None:
    """The gates of a block; None for a copy of it without data, whose shapes are being looked up."""
    return block.__dict__["_stochastic_depth_branch"]


def in_training(block: nn.Module, key: Key) -> bool:
    """Whether the rule of training holds for a branch: a drop path in evaluation keeps everything.

    Raises:
        RuntimeError: if its drop path was replaced.
    """
    if key[0] in ("", FUNCTIONAL):
        return block.training
    module: Any = block
    for name in key[0].split("."):
        module = child_dict(module).get(name)
        if module is None:
            break
    if module is None or "_stochastic_depth_branch" not in module.__dict__:
        raise RuntimeError(
            f"The drop path {key[0]} of a {type(block).__name__} was replaced after make_stochastic_, so that its gate "
            "would act unseen. Call restore_(model), change the model, and make it stochastic again."
        )
    return module.training


def _gated_sum(
    key: Key, paths: Paths, function: Callable[..., Tensor], inputs: Sequence[_Input], *, capturable: bool = True
) -> Callable[..., Tensor]:
    only = len(inputs) == 1 and inputs[0].samples
    others_at = [index for index, kind in enumerate(inputs) if not kind.carried]
    of_batch = [kind.samples for kind in inputs]

    @outside_graph
    def gated_sum(block: nn.Module, shortcut: Tensor, *values: Any) -> Tensor:
        gates = _gates_of(block)
        if gates is None:
            return shortcut + function(block, *values)
        gated, parts, training = gates.gated[key], gates.parts_at(block, key, paths), in_training(block, key)
        others = [values[index] for index in others_at if isinstance(values[index], Tensor)]
        if only:
            return gated.add(
                shortcut,
                values[0],
                block,
                function,
                parts=parts,
                training=training,
                extra_inputs=others,
                capturable=capturable,
            )
        shared = [value for value, samples in zip(values, of_batch, strict=True) if not samples]
        own = tuple(value for value, samples in zip(values, of_batch, strict=True) if samples)

        def of_samples(module: nn.Module, taken: tuple[Tensor, ...]) -> Tensor:
            rest, some = iter(shared), iter(taken)
            return function(module, *(next(some if samples else rest) for samples in of_batch))

        return gated.add(shortcut, own, block, of_samples, parts=parts, training=training, extra_inputs=others)

    gated_sum.__name__ = f"gated_sum_{key[1]}"
    return gated_sum


def _gated_sum_and_maps(
    key: Key, paths: Paths, function: Callable[..., Any], inputs: Sequence[_Input], num_maps: int
) -> Callable[..., Any]:
    """The sum, and the attention maps of the branch, which nothing can use where not all samples ran."""

    @outside_graph
    def gated_sum_and_maps(block: nn.Module, shortcut: Tensor, *values: Any) -> tuple[Any, ...]:
        seen: list[tuple[Any, ...]] = []

        def first(module: nn.Module, *given: Any) -> Tensor:
            output, *maps = function(module, *given)
            if output.shape[0] == shortcut.shape[0]:
                seen.append(tuple(maps))
            return output

        summed = _gated_sum(key, paths, first, inputs, capturable=False)(block, shortcut, *values)
        return summed, *(seen[-1] if seen else [NotComputed()] * num_maps)

    gated_sum_and_maps.__name__ = f"gated_sum_and_maps_{key[1]}"
    return gated_sum_and_maps


def _gated_value(
    key: Key, paths: Paths, function: Callable[..., Tensor], inputs: Sequence[_Input], shape: tuple[int, ...]
) -> Callable[..., Tensor]:
    """Where a block without a shortcut drops all that it computes, closed gates give zeros."""
    gated_sum = _gated_sum(key, paths, function, inputs)

    @outside_graph
    def gated_value(block: nn.Module, *values: Any) -> Tensor:
        tensor = next(value for value in values if isinstance(value, Tensor))
        rows = next((v.shape[0] for v, kind in zip(values, inputs, strict=True) if kind.samples), shape[0])
        return gated_sum(block, tensor.new_zeros(rows, *shape[1:]), *values)

    gated_value.__name__ = f"gated_value_{key[1]}"
    return gated_value


def _mask(call: fx.Node, key: Key, gates: BlockGates) -> None:
    """Put the mask in place of a drop path."""
    call.op, call.target = "call_function", _masking(key, gates)
    call.args = (call.args[0] if call.args else next(iter(call.kwargs.values())),)
    call.kwargs = {}
    call.meta["takes_block"] = True


def _mask_operand(residual: Sum, key: Key, gates: BlockGates) -> None:
    """Mask the branch's output where it is added."""
    with residual.add.graph.inserting_before(residual.add):
        output = residual.add.graph.call_function(_masking(key, gates), (residual.output,))
    output.meta["takes_block"] = True
    residual.add.replace_input_with(residual.output, output)


def _masking(key: Key, gates: BlockGates) -> Code:
    @outside_graph
    def gated_output(block: nn.Module, x: Tensor) -> Tensor:
        gates = _gates_of(block)
        return x if gates is None else masked(gates.gated[key], x, training=in_training(block, key))

    gated_output.__name__ = f"gated_output_{list(gates.known).index(key)}"
    return gated_output


# Python code from a graph.


def compiled(graph: fx.Graph, description: str) -> Code:
    """A function `(block, *arguments)` that does what the graph says.

    Raises:
        TraceError: if it holds something that no code can name.
    """
    constants: dict[str, Any] = {"__builtins__": builtins}
    names: dict[fx.Node, str] = {}
    last_use: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        for used in node.all_input_nodes:
            if not any(used in ends for ends in last_use.values()):
                last_use.setdefault(node, []).append(used)

    def constant(value: Any) -> str:
        name = f"constant_{len(constants)}"
        constants[name] = value
        return name

    def source(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) in (tuple, fx.immutable_collections.immutable_list, list):  # pyright: ignore
            items = "".join(f"{source(item)}, " for item in value)
            return f"({items})" if isinstance(value, tuple) else f"[{items}]"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{constant(type(value))}({', '.join(map(source, cast('tuple[Any]', value)))})"
        if isinstance(value, dict):
            pairs = ", ".join(f"{source(key)}: {source(item)}" for key, item in cast("dict[Any, Any]", value).items())
            return f"{{{pairs}}}"
        if isinstance(value, slice):
            part = cast("slice[Any, Any, Any]", value)
            return f"slice({source(part.start)}, {source(part.stop)}, {source(part.step)})"
        return constant(value)

    def arguments(args: Sequence[Any], kwargs: Mapping[str, Any], first: str = "") -> str:
        given = [source(argument) for argument in args]
        plain = {key: value for key, value in kwargs.items() if key.isidentifier() and not keyword.iskeyword(key)}
        given += [f"{key}={source(value)}" for key, value in plain.items()]
        others = {key: value for key, value in kwargs.items() if key not in plain}
        if others:
            given.append(f"**{source(others)}")
        return ", ".join(filter(None, [first, *given]))

    lines: list[str] = []
    parameters: list[str] = []
    for index, node in enumerate(graph.nodes):
        names[node] = f"v{index}"
        if node.op == "placeholder":
            parameters.append(names[node])
            continue
        if node.op == "output":
            lines.append(f"return {source(node.args[0])}")
            continue
        if node.op == "get_attr":
            lines.append(f"{names[node]} = {_reached('block', node.meta.get('path') or str(node.target).split('.'))}")
        elif node.op == "call_module":
            lines.append(
                f"{names[node]} = {_reached('block', str(node.target).split('.'))}({arguments(node.args, node.kwargs)})"
            )
        elif node.op == "call_method":
            receiver, *others = node.args
            given = arguments(others, node.kwargs)
            lines.append(f"{names[node]} = {source(receiver)}.{node.target}({given})")
        else:
            first = "block" if node.meta.get("takes_block") else ""
            lines.append(f"{names[node]} = {constant(node.target)}({arguments(node.args, node.kwargs, first)})")
        gone = [names[used] for used in last_use.get(node, ()) if used is not node]
        if not node.users:
            gone.append(names[node])
        if gone:
            lines[-1] += f"; {' = '.join(gone)} = None"
    body = "\n    ".join(lines)
    text = f"def forward({', '.join(['block', *parameters])}):\n    {body}\n"
    try:
        exec(compile(text, f"<{description}>", "exec"), constants)
    except SyntaxError as error:
        raise TraceError(f"its code cannot be written down: {error}") from error
    return constants["forward"]


def _reached(owner: str, path: Sequence[Any]) -> str:
    for name in path:
        if isinstance(name, tuple):
            kind, key = cast("tuple[str, Any]", name)
            owner += f"[{key!r}]" if kind == "item" else f".{key}"
        elif isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
            owner += f".{name}"
        elif isinstance(name, str) and name.isdigit():
            owner = f"getattr({owner}, {name!r})"
        else:
            owner += f"[{name!r}]"
    return owner
