"""Rewrites the recording of a block: every gated branch goes behind its gate; the rest stays the same."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

from torch import fx, nn

from stochastic_depth.retrofit.errors import CutError, SidesError
from stochastic_depth.retrofit.recording.checkpoints import put_in_checkpoints
from stochastic_depth.retrofit.recording.edits import Edit, Edits
from stochastic_depth.retrofit.recording.layouts import in_order
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.cuts import CutBranch, Sum, cut
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL, FunctionalDropPath, put_functional, scaled_value
from stochastic_depth.retrofit.rewriting.gated_calls import (
    BlockGates,
    BranchInput,
    make_gated_sum,
    make_gated_sum_and_maps,
    make_gated_value,
    make_mask,
    write_back,
)
from stochastic_depth.retrofit.rewriting.generated_code import Code, compiled
from stochastic_depth.retrofit.rewriting.operations import ancestors
from stochastic_depth.retrofit.rewriting.sums import (
    Key,
    additions_of,
    calls_of,
    find_sums,
    identity,
    match,
    paths_of,
)
from stochastic_depth.retrofit.rules import DropPathRule


class GatedUse(NamedTuple):
    """The place of a gated branch in a recording.

    Attributes:
        key: which of the known branches it is.
        call: number of the call that the plain reference changes: the sum, or the drop path.
        operand: index of the branch's output among the arguments of that call; None if it is the result.
        scale: factor in the block's own code if nothing is dropped.
        cause: why the branch is masked; empty if it is skipped.
        is_evaluated: whether the rule of evaluation holds in training too, because the drop path is not called.
    """

    key: Key
    call: int
    operand: int | None
    scale: float = 1.0
    cause: str = ""
    is_evaluated: bool = False


def edits_of(uses: Sequence[GatedUse], weights: Callable[[GatedUse], Any]) -> Edits:
    """The changes of a block's own code that multiply its branches by these weights."""
    edits: dict[int, list[Edit]] = {}
    for use in uses:
        edits.setdefault(use.call, []).append(Edit(use.operand, weights(use)))
    return edits


class Rewritten(NamedTuple):
    """The rewritten recording of a block.

    Attributes:
        code: its forward, which takes the block and its opaque arguments, with every gated branch behind its gate.
        uses: places of the gated branches.
        ungated: for each addition that was not found before the call, and always runs, what it uses.
        is_of_one_size: whether it holds for inputs of the same sizes only.
    """

    code: Code
    uses: list[GatedUse]
    ungated: tuple[str, ...]
    is_of_one_size: bool


