"""Code for a form of a block's call: recorded, rewritten, and proven equal to the block's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import is_capturing
from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.code_names import names_in_code
from stochastic_depth.retrofit.code.effects import ChangedObjectError
from stochastic_depth.retrofit.code.for_now import remembering
from stochastic_depth.retrofit.errors import CutError, ProofError, StoredError, TraceError
from stochastic_depth.retrofit.recording.quiet import drawn_for_samples
from stochastic_depth.retrofit.recording.stand_in import stand_in
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL
from stochastic_depth.retrofit.rewriting.gated_calls import in_training
from stochastic_depth.retrofit.rewriting.num_samples import skeleton
from stochastic_depth.retrofit.rewriting.rewrite import rewrite
from stochastic_depth.retrofit.running.block_branches import BlockBranches
from stochastic_depth.retrofit.running.block_call import BlockCall
from stochastic_depth.retrofit.running.known_forms import Prepared
from stochastic_depth.retrofit.running.masked_drop_path import follow_rule
from stochastic_depth.retrofit.running.private_runs import private
from stochastic_depth.retrofit.running.proof import FixedGates, prove
from stochastic_depth.torch_private import BatchNorm


def prepare(call: BlockCall) -> Prepared:
    """Prepare code for the form of a call: rewritten, or the block's own with masks.

    Raises:
        RuntimeError: if an addition cannot be gated.
    """
    branches, block = call.branches, call.block
    if is_capturing():
        raise RuntimeError(
            f"{branches.described(block)} is called in this form for the first time, and code cannot be proven inside "
            "a CUDA graph: run a few steps before you capture."
        )
    for key in branches.gated:
        in_training(block, key)  # raises if its drop path was replaced
    try:
        with private(), remembering():
            prepared = _proven_with_tables(call)
    except (TraceError, CutError, ProofError) as error:
        if not branches.can_mask:
            raise RuntimeError(branches.refusal(block, error)) from error
        prepared = Prepared(None, dict.fromkeys(branches.gated, str(error)))
    for key, cause in prepared.masked.items():
        branches.warn_of_mask(block, key, cause)
    return prepared


def _proven_with_tables(call: BlockCall) -> Prepared:
    """`_proven_with_objects`, tried again with arguments that have as many rows as samples, but only by chance."""
    try:
        return _proven_with_objects(call)
    except ProofError as error:
        num_tensors = sum(isinstance(leaf, Tensor) for leaf in call.leaves)
        if call.branches.granularity != "sample" or num_tensors < 2:
            raise
        try:
            return _proven_with_objects(replace(call, keeps_whole=True))
        except (TraceError, CutError, ProofError):
            raise error from None


def _proven_with_objects(call: BlockCall) -> Prepared:
    """`_proven`, tried again with calls of methods of those arguments that the code changes, such as a cache."""
    called = call.branches.forms.called
    try:
        return _proven(call)
    except ChangedObjectError as error:
        if not error.kinds or error.kinds <= called:
            raise
        called |= error.kinds
        return _proven(call)


def _proven(call: BlockCall) -> Prepared:
    """Rewritten code for a call, after it was proven equal to the block's own."""
    branches, block = call.branches, call.block
    forms, of_samples = branches.forms, branches.granularity == "sample"
    if of_samples:
        _refuse_places(block)
    trial = stand_in(block, branches.inlined)
    with drawn_for_samples() as functions:
        whole = call.record(trial, {})
    if functions and not branches.drop_paths:
        branches.warn_of_own_drop(block, functions[0])
    if whole.stores or whole.constants:
        again = call.record(trial, {})
        if again.stores:
            raise StoredError(f"the forward stores {', '.join(whole.stores)} on the block")
        if [id(tensor) for tensor in again.constants] != [id(tensor) for tensor in whole.constants]:
            raise TraceError("the forward uses a tensor that cannot be traced (autograd.Function, another library)")
    if not whole.telling <= branches.telling:
        branches.telling |= whole.telling
        branches.reads = branches.reads_with(block, call.leaves)
    exact = skeleton(whole.graph, with_numbers=True)
    few = call.generalize(trial, whole)
    own, fixed = _with_fixed_gates(branches, trial)
    # An input without gradients proves nothing about those that have some: they all have, unless the code asks.
    asks = branches.reads is not None and "requires_grad" in branches.reads.names
    of_inputs = [leaf.requires_grad for leaf in call.leaves if asks and isinstance(leaf, Tensor)]
    num_proven = few.num_many if few and of_samples else 0
    settings = torch.is_grad_enabled(), block.training, tuple(of_inputs), branches.of_children()
    of = (branches.fingerprint, settings, skeleton(whole.graph))
    code, uses, ungated, is_of_one_size = rewrite(whole.graph, trial, own, branches.granularity)
    if forms.proven.get(of, -1) < num_proven:
        copied = call.copied(few.rows if few else {}, with_gradients=not asks)
        many = (few.num_many, call.copied(few.many, with_gradients=not asks)) if few and of_samples else None
        forms.num_runs += prove(
            trial, code, uses, own.gated, fixed, copied, many, training=block.training, inlined=branches.inlined
        )
        forms.proven[of] = num_proven
    masked = {use.key: use.cause for use in uses if use.cause}
    recorded = (few.recorded, few.rows) if few else (exact, {})
    of_subset = (few.num_many, few.many) if few and of_samples else None
    is_of_any_size = few is not None and not whole.asks_for_sizes and not is_of_one_size
    return Prepared(code, masked, whole.stores, tuple(uses), ungated, recorded, of_subset, is_of_any_size)


