"""A block of another library with gated branches: it runs rewritten code, or its own code with masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import call_in_trace, eager
from stochastic_depth.copies import plain_class, way_around
from stochastic_depth.residual import masks_only, outside_graph
from stochastic_depth.retrofit.code.called import called
from stochastic_depth.retrofit.code.forms import form_of_leaves, identities, settings
from stochastic_depth.retrofit.code.own_forward import own_forward
from stochastic_depth.retrofit.code.signatures import flatten
from stochastic_depth.retrofit.recording.run import run_with_edits
from stochastic_depth.retrofit.rewriting.gated_calls import in_training
from stochastic_depth.retrofit.rewriting.rewrite import GatedUse, edits_of
from stochastic_depth.retrofit.running.block_branches import BlockBranches
from stochastic_depth.retrofit.running.block_call import BlockCall
from stochastic_depth.retrofit.running.collected import MASKED, are_collected
from stochastic_depth.retrofit.running.known_forms import Prepared
from stochastic_depth.retrofit.running.masked_drop_path import own_code, passing_drop_paths
from stochastic_depth.retrofit.running.preparation import check_again, prepare
from stochastic_depth.torch_private import is_traced, outside_trace


class StochasticBlock(nn.Module):
    """Behavior of another library's block with gated branches. `make_stochastic_` gives this class to modules."""

    _stochastic_depth_branch: BlockBranches

    @outside_graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, with its branches gated."""
        if not isinstance(self, StochasticBlock):  # restored; someone, such as a wrapper, has kept this method
            return type(self).forward(self, *args, **kwargs)
        branches = self._stochastic_depth_branch
        own = super().forward if branches.own_forward is None else branches.own_forward
        if branches.is_plain(self):
            return own(*args, **kwargs)
        if (call := call_in_trace(self, args, kwargs)) is not None:
            return call
        prepared, leaves = _prepared_for(branches, self, args, kwargs)
        if prepared.code is None:
            with own_code(self, branches.of_drop_paths(self)):
                return own(*args, **kwargs)
        if are_collected(self):
            branches.mask_of_call = MASKED
            for use in prepared.uses:
                branches.warn_of_mask(self, use.key, MASKED)
            return _masked_code(branches, self, prepared, args, kwargs, leaves)
        if masks_only.get():
            return _masked_code(branches, self, prepared, args, kwargs, leaves)
        for name, value in prepared.stores.items():
            setattr(self, name, value)
        return prepared.code(self, *leaves)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and "_stochastic_depth_branch" in self.__dict__:
            refuse_bypass(self, value)
        super().__setattr__(name, value)


@eager
def _prepared_for(
    branches: BlockBranches, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Prepared, list[Any]]:
    """The prepared code for the form of a call, and the call's opaque arguments.

    Raises:
        RuntimeError: if an addition cannot be gated.
    """
    leaves: list[Any] = []
    signature = flatten((args, kwargs), leaves)
    if torch.compiler.is_exporting() or is_traced():
        return _known_for_export(branches, block, leaves), leaves
    _refuse_ways_around(branches, block)
    reads = branches.reads
    if reads is None or reads.children != reads.children_now(block):
        reads = branches.look_again(block, leaves)
    of_leaves = form_of_leaves(leaves, branches.forms.called)
    set_to = settings(leaves), identities(leaves), branches.of_children()
    form = (signature, of_leaves, set_to, reads.now(block))
    own = branches.known_form(form, leaves)
    if own is None and reads != (now := branches.reads_with(block, leaves)):
        # What is there now leads to more that is read.
        branches.reads = now
        form = (signature, of_leaves, set_to, now.now(block))
        own = branches.known_form(form, leaves)
    if own is None:
        prepared = branches.shared_code(block, form, leaves)
        if prepared is None:
            prepared = prepare(BlockCall(branches, block, signature, leaves))
            if branches.reads is not None and branches.reads is not reads:
                # A child told a value: an equal block may take this code only where its child tells the same.
                form = (signature, of_leaves, set_to, branches.reads.now(block))
        own = branches.add_form(form, leaves, prepared)
    own.num_calls += 1
    if own.is_its_turn():
        check_again(BlockCall(branches, block, signature, leaves), own.prepared)
    if own.prepared.refusal:
        raise RuntimeError(own.prepared.refusal)
    return own.prepared, leaves


def _masked_code(
    branches: BlockBranches,
    block: nn.Module,
    prepared: Prepared,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: list[Any],
) -> Any:
    """The result of the block's own code with each branch's output multiplied by its gate."""

    def weights(use: GatedUse) -> Callable[[Tensor], float | Tensor]:
        def of(output: Tensor) -> float | Tensor:
            training = in_training(block, use.key) and not use.is_evaluated
            return branches.gated[use.key].weights(output, training=training) / use.scale

        return of

    edits = edits_of(prepared.uses, weights)
    objects = [leaf for leaf in leaves if type(leaf) in branches.forms.called]
    with passing_drop_paths(), called(objects):
        return run_with_edits(block, own_forward(block, block), args, kwargs, leaves, edits, branches.inlined)


def _known_for_export(branches: BlockBranches, block: nn.Module, leaves: list[Any]) -> Prepared:
    """Code that was proven earlier in evaluation, because an export has no values for a proof."""
    for branch in branches.gated.values():
        branch.passes.gate(branch.index, 1, torch.device("cpu"), block.training)  # raises if gates would act
    with outside_trace():
        shapes = [leaf.shape[1:] if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    for (_, of_leaves, _, state), own in branches.own_forms.items():
        known = [form[0][1:] if isinstance(form, tuple) and isinstance(form[0], tuple) else form for form in of_leaves]
        if own.prepared.code is not None and ("training", bool, False) in state[0] and known == shapes:
            return own.prepared
    raise RuntimeError(
        f"{branches.described(block)} has not been proven in evaluation yet, and an export "
        "cannot do that: run the model once in evaluation mode on the example inputs, or fold_ it first."
    )


def _refuse_ways_around(branches: BlockBranches, block: nn.Module) -> None:
    """Refuse hooks and forwards on an inlined child, which the rewritten code does not call as a whole.

    Raises:
        RuntimeError: if it has hooks or a forward of its own.
    """
    for path in branches.inlined:
        child = block.get_submodule(path)
        if what := way_around(child):
            raise RuntimeError(
                f"{branches.described(block)} runs the code of its {path} ({plain_class(child).__name__}) step by "
                f"step, because a branch is in it, and would ignore {what} set on it. Set that on the "
                "block or on a module inside, or call restore_(model) first."
            )


def refuse_bypass(module: nn.Module, forward: Any) -> None:
    """Refuse a forward that is set on a stochastic module and does not call the previous one.

    Raises:
        RuntimeError: if it does not visibly call the previous one.
    """
    pending: list[Any] = [forward]
    seen: dict[int, Any] = {}  # which keeps them, so that none has the identity of another
    while pending and len(seen) < 100:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if getattr(value, "__self__", None) is module and getattr(value, "__name__", "") == "forward":
            if getattr(type(module), "forward", None) is value.__func__:
                return
            pending.append(value.__func__)
        if isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        pending += [each for each in (getattr(value, "__wrapped__", None), getattr(value, "__func__", None)) if each]
        pending += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        pending += list(getattr(value, "__defaults__", None) or ())
    raise RuntimeError(
        f"The forward that you set on a stochastic {plain_class(module).__name__} would bypass its gates. Set it "
        "before make_stochastic_, or call restore_(model) first. A forward that calls the previous one is allowed."
    )