def rewrite(graph: fx.Graph, block: nn.Module, gates: BlockGates, granularity: str) -> Rewritten:
    """Put every gated branch of a recording behind its gate.

    If the code does not call a branch's drop path in training, because its rate is 0 now or a flag says so, only forced
    gates act on the branch, as in evaluation.

    Args:
        graph: the recording of a call; it is changed.
        block: the block or its stand-in, for the kinds of its children.
        gates: the block's branches.
        granularity: "sample" if a branch runs on some of the samples.

    Raises:
        CutError: if a branch without a drop path cannot be separated, or is missing although its parameters are used.
        TraceError: if the code cannot be generated.
    """
    functional = {each.product: each for each in put_functional(graph, block)}
    called = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    sums = find_sums(graph, block, gates.drop_paths)
    calls = calls_of(graph, gates.drop_paths)
    identities = {key: identity(residual, block) for key, residual in sums.items()}
    matched = match(identities, gates.known)
    for here, key in matched.items():
        if key[0] == FUNCTIONAL and key in gates.rules:
            _check_rule(functional[calls[here]], gates.rules[key], _names([key], gates))
    met = {(key[0], gates.known[key]) for key in matched.values()}
    # A drop path with equal uses, in a loop, may be used less often.
    missing = [
        key
        for key in gates.gated
        if key not in matched.values() and _is_met(key, gates, called) and (key[0], gates.known[key]) not in met
    ]
    evaluated: set[Key] = set()
    factors: dict[Key, float] = {}
    if missing and gates.drop_paths:
        for key, (place, residual) in additions_of(graph, block, {key: gates.known[key] for key in missing}).items():
            if (keep := gates.drop_paths.scaled.get(key)) is not None and not isinstance(residual, CutError):
                residual, factors[key] = _without_factor(residual, keep)
            sums["", -1 - place[1]], matched["", -1 - place[1]] = residual, key
            evaluated |= {key} & gates.rules.keys()  # A schedule does not ask whether drop paths are called.
        missing = [key for key in missing if key not in matched.values()]
    if not missing and not block.training:
        # Code that merges layers for evaluation uses their weights only, and lacks the factor of the rule.
        weights_of = {str(node.target).rpartition(".")[0] for node in graph.find_nodes(op="get_attr")} - {""}
        merged = [
            key
            for key, branch in gates.gated.items()
            if key not in matched.values() and branch.rescale == "eval" and _is_met(key, gates, weights_of)
        ]
        if merged:
            raise CutError(
                f"its code in evaluation has no sum for {_names(merged, gates)}, which cannot be multiplied by "
                "its survival probability: use rescale='train'"
            )
    if missing:
        members = {path for key in missing for path in gates.known[key]}
        changing = [node for node in graph.nodes if node.op == "call_module" and node.meta.get("writes")]
        reasons = [f"{node.target} changes what it is given in place" for node in changing if node.target in members]
        reasons += [str(error) for error in sums.values() if isinstance(error, CutError)]
        why = f": {reasons[0]}" if reasons else ""
        raise CutError(
            f"the branch of {_names(missing, gates)} is computed, but not added in a way that can be gated{why}"
        )
    unknown = [
        key
        for key in sums
        if key not in matched and (key[0] or (identities[key] and not isinstance(sums[key], CutError)))
    ]
    if unknown and gates.drop_paths:
        raise CutError(f"{_of(unknown[0])} is used more often than in the code that was read")
    again = next((key for key in unknown if identities[key] in gates.known.values()), None)
    if again is not None:  # Such as items of a list that was read with two.
        of = ", ".join(sorted(identities[again]))
        raise CutError(f"it adds the branch of {of} more often than in the code that was read")
    ungated = tuple(", ".join(sorted(identities[key])) for key in unknown)
    if unknown and not any(key in gates.gated for key in matched.values()):
        raise CutError(f"it adds a branch that was not found in its code ({ungated[0]})")
    paths = paths_of({key: cut(each, block) for key, each in sums.items() if not isinstance(each, CutError)})
    uses: list[GatedUse] = []
    replaced: dict[fx.Node, fx.Node] = {}
    for here, residual in sums.items():
        key = matched.get(here)
        if key is None or key not in gates.gated:
            continue
        is_evaluated = key in evaluated
        try:
            if isinstance(residual, CutError):
                raise residual
            call, operand, scale = _reference(residual.after(replaced), calls.get(here))
            scale *= factors.get(key, 1.0)
            make_sum = partial(make_gated_sum, key, paths[here], is_evaluated=is_evaluated)
            replaced[residual.add] = _gate(residual.after(replaced), key, block, gates, granularity, make_sum)
            uses.append(GatedUse(key, call, operand, scale, is_evaluated=is_evaluated))
        except CutError as error:
            if here in calls:
                call, operand, scale = _reference(None, calls[here])
                _mask(calls[here], key, gates)
            elif isinstance(error, SidesError) and isinstance(residual, Sum):
                call, operand, scale = _reference(residual.after(replaced), None)
                _mask_operand(residual.after(replaced), make_mask(key, gates, is_evaluated=is_evaluated))
            else:
                raise
            uses.append(GatedUse(key, call, operand, scale, str(error), is_evaluated))
    graph.lint()
    code = _written(graph, f"{gates.name}: the forward that runs open branches only")
    # A branch that is added to nothing gives zeros of the sizes that were seen.
    is_of_one_size = any(isinstance(residual, Sum) and residual.shortcut is None for residual in sums.values())
    return Rewritten(code, uses, ungated, is_of_one_size)