def _refuse_places(block: nn.Module) -> None:
    """Refuse batch norms that split their batch, in training only: a proof runs them in evaluation.

    Raises:
        TraceError: if there is one, such as timm's `SplitBatchNorm2d`.
    """
    for path, module in block.named_modules():
        kind = plain_class(module)
        is_own = isinstance(module, BatchNorm) and not kind.__module__.startswith("torch.nn.")
        if is_own and not {"split", "chunk", "tensor_split"}.isdisjoint(names_in_code(kind)[0]):
            raise TraceError(f"its {path} ({kind.__name__}) asks for the places of the samples in the batch")


def _with_fixed_gates(branches: BlockBranches, trial: nn.Module) -> tuple[BlockBranches, FixedGates]:
    """What rewritten code asks for on a stand-in."""
    fixed = FixedGates(next(iter(branches.gated.values())).passes)
    gated = {key: replace(branch, passes=fixed) for key, branch in branches.gated.items()}
    own = replace(branches, gated=gated, parts={}, _parts_on_paths={})
    trial.__dict__["_stochastic_depth_branch"] = own
    return own, fixed


def check_again(call: BlockCall, prepared: Prepared) -> None:
    """Record the block's own code again, after 2, 4, 8, … calls, because it may read values in unknown ways.

    If it computes something else now, drop paths are masked from then on, and additions raise an error.
    """
    if is_capturing():
        return
    branches, block = call.branches, call.block
    for path in {key[0] for key in branches.gated} - {"", FUNCTIONAL}:
        follow_rule(block.get_submodule(path))
    if prepared.recorded is None:
        return
    before, rows = prepared.recorded

    def now(rows: Mapping[int, Tensor] = rows) -> Any:
        try:
            with private(), remembering():
                run = call.record(stand_in(block, branches.inlined), rows)
        except TraceError as error:
            return error
        return skeleton(run.graph, with_numbers=True)

    changed = now()
    # A few samples may not fit a full cache.
    whole = now({}) if isinstance(changed, TraceError) else changed
    error: Exception | None = None
    if changed == before:
        error = _mixing_now(call, prepared)
    elif isinstance(whole, TraceError) and whole.__cause__ is not None:
        if isinstance(whole.__cause__, torch.OutOfMemoryError):
            return
        raise whole.__cause__  # The block's own code raises it, as for a bad batch.
    elif isinstance(whole, TraceError) or changed == now():  # Objects that differ between recordings do not count.
        error = TraceError(
            "its code does something else than in an earlier call, because of values read from elsewhere"
        )
    if error is None:
        return
    if not branches.can_mask:
        prepared.refusal = branches.refusal(block, error)
        return
    prepared.code, prepared.masked = None, dict.fromkeys(branches.gated, str(error))
    for key, cause in prepared.masked.items():
        branches.warn_of_mask(block, key, cause)


def _mixing_now(call: BlockCall, prepared: Prepared) -> ProofError | None:
    """Why the proof for some of the samples fails now: a child may mix samples since then."""
    if prepared.code is None or prepared.of_subset is None or not prepared.uses:
        return None
    branches, block = call.branches, call.block
    num, rows = prepared.of_subset
    trial = stand_in(block, branches.inlined, own_values=True)  # Those that training has led to.
    own, fixed = _with_fixed_gates(branches, trial)
    copied = call.copied(rows)
    try:
        with private(), remembering():
            branches.forms.num_runs += prove(
                trial,
                prepared.code,
                prepared.uses,
                own.gated,
                fixed,
                copied,
                (num, copied),
                training=block.training,
                inlined=branches.inlined,
                only_some=True,
            )
    except TraceError:  # It is noticed as it is recorded.
        return None
    except ProofError as error:
        return error
    return None
