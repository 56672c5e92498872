"""Tells residual additions in a recording from other additions."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import fx, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.cuts import Sum
from stochastic_depth.retrofit.rewriting.lookalikes import (
    are_calls_of_one,
    are_complements,
    are_same_items,
    are_scores,
    becomes_a_gate,
    is_affine,
    is_masked,
    is_merge,
    is_modulation,
    is_negation,
    is_network,
    is_one_number,
    is_recurrence,
    is_side_input,
    is_side_output,
    is_stage,
    starts_at_zeros,
    was_taken_out,
)
from stochastic_depth.retrofit.rewriting.operations import (
    PRODUCTS,
    added,
    ancestors,
    computes,
    is_cheap,
    is_computed,
    is_plain,
    name_of,
    sources,
)
from stochastic_depth.torch_private import parameter_dict


def residual_sums(graph: fx.Graph, block: nn.Module) -> list[Sum]:
    """All residual additions in a recording, in order.

    An addition is one if both operands are computed from a common value, and one of them, the shortcut, is that value
    itself or computed from it by at most half as many children with parameters as the other, without any product of
    two values (a projection). A branch has at least one child with parameters. What was added to a shortcut before, by
    a parallel branch, does not count for it: in `x + attention(y) + mlp(y)` both are branches. Streams that update each
    other need no common value (`_of_streams`). Sums that only look like this are left out, see `lookalikes`.
    """
    sums: list[Sum] = []
    bases: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        operands = added(node)
        if operands is None or operands[0] is operands[1] or any(map(is_one_number, operands)):
            continue
        for shortcut, output in (operands, operands[::-1]):
            base = bases.get(shortcut, shortcut)
            found = [each for each in dict.fromkeys((shortcut, base)) if _is_shortcut(each, output, sums, block)]
            if not found:
                continue
            is_projected = all(_is_projected(each, output, block) for each in found)
            if not is_projected or not becomes_a_gate(node, block):
                sums.append(Sum(node, shortcut, output, is_projected=is_projected))
                bases[node] = base
                break
    sums = [
        each
        for each in sums
        if not any(
            looks_like(each, outer, block) for outer in sums for looks_like in (is_side_input, is_stage, is_merge)
        )
    ]
    repeated = {*_repeated(sums)}
    sums = [each for each in sums if each.add not in repeated]
    sums += _of_streams(graph, sums, block)
    places = {node: place for place, node in enumerate(graph.nodes)}
    return sorted(sums, key=lambda each: places[each.add])


def _of_streams(graph: fx.Graph, sums: Sequence[Sum], block: nn.Module) -> list[Sum]:
    """Sums that add what is computed from one argument to another one, which is added to the first in turn.

    So do reversible blocks, whose two arguments have nothing in common: `a = a + f(b)`, `b = b + g(a)`, and both go on.
    Others exchange at the same time: `a, b = a + f(b), b + g(a)`.
    """
    known = {each.add for each in sums}
    candidates = [
        Sum(node, shortcut, output)
        for node in graph.nodes
        for shortcut, output in itertools.permutations(added(node) or () if node not in known else (), 2)
        if shortcut.op != "get_attr" and is_plain(shortcut, block) and not is_plain(output, block)
        if not are_scores(node, block)
    ]
    exchanged = [
        each
        for each in candidates
        if any(_adds_from(each, other) and _adds_from(other, each) for other in candidates if each is not other)
    ]
    return exchanged + [
        each
        for each in candidates
        if each not in exchanged
        and any(
            _adds_from(each, other)
            and is_plain(cast(fx.Node, other.shortcut), block)
            and each.add in (inside := ancestors(other.output))
            and any(user is not other.add and user not in inside for user in each.add.users)
            for other in sums
        )
    ]


def _adds_from(a: Sum, b: Sum) -> bool:
    """Whether a sum adds what is computed from the shortcut of another one, which its own shortcut is not."""
    return b.shortcut in ancestors(a.output) - ancestors(cast(fx.Node, a.shortcut))


def _repeated(sums: Sequence[Sum]) -> Iterator[fx.Node]:
    """Sums that add one early value again and again to what a network makes of it, such as its embedded input.

    Each takes all that comes before for its branch (nanochat, GCNII, implicit layers). A skip around several blocks
    shares its shortcut with the first of them too, but with no third sum. Neither does a stream that begins with the
    early value, and is added to itself unscaled, count beside sums that scale it.
    """
    of_early: dict[tuple[fx.Node, bool], list[Sum]] = {}
    for each in sums:
        first = value = cast(fx.Node, each.shortcut)
        while name_of(first) in PRODUCTS and len(computed := [x for x in first.all_input_nodes if is_computed(x)]) == 1:
            first = computed[0]
        of_early.setdefault((first, first is not value), []).append(each)
    for (early, is_scaled), group in of_early.items():
        chain = [
            a.add
            for a in group
            if any(a.add in ancestors(b.output) or b.add in ancestors(a.output) for b in group if b is not a)
        ]
        if len(chain) > (1 if is_scaled else 2) or (not is_scaled and _num_in_a_row(early, group) > 2):
            yield from chain


def _num_in_a_row(early: fx.Node, sums: Sequence[Sum]) -> int:
    """How often a value is added in a row, also to what is not computed from it, such as positions to their tokens."""
    known = {each.add for each in sums}
    lengths: dict[fx.Node, int] = {}
    for node in early.users:
        others = [operand for operand in added(node) or () if operand is not early]
        if node in known or (others and early not in ancestors(others[0])):
            inside = ancestors(node)
            lengths[node] = 1 + max((length for other, length in lengths.items() if other in inside), default=0)
    return max(lengths.values(), default=0)


def _is_shortcut(shortcut: fx.Node, output: fx.Node, before: Sequence[Sum], block: nn.Module) -> bool:
    if (
        was_taken_out(shortcut)
        or is_modulation(shortcut, output, block)
        or are_calls_of_one(shortcut, output, block)
        or are_complements(shortcut, output)
        or is_masked(shortcut, block)
    ):
        return False
    of_shortcut, of_output = ancestors(shortcut), ancestors(output)
    if not any(computes(node, block) for node in of_output - of_shortcut):
        return False
    if shortcut in of_output:
        return shortcut.op != "get_attr"
    if starts_at_zeros(shortcut) or starts_at_zeros(output):
        return False
    if are_same_items(shortcut, output):
        return False
    if not any(_is_common(node, shortcut, of_shortcut, of_output, block) for node in of_shortcut & of_output):
        return False
    projection = of_shortcut - of_output
    if any(ends_a_shortcut(node, projection, block) for node in projection):
        return False
    branch = of_output - of_shortcut
    if (
        is_recurrence(projection, branch, block)
        or is_affine(projection, branch, block)
        or is_side_output(projection, of_output, before)
        or is_network([node for node in shortcut.graph.nodes if node in projection], block)
    ):
        return False
    # Layers, or the children that contain them: a branch may be one child, and so may a projection.
    return 2 * _num_computing(projection, block) <= _num_computing(branch, block) or 2 * _num_layers(
        projection, block
    ) <= _num_layers(branch, block)


def _is_projected(shortcut: fx.Node, output: fx.Node, block: nn.Module) -> bool:
    """Whether layers, or children with code of their own, compute a shortcut that the branch does not begin with."""
    of_output = ancestors(output)
    return shortcut not in of_output and any(
        computes(node, block) or _is_foreign(node, block) for node in ancestors(shortcut) - of_output
    )


def ends_a_shortcut(node: fx.Node, projection: Collection[fx.Node], block: nn.Module) -> bool:
    """Whether a value is no shortcut any more after this node: a function, or a product or sum of two values.

    A mask may multiply a shortcut without a projection, if the block is given the mask or the branch uses it too: `x *
    mask + f(x) * mask`. Coefficients that the block computes for the shortcut, as those of EDM's denoisers, may not.
    """
    factors = sources(node) if name_of(node) in PRODUCTS else []
    if any(is_plain(each, block) for each in factors) and all(_is_given(each, projection, block) for each in factors):
        return any(computes(each, block) for each in ancestors(node) if each in projection)
    is_function = node.op == "call_function" or name_of(node) in PRODUCTS or added(node) is not None
    return is_function and is_computed(node) and not is_cheap(node)


def _is_given(factor: fx.Node, projection: Collection[fx.Node], block: nn.Module) -> bool:
    """Whether a factor of a shortcut is a value of the stream or of the branch, or what the block is given."""
    return (
        not is_plain(factor, block)
        or factor not in projection
        or all(
            each.op in ("placeholder", "get_attr") or is_cheap(each) or is_negation(each) or name_of(each) in PRODUCTS
            for each in ancestors(factor)
        )
    )


def _is_common(
    node: fx.Node,
    shortcut: fx.Node,
    of_shortcut: Collection[fx.Node],
    of_output: Collection[fx.Node],
    block: nn.Module,
) -> bool:
    """Whether a shortcut and an output come from a node and part there, with something of it in common.

    A container of streams, the outputs of one child, and the steps of a sequence are not common if each value comes
    from items of its own. The halves of `chunk` are: reversible blocks add what they compute from one to the other. So
    is a child that prepares a shortcut beside the input of a branch (MobileBert).
    """
    if node.op == "get_attr":
        return False
    users = [user for user in node.users if node in sources(user) and not is_size(user)]
    used = [[user for user in users if user in values] for values in (of_shortcut, of_output)]
    if used[0] == used[1] or not all(used):
        return False  # They part later, or one of them has its shape only.
    is_projected = any(computes(each, block) for each in of_shortcut if each not in of_output)
    if is_projected and not any(_may_overlap(a, b) for a in used[0] for b in used[1]):
        return False  # Two inputs in one tensor, each with layers of its own.
    items = [[_item(user) for user in users] for users in used]
    if name_of(node) in _HALVES or None in items[0] + items[1]:
        return True
    if shortcut in used[0] and isinstance(shortcut.args[1], (int, str)) and _is_foreign(node, block):
        return True
    return any(_may_be_same(a, b) for a in items[0] for b in items[1] if a and b)


def _is_foreign(node: fx.Node, block: nn.Module) -> bool:
    """Whether a child has code of its own. It may return several values, while most of PyTorch's return one tensor."""
    if node.op != "call_module":
        return False
    return not plain_class(block.get_submodule(cast(str, node.target))).__module__.startswith("torch.nn.")