def _written(graph: fx.Graph, description: str) -> Code:
    """The code of a graph, with its checkpoints."""
    put_in_checkpoints(graph, compiled, description)
    return compiled(graph, description)


def _check_rule(now: FunctionalDropPath, before: DropPathRule, name: str) -> None:
    """Refuse a change of the rule that a functional drop path had when the model was made stochastic.

    Raises:
        CutError: if it has another one.
    """
    rule = now.rule
    if rule.drop_rate != before.drop_rate:
        raise CutError(
            f"the rate of the drop path function of {name} was changed from {before.drop_rate:g} to "
            f"{rule.drop_rate:g}: set it back, and call controller(model).set_survival_probs"
        )
    # Noise of a single sample looks like that of a batch.
    if now.num_samples in (None, 1):
        rule = replace(rule, granularity=before.granularity)
    if rule != (replace(before, rescale="none") if before.rescale == "eval" else before):
        raise CutError(
            f"the drop path function of {name} was changed from {before} to {rule}: change it before make_stochastic_"
        )


def _without_factor(residual: Sum, keep: float) -> tuple[Sum, float]:
    """A sum without the code's own factor of evaluation, which the gate has, and that factor, if it is there."""
    value = scaled_value(residual.output, keep)
    if value is None:
        return residual, 1.0
    residual.output.replace_all_uses_with(value)
    residual.output.graph.erase_node(residual.output)
    return residual.after({residual.output: value}), keep


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
    """The call that the plain reference changes, the argument, and the factor that is there anyway."""
    if call is not None:
        return call.meta["call"], None, call.meta.get("scale", 1.0)
    assert residual is not None
    own = residual.add.meta.get("operand")
    return residual.add.meta["call"], residual.add.args.index(residual.output) if own is None else own, 1.0


def _gate(
    residual: Sum, key: Key, block: nn.Module, gates: BlockGates, granularity: str, make_sum: Callable[..., Any]
) -> fx.Node:
    branch = cut(residual, block)
    graph = residual.add.graph
    branch, containers = _with_items(branch)
    inner = _branch_graph(branch, residual, containers)
    function = _written(inner, f"{gates.name}: branch {key[0]}#{key[1] + 1}")
    others = [side for side in branch.sides if not side.meta.get("attention_map")]
    if others or (branch.sides and residual.shortcut is None):
        side = (others or branch.sides)[0]
        raise SidesError(f"what {side.all_input_nodes[0].target} gives beside the branch's output is used too")
    for node in branch.nodes:
        if stores := node.meta.get("stores"):
            raise SidesError(f"{node.target} stores {stores}, which code outside the branch may use, as an extra loss")
    source = residual.shortcut if residual.shortcut is not None else residual.add
    if granularity == "sample":
        _check_samples(branch, source)
    # Where the branch does not run, the shortcut carries no gradient to these inputs.
    carried: set[fx.Node] = set() if residual.shortcut is None else ancestors(residual.shortcut)
    inputs = [BranchInput(bool(node.meta.get("samples")), node in carried) for node in branch.inputs]
    dtype, order = residual.add.meta.get("dtype"), residual.add.meta.get("order")
    if residual.shortcut is None:
        gated_sum = make_gated_value(make_sum, function, inputs, residual.add.meta["shape"], dtype)
    elif branch.sides:
        gated_sum = make_gated_sum_and_maps(make_sum, function, inputs, len(branch.sides))
    else:
        gated_sum = make_sum(function, inputs)
    gated_sum.__name__ = f"gated_sum_{key[1]}"
    with graph.inserting_before(residual.add):
        shortcut = () if residual.shortcut is None else (residual.shortcut,)
        if residual.shortcut is not None and dtype and residual.shortcut.meta.get("dtype", dtype) != dtype:
            # Where the branch is closed, nothing else tells which type the sum has.
            shortcut = (graph.call_method("to", (residual.shortcut, dtype)),)
        if residual.shortcut is not None and order is not None and residual.shortcut.meta.get("order", order) != order:
            # Its own first operand is the branch.
            shortcut = (graph.call_function(in_order, (*shortcut, order)),)
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
    if residual.shortcut is None and order is not None:
        with graph.inserting_before(residual.add):
            result = graph.call_function(in_order, (result, order))
        result.meta.update(residual.add.meta)
    if residual.add.meta.get("changes_argument") and residual.shortcut is residual.add.args[0]:
        with graph.inserting_before(residual.add):
            result = graph.call_function(write_back, (residual.shortcut, result))
        result.meta.update(residual.add.meta)
    residual.add.replace_all_uses_with(result)
    graph.erase_node(residual.add)
    inner_nodes = set(branch.nodes)
    for node in reversed(list(graph.nodes)):
        if node in inner_nodes or (is_size(node) and not node.users):
            graph.erase_node(node)
    return result


