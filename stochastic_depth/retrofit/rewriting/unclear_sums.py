"""Sums that may be residual additions, but are no branches here, with the reason for `print(depth)`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx, nn

from stochastic_depth.retrofit.rewriting.lookalikes import (
    are_complements,
    are_scores,
    becomes_a_gate,
    is_masked,
    is_modulation,
    starts_at_zeros,
    was_taken_out,
)
from stochastic_depth.retrofit.rewriting.operations import added, ancestors, computes, is_computed, name_of
from stochastic_depth.retrofit.rewriting.residual_sums import ends_a_shortcut


def unclear_sums(graph: fx.Graph, block: nn.Module, gated: Collection[fx.Node]) -> Iterator[str]:
    """Why a sum of a value, and of what layers compute from it, has no gate.

    Args:
        graph: the recording.
        block: the block.
        gated: nodes of branches and their sums, in which other sums are parts of branches.
    """
    for node in graph.nodes:
        operands = added(node) or _added_by_index(node)
        if operands is None or node in gated or are_scores(node, block) or becomes_a_gate(node, block):
            continue
        for shortcut, output in (operands, operands[::-1]):
            reason = _reason(node, shortcut, output, block)
            if reason:
                yield reason
                break


def _reason(node: fx.Node, shortcut: fx.Node, output: fx.Node, block: nn.Module) -> str:
    of_shortcut, of_output = ancestors(shortcut), ancestors(output)
    between = of_shortcut - of_output
    is_branch = (
        any(is_computed(each) for each in of_shortcut & of_output)
        and not any(computes(each, block) for each in between)
        and any(computes(each, block) for each in of_output - of_shortcut)
    )
    looks_otherwise = (
        are_complements(shortcut, output)
        or is_modulation(shortcut, output, block)
        or was_taken_out(shortcut)
        or starts_at_zeros(shortcut)
        or starts_at_zeros(output)
    )
    if not is_branch or looks_otherwise:
        return ""
    if added(node) is None:
        return f"it is a call of {name_of(node)}, which adds to some positions only"
    if is_masked(shortcut, block):
        return "its shortcut is multiplied by a mask of the block"
    changes = [name_of(each) for each in node.graph.nodes if each in between and ends_a_shortcut(each, between, block)]
    return f"its shortcut passes {' and '.join(dict.fromkeys(changes))}" if changes else ""


def _added_by_index(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a sum at some positions; None for other nodes."""
    if name_of(node).removesuffix("_") not in ("index_add", "scatter_add") or not node.args:
        return None
    first, last = node.args[0], node.args[-1]
    return (first, last) if isinstance(first, fx.Node) and isinstance(last, fx.Node) else None
