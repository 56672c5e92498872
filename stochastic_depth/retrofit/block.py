"""A block of a foreign model whose branches are gated: its forward is recorded, rewritten, and run in its place."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from stochastic_depth.compiling import eager
from stochastic_depth.copies import plain_class, without_data
from stochastic_depth.gate_draws import Gate
from stochastic_depth.residual import GatedBranch, compiled_inside
from stochastic_depth.retrofit import cuts
from stochastic_depth.retrofit.cuts import CutError, Sum
from stochastic_depth.retrofit.shapes import output_without_data, samples_among
from stochastic_depth.retrofit.trace import (
    PLAIN_TYPES,
    Recording,
    TraceError,
    decide_by,
    flatten,
    is_size,
    record,
    remember,
)

Key = tuple[str, int]
"""A branch of a block: the path of its drop path, "" for a plain addition; and which of that path's uses, from 0."""
Treatment = Literal["skip", "mask"]


class BranchParts(nn.Module):
    """Holds the parameters of a branch of a foreign block: whole modules, and single parameters of the block.

    Parameters are looked up when they are asked for: `to_empty`, FSDP and loading with `assign` replace them.
    """

    def __init__(self, members: Sequence[nn.Module], direct: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.direct = list(direct)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all members where `recurse`, and the single ones."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for holder, name in self.direct:
            parameter = holder._parameters.get(name)
            if parameter is not None:
                yield f"{prefix}direct.{name}", parameter


@dataclass
class BlockBranches:
    """What a stochastic block knows about its branches.

    Attributes:
        name: the block's name, for messages.
        drop_paths: paths of its drop paths whose calls are branches; empty where additions are.
        known: all branches that were found, also those that a filter left out.
        gated: the others.
        treatments: for each of them whether a closed gate skips it or only masks its output.
        parts: what holds the parameters of each.
    """

    name: str
    drop_paths: tuple[str, ...]
    known: tuple[Key, ...]
    gated: dict[Key, GatedBranch] = field(default_factory=dict[Key, GatedBranch])
    treatments: dict[Key, Treatment] = field(default_factory=dict[Key, Treatment])
    parts: dict[Key, nn.Module] = field(default_factory=dict[Key, nn.Module])
    _rewritten: dict[Any, list[tuple[Recording, Callable[..., Any]]]] = field(
        default_factory=dict[Any, "list[tuple[Recording, Callable[..., Any]]]"], repr=False
    )

    _read: list[tuple[str, str]] | None = field(default=None, repr=False)

    def put(self, key: Key, gated: GatedBranch, treatment: Treatment, parts: nn.Module) -> None:
        """Gate one of the known branches."""
        self.gated[key], self.treatments[key], self.parts[key] = gated, treatment, parts

    def __getstate__(self) -> dict[str, Any]:
        # Code is bound to its module: a copy, or a module that was loaded, makes its own.
        return {**self.__dict__, "_rewritten": {}}

    def is_plain(self, training: bool) -> bool:
        """Whether the block's own forward is right: in evaluation, with no gate forced and no factor."""
        if training:
            return False
        return all(
            branch.rescale != "eval" and branch.passes.observer is None and not branch.passes.forced
            for branch in self.gated.values()
        )

    @eager
    def forward_for(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The rewritten forward for a call, and its opaque arguments.

        Raises:
            RuntimeError: if the block cannot be rewritten for this call.
        """
        leaves: list[Any] = []
        signature = flatten((args, kwargs), leaves)
        if self._read is None:
            self._read = _read_of_others(block)
        key = (signature, *_state(block, self._read))
        known = self._rewritten.get(key, [])
        for recording, rewritten in known:
            if recording.holds(leaves):
                return rewritten, leaves
        try:
            recording = record(block, signature, len(leaves), functools.partial(decide_by, leaves))
            rewritten = rewrite(recording.graph, block, self)
        except (TraceError, CutError) as error:
            raise RuntimeError(
                f"The block {self.name} ({type(block).__name__}) cannot be gated here: {error}."
            ) from error
        remember(self._rewritten, key, [*known, (recording, rewritten)])
        return rewritten, leaves


def _state(block: nn.Module, read: Sequence[tuple[str, str]]) -> tuple[Any, ...]:
    """What of a block's attributes may decide which way its forward goes, or is a number in it.

    Args:
        block: the block.
        read: from `_read_of_others`.
    """
    plain = tuple((name, value) for name, value in block.__dict__.items() if _is_plain(value))
    empty = tuple(
        name
        for group in (block.__dict__["_parameters"], block.__dict__["_buffers"])
        for name, value in group.items()
        if value is None  # pyright: ignore[reportPrivateUsage]
    )
    values = (getattr(getattr(block, owner, None), name, None) for owner, name in read)
    return plain, empty, tuple([value if _is_plain(value) else None for value in values])


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN_TYPES) or (
        isinstance(value, tuple) and all(isinstance(item, PLAIN_TYPES) for item in cast("tuple[Any, ...]", value))
    )


def _read_of_others(block: nn.Module) -> list[tuple[str, str]]:
    """Attributes of a block's children, and of objects that it holds such as a config, that its code may read.

    They are those whose names appear in the code of the block's class: few, so that each call can look at them.
    """
    names = _names_in_code(plain_class(block))
    owners = {**block.__dict__, **block.__dict__["_modules"]}
    del owners["_stochastic_depth_branch"]
    return [(owner, name) for owner, held in owners.items() for name in getattr(held, "__dict__", ()) if name in names]


@functools.cache
def _names_in_code(kind: type[nn.Module]) -> frozenset[str]:
    functions = [
        function
        for part in kind.__mro__
        if issubclass(part, nn.Module) and part is not nn.Module
        for function in vars(part).values()
    ]
    pending: list[Any] = [getattr(function, "__code__", None) for function in functions]
    names: set[str] = set()
    while pending:
        code = pending.pop()
        if isinstance(code, CodeType):
            names.update(code.co_names)
            pending += code.co_consts
    return frozenset(names)


class StochasticBlock(nn.Module):
    """Behaviour of a foreign block whose branches are gated. `make_stochastic_` gives this class to modules."""

    _stochastic_depth_branch: BlockBranches

    @compiled_inside
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, with its branches gated."""
        branches = self._stochastic_depth_branch
        if branches.is_plain(self.training):
            return super().forward(*args, **kwargs)
        rewritten, leaves = branches.forward_for(self, args, kwargs)
        return rewritten(self, *leaves)


class StochasticDropPath(nn.Module):
    """Behaviour of a drop path whose branch cannot be skipped: it masks with the controller's gates."""

    _stochastic_depth_branch: GatedBranch

    def forward(self, x: Tensor) -> Tensor:
        """The samples `x` (N, ...) times their gates."""
        return mask(self._stochastic_depth_branch, x, training=self.training)


def find_sums(graph: fx.Graph, block: nn.Module, drop_paths: Sequence[str]) -> dict[Key, Sum | CutError]:
    """The branches in a recording of a block: of its drop paths, or without any of all residual additions.

    What cannot be separated has the reason in place of its sum.
    """
    cuts.name_values_changed_in_place(graph, block)
    if not drop_paths:
        additions = cuts.residual_sums(graph, block)
        return {("", index): _separable(residual, block) for index, residual in enumerate(additions)}
    found: dict[Key, Sum | CutError] = {}
    for call in _calls(graph, drop_paths).values():
        cuts.move_behind_what_commutes(call, block)
    for key, call in _calls(graph, drop_paths).items():
        try:
            found[key] = _separable(cuts.drop_path_sum(call, block), block)
        except CutError as error:
            found[key] = error
    return found


def _separable(residual: Sum, block: nn.Module) -> Sum | CutError:
    try:
        cuts.cut(residual, block)
    except CutError as error:
        return error
    return residual


def _calls(graph: fx.Graph, drop_paths: Sequence[str]) -> dict[Key, fx.Node]:
    """The calls of a block's drop paths, in order."""
    numbers = {path: itertools.count() for path in drop_paths}
    return {
        (cast(str, node.target), next(numbers[cast(str, node.target)])): node
        for node in graph.nodes
        if node.op == "call_module" and node.target in numbers
    }


def parts_of(branches: Mapping[Key, cuts.Branch], block: nn.Module) -> dict[Key, BranchParts]:
    """What holds the parameters of each branch of a recording: children that only branches call, and single parameters.

    A child that several branches call is a part of each.
    """
    if not branches:
        return {}
    inner = {node for branch in branches.values() for node in branch.nodes}
    nodes = next(iter(inner)).graph.nodes
    outside = {node.target for node in nodes if node.op == "call_module" and node not in inner}
    return {key: _parts(branch, outside, block) for key, branch in branches.items()}


def _parts(branch: cuts.Branch, outside: Collection[Any], block: nn.Module) -> BranchParts:
    members: dict[nn.Module, None] = {}
    direct: dict[tuple[nn.Module, str], None] = {}
    for node in branch.nodes:
        if node.op == "call_module" and node.target not in outside:
            members[block.get_submodule(cast(str, node.target))] = None
        elif node.op == "get_attr":
            path, _, name = cast(str, node.target).rpartition(".")
            direct[block.get_submodule(path), name] = None
    return BranchParts(list(members), list(direct))


def rewrite(graph: fx.Graph, block: nn.Module, branches: BlockBranches) -> Callable[..., Any]:
    """Code of a block's forward, taking the block and the opaque arguments, with every gated branch behind its gate."""
    graph = _copy(graph)
    replaced: dict[fx.Node, fx.Node] = {}
    sums = find_sums(graph, block, branches.drop_paths)
    calls = _calls(graph, branches.drop_paths)
    for key, residual in sums.items():
        if key not in branches.known:
            if isinstance(residual, CutError) and not branches.drop_paths:
                continue  # An addition that is no branch stays as it is.
            raise CutError(f"{key[0] or 'an addition'} is used in a way that was not foreseen")
        if key not in branches.gated:
            continue
        if branches.treatments[key] == "mask":
            _mask(calls[key], key, block, branches)
        elif isinstance(residual, CutError):
            raise residual
        else:
            replaced[residual.add] = _gate(residual.after(replaced), key, block, branches)
    graph.lint()
    return _compile(graph, f"{branches.name}: the forward that runs open branches only")


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy without what the recording only decided by."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in reversed(list(copy.nodes)):
        if not node.users and (is_size(node) or node.target in (bool, len)):
            copy.erase_node(node)
    return copy


def _gate(residual: Sum, key: Key, block: nn.Module, branches: BlockBranches) -> fx.Node:
    branch = cuts.cut(residual, block)
    kinds = cuts.batch_kinds(branch, residual)
    function = _compile(_branch_graph(branch, residual), f"{branches.name}: branch {key[0]}#{key[1] + 1}")
    graph = residual.add.graph
    make = _gated_sum
    if residual.shortcut is None or branch.sides:
        if residual.shortcut is None and branch.sides:
            raise CutError("the branch is added to nothing and gives more than one value")
        make = _gated_value if residual.shortcut is None else _gated_sum_and_sides
    # Where the branch does not run, the shortcut carries no gradient to these inputs.
    carried: set[fx.Node] = set() if residual.shortcut is None else cuts.ancestors(residual.shortcut)
    inputs = [_Input(samples=kinds[node], carried=node in carried) for node in branch.inputs]
    gated_sum = make(block, branches, key, function, inputs)
    with graph.inserting_before(residual.add):
        shortcut = () if residual.shortcut is None else (residual.shortcut,)
        gated_node = graph.call_function(gated_sum, (*shortcut, *branch.inputs))
    result = gated_node
    if branch.sides:
        with graph.inserting_before(residual.add):
            result = graph.call_function(operator.getitem, (gated_node, 0))
            sides = [graph.call_function(operator.getitem, (gated_node, i + 1)) for i in range(len(branch.sides))]
        for side, new in zip(branch.sides, sides, strict=True):
            side.replace_all_uses_with(new)
            graph.erase_node(side)
    residual.add.replace_all_uses_with(result)
    graph.erase_node(residual.add)
    inner = set(branch.nodes)
    for node in reversed(list(graph.nodes)):
        if node in inner or (is_size(node) and not node.users):
            graph.erase_node(node)
    return result


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


def _compile(graph: fx.Graph, description: str) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{description}>", "exec"), namespace)
    return namespace["forward"]


class _Input(NamedTuple):
    """What is known of an input of a branch.

    Attributes:
        samples: whether its first dimension is one of samples; None where the call must tell.
        carried: whether it is the shortcut or what that is computed from.
    """

    samples: bool | None
    carried: bool


def _gated_sum(
    block: nn.Module,
    branches: BlockBranches,
    key: Key,
    function: Callable[..., Tensor],
    kinds: Sequence[_Input],
    *,
    repeatable: bool = True,
) -> Callable[..., Tensor]:
    gated, parts = branches.gated[key], branches.parts[key]
    known: dict[Any, list[bool]] = {}

    @compiled_inside
    def gated_sum(shortcut: Tensor, *inputs: Any) -> Tensor:
        # Inside of another branch of the block, whose shapes are being looked up.
        holder = without_data(block).eval() if gated.passes.is_dry else block
        others = [
            value for value, kind in zip(inputs, kinds, strict=True) if isinstance(value, Tensor) and not kind.carried
        ]
        if len(inputs) == 1 and kinds[0].samples and inputs[0].shape[0] == shortcut.shape[0]:
            return gated.add(
                shortcut,
                inputs[0],
                holder,
                function,
                parts=parts,
                training=block.training,
                others=others,
                repeatable=repeatable,
            )
        shapes = (shortcut.shape[0], *(value.shape if isinstance(value, Tensor) else None for value in inputs))
        of_batch = known.get(shapes)
        if of_batch is None:
            if gated.passes.granularity == "batch":
                of_batch = [False] * len(inputs)
            else:
                with gated.passes.dry_run():
                    of_batch = samples_among(
                        function, block, inputs, [kind.samples for kind in kinds], shortcut.shape[0]
                    )
            known[shapes] = of_batch
        shared = [value for value, samples in zip(inputs, of_batch, strict=True) if not samples]
        own = tuple(value for value, samples in zip(inputs, of_batch, strict=True) if samples)

        def of_samples(module: nn.Module, taken: tuple[Tensor, ...]) -> Tensor:
            rest, some = iter(shared), iter(taken)
            return function(module, *(next(some if samples else rest) for samples in of_batch))

        return gated.add(shortcut, own, holder, of_samples, parts=parts, training=block.training, others=others)

    gated_sum.__name__ = f"gated_sum_{branches.known.index(key)}"
    return gated_sum


def _gated_sum_and_sides(
    block: nn.Module, branches: BlockBranches, key: Key, function: Callable[..., Any], kinds: Sequence[_Input]
) -> Callable[..., Any]:
    """The sum, and what else the branch's attention returns: attention maps are None where not all samples ran."""
    number = branches.known.index(key)
    sides_without_run: dict[Any, tuple[Any, ...]] = {}

    @compiled_inside
    def gated_sum_and_sides(shortcut: Tensor, *inputs: Any) -> tuple[Any, ...]:
        seen: list[tuple[Any, ...]] = []

        def first(module: nn.Module, *values: Any) -> Tensor:
            output, *sides = function(module, *values)
            if output.shape[0] == shortcut.shape[0]:
                seen.append(tuple(sides))
            return output

        summed = _gated_sum(block, branches, key, first, kinds, repeatable=False)(shortcut, *inputs)
        if seen:
            return summed, *seen[-1]
        shapes = tuple(value.shape if isinstance(value, Tensor) else None for value in inputs)
        if shapes not in sides_without_run:
            with branches.gated[key].passes.dry_run():
                sides = output_without_data(function, block, inputs)[1:]
            sides_without_run[shapes] = tuple(_without_tensors(side) for side in sides)
        return summed, *sides_without_run[shapes]

    gated_sum_and_sides.__name__ = f"gated_sum_and_sides_{number}"
    return gated_sum_and_sides


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (tuple, list)):
        return type(value)([_without_tensors(item) for item in cast("list[Any]", value)])
    return value


def _gated_value(
    block: nn.Module, branches: BlockBranches, key: Key, function: Callable[..., Tensor], kinds: Sequence[_Input]
) -> Callable[..., Tensor]:
    """Where a block without a shortcut drops all that it computes, closed gates give zeros."""
    gated_sum = _gated_sum(block, branches, key, function, kinds)
    known: dict[Any, tuple[int, ...]] = {}

    @compiled_inside
    def gated_value(*inputs: Any) -> Tensor:
        shapes = tuple(value.shape if isinstance(value, Tensor) else None for value in inputs)
        if shapes not in known:
            with branches.gated[key].passes.dry_run():
                known[shapes] = output_without_data(function, block, inputs).shape
        tensor = next(value for value in inputs if isinstance(value, Tensor))
        return gated_sum(tensor.new_zeros(known[shapes]), *inputs)

    gated_value.__name__ = f"gated_value_{branches.known.index(key)}"
    return gated_value


def _mask(call: fx.Node, key: Key, block: nn.Module, branches: BlockBranches) -> None:
    gated = branches.gated[key]

    @compiled_inside
    def masked(x: Tensor) -> Tensor:
        return mask(gated, x, training=block.training)

    masked.__name__ = f"masked_{branches.known.index(key)}"
    call.op, call.target = "call_function", masked


def mask(gated: GatedBranch, x: Tensor, *, training: bool) -> Tensor:
    """A branch's output `x` (N, ...) times its gates, where the branch cannot be skipped."""
    gate = gated.passes.gate(gated.index, x.shape[0], x.device, training)
    factor = gated.factor(gate and gate.survival_prob)
    if gated.passes.observer is not None and (gate is None or gate.num_open):
        x = gated.passes.observer(gated.index, torch.clone, x)
    if gate is None:
        return x if factor == 1.0 else x * factor
    return x * _weights(gate, x, factor)


def _weights(gate: Gate, x: Tensor, factor: float) -> Tensor:
    weights = x.new_full(
        (x.shape[0], *[1] * (x.dim() - 1)), 0.0 if gate.order is not None or not gate.num_open else factor
    )
    if gate.order is not None:
        weights[gate.order[: gate.num_open]] = factor
    return weights