def _check_samples(branch: CutBranch, shortcut: fx.Node) -> None:
    """Refuse a branch that cannot run on some of the samples.

    Raises:
        CutError: if it cannot.
    """
    if shortcut.meta.get("shape", ())[:1] == (0,):
        return  # It runs on none.
    if "samples" not in shortcut.meta:
        if not any("shape" in node.meta for node in shortcut.graph.find_nodes(op="placeholder")):
            raise CutError("its samples are inside an object that it is given, of which no subset can be taken")
        raise CutError("its code changes with the number of samples")
    if not shortcut.meta["samples"]:
        raise CutError("the first dimension of the branch's shortcut is not the samples")
    num_samples = shortcut.meta["shape"][0]
    for node in branch.inputs:
        if node.meta.get("called"):
            raise CutError("it stores values of samples in one of its arguments, such as a cache")
        shape = cast("tuple[int, ...]", node.meta.get("shape", (0,)))
        if node.meta.get("samples") and shape[0] != num_samples:
            raise CutError(
                f"an input of the branch has {shape[0]} entries, where the shortcut has {num_samples} samples"
            )


def _with_items(branch: CutBranch) -> tuple[CutBranch, dict[fx.Node, Any]]:
    """The branch with the items of tuples and lists as inputs of their own, and the items of each of these."""
    inputs: list[fx.Node] = []
    containers: dict[fx.Node, Any] = {}
    for node in branch.inputs:
        kinds = node.meta.get("items")
        if kinds is None:
            inputs.append(node)
            continue
        items: list[fx.Node] = []
        for index, meta in reversed(list(enumerate(kinds))):
            with node.graph.inserting_after(node):
                items.insert(0, node.graph.call_function(operator.getitem, (node, index)))
            items[0].meta.update(meta)
        containers[node] = type(kinds)(items)
        inputs += items
    return replace(branch, inputs=tuple(inputs)), containers


def _branch_graph(branch: CutBranch, residual: Sum, containers: Mapping[fx.Node, Any]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for index, node in enumerate(branch.inputs):
        copies[node] = graph.placeholder(f"input_{index}")
    for container, items in containers.items():
        copies[container] = type(items)(copies[item] for item in items)

    def copied(node: fx.Node) -> Any:
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


def _mask(call: fx.Node, key: Key, gates: BlockGates) -> None:
    """Replace a drop path by its mask."""
    call.op, call.target = "call_function", make_mask(key, gates)
    call.args = (call.args[0] if call.args else next(iter(call.kwargs.values())),)
    call.kwargs = {}
    call.meta["takes_block"] = True


def _mask_operand(residual: Sum, mask: Code) -> None:
    """Mask the branch's output at its addition."""
    with residual.add.graph.inserting_before(residual.add):
        output = residual.add.graph.call_function(mask, (residual.output,))
    output.meta["takes_block"] = True
    residual.add.replace_input_with(residual.output, output)