def _item(user: fx.Node) -> dict[int, int | str] | None:
    """Which item a node takes from another, by dimension; None if it takes something else."""
    if user.target is not operator.getitem:
        return None
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    return {dim: each for dim, each in enumerate(index) if isinstance(each, (int, str))} or None


def _may_be_same(a: Mapping[int, int | str], b: Mapping[int, int | str]) -> bool:
    return all(a[dim] == b[dim] for dim in a.keys() & b.keys())


def _may_overlap(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes may take the same part of a value; what follows it, as in `x[:3]` and `x[3:]`, is another."""
    if a.target is not operator.getitem or b.target is not operator.getitem:
        return True
    given = [each.args[1] if isinstance(each.args[1], tuple) else (each.args[1],) for each in (a, b)]
    indices = [[part for part in index if part is not None] for index in given]
    return len(indices[0]) != len(indices[1]) or not any(
        _lies_before(x, y) or _lies_before(y, x) for x, y in zip(*indices, strict=True)
    )


def _lies_before(a: Any, b: Any) -> bool:
    """Whether all that one index takes of a dimension comes before what the other takes, or is another item."""
    if isinstance(a, slice):
        return a.stop is not None and not _is_negative(a.stop) and a.stop == (b.start if isinstance(b, slice) else b)
    if isinstance(b, slice):
        return isinstance(a, int) and isinstance(b.start, int) and 0 <= a < b.start
    return isinstance(a, (int, str)) and isinstance(b, (int, str)) and a != b


def _is_negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


_HALVES = {"chunk", "split", "tensor_split", "unsafe_chunk", "split_with_sizes"}


def are_parallel(shortcut: fx.Node, a: fx.Node, b: fx.Node, block: nn.Module) -> bool:
    """Whether both values are computed from a shortcut, each with its own layers."""
    kept, of_a, of_b = ancestors(shortcut), ancestors(a), ancestors(b)
    if shortcut.op == "get_attr" or shortcut not in of_a & of_b or starts_at_zeros(a) or starts_at_zeros(b):
        return False
    if _addends(a) & of_b or _addends(b) & of_a:  # One of them is the shortcut of the other: x + (a + f(a) + g(a)).
        return False
    own = (of_a - of_b - kept, of_b - of_a - kept)
    return all(any(computes(node, block) for node in nodes) for nodes in own)


def _addends(value: fx.Node) -> set[fx.Node]:
    """The values that a sum of sums adds up; a value that is no sum itself."""
    return {value} if (operands := added(value)) is None else _addends(operands[0]) | _addends(operands[1])


def _num_computing(nodes: Collection[fx.Node], block: nn.Module) -> int:
    return sum(computes(node, block) for node in nodes)


def _num_layers(nodes: Collection[fx.Node], block: nn.Module) -> int:
    """Number of modules with parameters of their own that are called; a function that computes counts as one."""
    called = {node for node in nodes if node.op == "call_module"}
    inside = [
        module
        for node in called
        for module in block.get_submodule(cast(str, node.target)).modules()
        if any(value is not None for value in parameter_dict(module).values())
    ]
    return len(inside) + _num_computing([node for node in nodes if node not in called], block)
