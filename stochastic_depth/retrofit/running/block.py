"""A block of another library with gated branches: it runs rewritten code, or its own code with masks."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import eager, is_capturing
from stochastic_depth.copies import plain_class, way_around
from stochastic_depth.residual import GatedBranch, masks_only, outside_graph
from stochastic_depth.retrofit.code.called import called
from stochastic_depth.retrofit.code.effects import ChangedObjectError
from stochastic_depth.retrofit.code.fingerprints import fingerprint
from stochastic_depth.retrofit.code.for_now import remembering
from stochastic_depth.retrofit.code.forms import form_of_leaves, identities, settings
from stochastic_depth.retrofit.code.own_forward import own_forward
from stochastic_depth.retrofit.code.reads import Reads, StateOfChildren
from stochastic_depth.retrofit.code.signatures import flatten, unflatten
from stochastic_depth.retrofit.errors import CutError, ProofError, StoredError, TraceError
from stochastic_depth.retrofit.recording.quiet import drawn_for_samples
from stochastic_depth.retrofit.recording.recorder import Run, run_block, run_with_edits
from stochastic_depth.retrofit.recording.stand_in import stand_in
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL
from stochastic_depth.retrofit.rewriting.gated_calls import in_training
from stochastic_depth.retrofit.rewriting.num_samples import generalize, skeleton
from stochastic_depth.retrofit.rewriting.rewrite import GatedUse, edits_of, rewrite
from stochastic_depth.retrofit.rewriting.sums import BranchParts, DropPaths, Identity, Key, Paths, find_sums
from stochastic_depth.retrofit.running.known_forms import MAX_FORMS, Form, KnownForms, Prepared
from stochastic_depth.retrofit.running.masked_drop_path import follow_rule, own_code, passing_drop_paths
from stochastic_depth.retrofit.running.proof import (
    MAX_SAMPLES,
    FixedGates,
    arguments_anew,
    behind_nodes,
    private,
    prove,
)

__all__ = ["BlockBranches", "BranchParts", "Key", "StochasticBlock", "Treatment", "find_sums"]

Treatment = Literal["skip", "mask"]


class MaskedBranchWarning(UserWarning):
    """A branch is computed and masked because it cannot be skipped: correct, but nothing is saved."""


# Number of samples of a call that the proof runs on.
_NUM_SAMPLES = 4
# Number of arguments that are tested for holding samples.
_MAX_UNSURE = 4


class _Few(NamedTuple):
    """A recording of a call with a few of its samples.

    Attributes:
        rows: their rows in each argument.
        recorded: the recording.
        num_many: number of samples for the proof if a branch runs on some of them.
        many: the rows of these.
    """

    rows: dict[int, Tensor]
    recorded: Any
    num_many: int
    many: dict[int, Tensor]


@dataclass
class BlockBranches:
    """The branches of a stochastic block.

    Attributes:
        name: the block's name, for messages.
        drop_paths: paths of its drop paths whose calls are branches; empty where additions are.
        known: all branches that were found, including filtered ones, with their identities.
        gated: the branches that passed the filter.
        parts: the holder of each branch's parameters.
        forms: the known forms of calls.
        rates: rates of its functional drop paths, if the branches have these rates.
        own_forward: a forward that was set on the block instead of its class's.
    """

    name: str
    drop_paths: DropPaths
    known: dict[Key, Identity]
    forms: KnownForms = field(default_factory=KnownForms)
    rates: dict[Key, float] = field(default_factory=dict[Key, float])
    own_forward: Callable[..., Any] | None = None
    gated: dict[Key, GatedBranch] = field(default_factory=dict[Key, GatedBranch])
    parts: dict[Key, nn.Module] = field(default_factory=dict[Key, nn.Module])
    _parts_at: dict[Any, BranchParts] = field(default_factory=dict[Any, BranchParts], repr=False)
    _own: dict[Any, Form] = field(default_factory=dict[Any, Form], repr=False)
    _reads: Reads | None = field(default=None, repr=False)
    _fingerprint: Any = field(default=None, repr=False)
    _state_of_children: StateOfChildren | None = field(default=None, repr=False)

    def add_branch(self, key: Key, gated: GatedBranch, parts: nn.Module) -> None:
        """Gate one of the known branches."""
        self.gated[key], self.parts[key] = gated, parts

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own objects again.
        return {
            **self.__dict__,
            "_own": {},
            "_parts_at": {},
            "_reads": None,
            "_fingerprint": None,
            "_state_of_children": None,
        }

    def parts_at(self, block: nn.Module, key: Key, paths: Paths) -> nn.Module:
        """The holder of a branch's parameters on one path through the code."""
        parts = self._parts_at.get((key, paths))
        if parts is None:
            known = self.parts.get(key)
            is_same = isinstance(known, BranchParts) and known.paths == paths
            parts = cast(BranchParts, known) if is_same else BranchParts(block, *paths)
            self._parts_at[key, paths] = parts
        return parts

    @property
    def inlined(self) -> tuple[str, ...]:
        """Paths of the children whose own code is read as part of the block's code."""
        return self.drop_paths.inlined

    @property
    def was_called(self) -> bool:
        """Whether any call has shown how the branches are treated."""
        return bool(self._own)

    def cause_of_mask(self, key: Key) -> str:
        """Why a branch is masked in the calls so far; empty if it is skipped in all of them."""
        return next((own.prepared.masked[key] for own in self._own.values() if key in own.prepared.masked), "")

    @property
    def ungated(self) -> list[str]:
        """For each addition without a gate that calls have shown, what it uses."""
        return list(dict.fromkeys(used for own in self._own.values() for used in own.prepared.ungated))

    def is_plain(self, block: nn.Module) -> bool:
        """Whether the block's own code is correct as it is: in evaluation without forced gates and without a factor."""
        if block.training:
            return False
        return all(
            branch.rescale != "eval"
            and branch.passes.observer is None
            and not branch.passes.forced
            and not in_training(block, key)
            for key, branch in self.gated.items()
        )

    @eager
    def prepared_for(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Prepared, list[Any]]:
        """The prepared code for the form of a call, and the call's opaque arguments.

        Raises:
            RuntimeError: if an addition cannot be gated.
        """
        leaves: list[Any] = []
        signature = flatten((args, kwargs), leaves)
        if torch.compiler.is_exporting():
            return self._known_for_export(block, leaves), leaves
        self._refuse_ways_around(block)
        reads = self._reads
        if reads is None or reads.children != reads.children_now(block):
            reads = self._look_again(block, leaves)
        of_leaves = form_of_leaves(leaves, self.forms.called)
        set_to = settings(leaves), identities(leaves), self._of_children()
        form = (signature, of_leaves, set_to, reads.now(block))
        own = self._own.get(form)
        if own is None and reads != (now := self._reads_with(block, leaves)):
            # What is there now leads to more that is read.
            self._reads = now
            form = (signature, of_leaves, set_to, now.now(block))
            own = self._own.get(form)
        if own is None:
            if self._fingerprint is None:
                self._fingerprint = self._make_fingerprint(block)
            key = (self._fingerprint, form)
            prepared = self.forms.prepared.get(key)
            if prepared is None:
                prepared = self._prepare(block, signature, leaves)
                self.forms.remember(key, prepared)
            if len(self._own) >= MAX_FORMS:
                del self._own[next(iter(self._own))]
            own = self._own[form] = Form(prepared, prepared.num_blocks)
            prepared.num_blocks += 1
        own.num_calls += 1
        if own.is_its_turn():
            self._check_again(block, signature, leaves, own.prepared)
        if own.prepared.refusal:
            raise RuntimeError(own.prepared.refusal)
        return own.prepared, leaves

    def masked_code(
        self, block: nn.Module, prepared: Prepared, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Any:
        """The result of the block's own code with each branch's output multiplied by its gate."""

        def weights(use: GatedUse) -> Callable[[Tensor], float | Tensor]:
            def of(output: Tensor) -> float | Tensor:
                return self.gated[use.key].weights(output, training=in_training(block, use.key)) / use.scale

            return of

        edits = edits_of(prepared.uses, weights)
        objects = [leaf for leaf in leaves if type(leaf) in self.forms.called]
        with passing_drop_paths(), called(objects):
            return run_with_edits(block, own_forward(block, block), args, kwargs, leaves, edits, self.inlined)

    def _known_for_export(self, block: nn.Module, leaves: list[Any]) -> Prepared:
        """Code that was proven earlier in evaluation, because an export has no values for a proof."""
        for branch in self.gated.values():
            branch.passes.gate(branch.index, 1, torch.device("cpu"), block.training)  # raises if gates would act
        shapes = [leaf.shape[1:] if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
        for (_, of_leaves, _, state), own in self._own.items():
            known = [
                form[0][1:] if isinstance(form, tuple) and isinstance(form[0], tuple) else form for form in of_leaves
            ]
            if own.prepared.code is not None and ("training", bool, False) in state[0] and known == shapes:
                return own.prepared
        raise RuntimeError(
            f"{self._described(block)} has not been proven in evaluation yet, and an export "
            "cannot do that: run the model once in evaluation mode on the example inputs, or fold_ it first."
        )

    def _refuse_ways_around(self, block: nn.Module) -> None:
        """Refuse hooks and forwards on an inlined child, which the rewritten code does not call as a whole.

        Raises:
            RuntimeError: if it has hooks or a forward of its own.
        """
        for path in self.inlined:
            child = block.get_submodule(path)
            if what := way_around(child):
                raise RuntimeError(
                    f"{self._described(block)} runs the code of its {path} ({plain_class(child).__name__}) step by "
                    f"step, because a branch ends there, and would ignore {what} set on it. Set that on the "
                    "block or on a module inside, or call restore_(model) first."
                )

    def _reads_with(self, block: nn.Module, leaves: Sequence[Any]) -> Reads:
        """The values that the block's code may read in a call with these arguments."""
        skipped = (Tensor, *self.forms.called)
        return Reads(block, self.inlined, [leaf for leaf in leaves if not isinstance(leaf, skipped)])

    def _of_children(self) -> tuple[Any, ...]:
        """What of the children decides how they treat samples; that counts where each sample has a gate of its own."""
        return () if self._state_of_children is None else self._state_of_children.now()

    def _look_again(self, block: nn.Module, leaves: Sequence[Any]) -> Reads:
        """Read the block again after its children changed: adapters, conversions, a copy."""
        self._reads, self._fingerprint = self._reads_with(block, leaves), None
        if any(branch.passes.granularity == "sample" for branch in self.gated.values()):
            self._state_of_children = StateOfChildren(block)
        self._own, self._parts_at = {}, {}
        for parts in self.parts.values():
            if isinstance(parts, BranchParts):
                parts.refresh()
        return self._reads

    def _make_fingerprint(self, block: nn.Module) -> Any:
        rules = tuple((key, branch.rescale, branch.skipped_grad) for key, branch in self.gated.items())
        granularity = next(iter(self.gated.values())).passes.granularity
        forward = getattr(self.own_forward, "__func__", self.own_forward)
        return (
            *fingerprint(block, of_samples=granularity == "sample"),
            forward,
            tuple(self.known.items()),
            rules,
            granularity,
            self.drop_paths,
            self.inlined,
        )

    def _prepare(self, block: nn.Module, signature: Any, leaves: list[Any]) -> Prepared:
        if is_capturing():
            raise RuntimeError(
                f"{self._described(block)} is called in this form for the first time, and code cannot be proven inside "
                "a CUDA graph: run a few steps before you capture."
            )
        for key in self.gated:
            in_training(block, key)  # raises if its drop path was replaced
        try:
            with private(), remembering():
                prepared = self._proven_with_objects(block, signature, leaves)
        except (TraceError, CutError, ProofError) as error:
            # In the block's own code, the gates of functional drop paths would have no effect.
            if not self.drop_paths or any(key[0] == FUNCTIONAL for key in self.gated):
                raise RuntimeError(self._refusal(block, error)) from error
            prepared = Prepared(None, dict.fromkeys(self.gated, str(error)))
        for key, cause in prepared.masked.items():
            self._warn(block, key, cause)
        return prepared

    def _check_again(self, block: nn.Module, signature: Any, leaves: list[Any], prepared: Prepared) -> None:
        """Record the block's own code again, after 2, 4, 8, … calls, because it may read values in unknown ways.

        If it computes something else now, drop paths are masked from then on, and additions raise an error.
        """
        if is_capturing():
            return
        for path in {key[0] for key in self.gated} - {"", FUNCTIONAL}:
            follow_rule(block.get_submodule(path))
        if prepared.recorded is None:
            return
        before, rows = prepared.recorded

        def now(rows: Mapping[int, Tensor] = rows) -> Any:
            try:
                with private(), remembering():
                    run = self._recorded(stand_in(block, self.inlined), signature, leaves, rows)
            except TraceError:
                return None
            return skeleton(run.graph, with_numbers=True)

        changed = now()
        # Objects that differ between recordings do not count, and neither do a few samples that do not fit a full
        # cache.
        error: Exception | None = None
        if changed == before:
            error = self._mixing_now(block, signature, leaves, prepared)
        elif changed == now() and (changed is not None or now({}) is None):
            error = TraceError(
                "its code does something else than in an earlier call, because of values read from elsewhere"
            )
        if error is None:
            return
        if not self.drop_paths or any(key[0] == FUNCTIONAL for key in self.gated):
            prepared.refusal = self._refusal(block, error)
            return
        prepared.code, prepared.masked = None, dict.fromkeys(self.gated, str(error))
        for key, cause in prepared.masked.items():
            self._warn(block, key, cause)

    def _mixing_now(self, block: nn.Module, signature: Any, leaves: list[Any], prepared: Prepared) -> ProofError | None:
        """Why the proof for some of the samples fails now: a child may mix samples since then."""
        if prepared.code is None or prepared.of_subset is None or not prepared.uses:
            return None
        num, rows = prepared.of_subset
        trial = stand_in(block, self.inlined, own_values=True)  # Those that training has led to.
        own, fixed = self._with_fixed_gates(trial)
        call = self._call(signature, leaves, rows)
        try:
            with private(), remembering():
                self.forms.num_runs += prove(
                    trial,
                    prepared.code,
                    prepared.uses,
                    own.gated,
                    fixed,
                    call,
                    (num, call),
                    training=block.training,
                    inlined=self.inlined,
                    only_some=True,
                )
        except TraceError:  # It is noticed as it is recorded.
            return None
        except ProofError as error:
            return error
        return None

    def _described(self, block: nn.Module) -> str:
        return f"The block {self.name or 'the model'} ({plain_class(block).__name__})"

    def _refusal(self, block: nn.Module, error: Exception) -> str:
        names = ", ".join(branch.passes.names[branch.index] for branch in self.gated.values())
        sample = any(branch.passes.granularity == "sample" for branch in self.gated.values())
        other = "granularity='batch', " if sample else ""
        return (
            f"{self._described(block)} cannot be gated here ({names}): {error}. "
            f"Use {other}inputs=[...] to find its branches on an example, layers=[{self.name!r}] for the "
            "whole layer, where= to leave it out, or write the sum as stochastic_depth.Residual."
        )

    def _warn(self, block: nn.Module, key: Key, cause: str) -> None:
        branch = self.gated[key]
        kind = (plain_class(block), key, re.sub(r"\d", "", cause))  # How much it differs by differs.
        if kind in self.forms.warned:
            return
        self.forms.warned.add(kind)
        warnings.warn(
            f"The branch {branch.passes.names[branch.index]} is computed and masked, which saves nothing. "
            f"{self._described(block)}: {cause}. Other blocks of this class may be affected "
            f"too. layers=[{self.name!r}] runs it as a whole, if it does not mix samples.",
            MaskedBranchWarning,
            stacklevel=2,
        )

    def _warn_of_own_drop(self, block: nn.Module, function: str) -> None:
        kind = plain_class(block), function
        if kind not in self.forms.warned:
            self.forms.warned.add(kind)
            warnings.warn(
                f"{self._described(block)} draws one number for each sample ({function}): it may drop its branches "
                "itself, and then they are dropped twice. Set its own rate to 0.",
                stacklevel=2,
            )

    def _proven_with_objects(self, block: nn.Module, signature: Any, leaves: list[Any]) -> Prepared:
        try:
            return self._proven(block, signature, leaves)
        except ChangedObjectError as error:
            if not error.kinds or error.kinds <= self.forms.called:
                raise
            self.forms.called |= error.kinds
            return self._proven(block, signature, leaves)

    def _proven(self, block: nn.Module, signature: Any, leaves: list[Any]) -> Prepared:
        """Rewritten code for a call, after it was proven equal to the block's own."""
        trial = stand_in(block, self.inlined)
        with drawn_for_samples() as functions:
            whole = self._recorded(trial, signature, leaves, {})
        if functions and not self.drop_paths:
            self._warn_of_own_drop(block, functions[0])
        if whole.stores or whole.constants:
            again = self._recorded(trial, signature, leaves, {})
            if again.stores:
                raise StoredError(f"the forward stores {', '.join(whole.stores)} on the block")
            if [id(tensor) for tensor in again.constants] != [id(tensor) for tensor in whole.constants]:
                raise TraceError("the forward uses a tensor that cannot be traced (autograd.Function, another library)")
        exact = skeleton(whole.graph, with_numbers=True)
        few = self._generalize(trial, signature, leaves, whole)
        draws = next(iter(self.gated.values())).passes
        own, fixed = self._with_fixed_gates(trial)
        # An input without gradients proves nothing about those that have some: they all have, unless the code asks.
        asks = self._reads is not None and "requires_grad" in self._reads.names
        of_inputs = [leaf.requires_grad for leaf in leaves if asks and isinstance(leaf, Tensor)]
        num_proven = few.num_many if few and draws.granularity == "sample" else 0
        settings = torch.is_grad_enabled(), block.training, tuple(of_inputs), self._of_children()
        of = (self._fingerprint, settings, skeleton(whole.graph))
        code, uses, ungated = rewrite(whole.graph, trial, own, draws.granularity)
        if self.forms.proven.get(of, -1) < num_proven:
            call = self._call(signature, leaves, few.rows if few else {}, with_gradients=not asks)
            many = None
            if few and draws.granularity == "sample":
                many = few.num_many, self._call(signature, leaves, few.many, with_gradients=not asks)
            self.forms.num_runs += prove(
                trial,
                code,
                uses,
                own.gated,
                fixed,
                call,
                many,
                training=block.training,
                inlined=self.inlined,
            )
            self.forms.proven[of] = num_proven
        masked = {use.key: use.cause for use in uses if use.cause}
        recorded = (few.recorded, few.rows) if few else (exact, {})
        of_subset = (few.num_many, few.many) if few and draws.granularity == "sample" else None
        return Prepared(code, masked, whole.stores, tuple(uses), ungated, recorded, of_subset)

    def _with_fixed_gates(self, trial: nn.Module) -> tuple[BlockBranches, FixedGates]:
        """What rewritten code asks for on a stand-in."""
        fixed = FixedGates(next(iter(self.gated.values())).passes)
        gated = {key: replace(branch, passes=fixed) for key, branch in self.gated.items()}
        own = replace(self, gated=gated, parts={}, _parts_at={})
        trial.__dict__["_stochastic_depth_branch"] = own
        return own, fixed

    def _call(
        self, signature: Any, leaves: list[Any], rows: Mapping[int, Tensor], *, with_gradients: bool = False
    ) -> Callable[[], tuple[Sequence[Any], Mapping[str, Any], list[Any]]]:
        """Makes private copies of the arguments of a call, of which all that can may require gradients."""
        anew = arguments_anew(signature, leaves, rows, self.forms.called, unflatten)

        def call() -> tuple[Sequence[Any], Mapping[str, Any], list[Any]]:
            args, kwargs, own = anew()
            for leaf in own:
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and torch.is_grad_enabled():
                    leaf.requires_grad_()
            return args, kwargs, own

        return call if with_gradients else anew

    def _recorded(self, trial: nn.Module, signature: Any, leaves: list[Any], rows: Mapping[int, Tensor]) -> Run:
        args, kwargs, own = behind_nodes(self._call(signature, leaves, rows))
        self.forms.num_runs += 1
        return run_block(trial, args, kwargs, own, inlined=self.inlined)

    def _generalize(self, trial: nn.Module, signature: Any, leaves: list[Any], whole: Run) -> _Few | None:
        """Generalize a recording to any number of samples; None if it is unknown which rows are samples.

        It is compared with a recording of the same call with another number of samples. If an argument has as many rows
        as there are samples only by chance, the code fails unless all rows are kept.
        """
        first_of = identities(leaves) or range(len(leaves))
        lengths = {
            index: int(leaf.shape[0])
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() and first_of[index] == index
        }
        if not lengths or 0 in lengths.values():
            return None
        # The first argument may be one that all samples share.
        for first in list(lengths)[:2]:
            if few := self._with_few(trial, signature, leaves, whole, lengths, first):
                return few
        return None

    def _with_few(
        self, trial: nn.Module, signature: Any, leaves: list[Any], whole: Run, lengths: Mapping[int, int], first: int
    ) -> _Few | None:
        """`_generalize` if the argument number `first` has a row for each sample, or several."""
        # If patches are folded into the batch, one argument has several rows per sample of another.
        for num_samples in dict.fromkeys((lengths[first], *lengths.values())):
            if lengths[first] % num_samples:
                continue
            of_samples = [index for index, length in lengths.items() if length % num_samples == 0]
            unsure = [index for index in of_samples if index != first][:_MAX_UNSURE]
            num = _NUM_SAMPLES if num_samples != _NUM_SAMPLES else _NUM_SAMPLES + 1
            choices = [kept for size in range(len(unsure) + 1) for kept in combinations(reversed(unsure), size)]
            # A mask or a table may have a multiple of the samples by chance.
            several = {index for index in unsure if lengths[index] != num_samples}
            for kept_whole in sorted(choices, key=lambda kept, several=several: len(several.difference(kept))):
                having_rows = {i: lengths[i] // num_samples for i in (first, *unsure) if i not in kept_whole}
                rows = _some_rows(having_rows, num, num_samples)
                try:
                    few = self._recorded(trial, signature, leaves, rows)
                except TraceError:
                    continue
                if generalize(whole.graph, few.graph):
                    num_many = max(_NUM_SAMPLES, min(num_samples, MAX_SAMPLES))
                    many = _some_rows(having_rows, num_many, num_samples)
                    return _Few(rows, skeleton(few.graph, with_numbers=True), num_many, many)
        return None


def _some_rows(rows_per_sample: Mapping[int, int], num: int, num_samples: int) -> dict[int, Tensor]:
    """The rows of the first samples of each argument, starting over if there are too few."""
    return {i: torch.arange(num * each) % (num_samples * each) for i, each in rows_per_sample.items()}


class StochasticBlock(nn.Module):
    """Behavior of another library's block with gated branches. `make_stochastic_` gives this class to modules."""

    _stochastic_depth_branch: BlockBranches

    @outside_graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, with its branches gated."""
        branches = self._stochastic_depth_branch
        own = super().forward if branches.own_forward is None else branches.own_forward
        if branches.is_plain(self):
            return own(*args, **kwargs)
        prepared, leaves = branches.prepared_for(self, args, kwargs)
        if prepared.code is None:
            with own_code(self):
                return own(*args, **kwargs)
        if masks_only.get():
            return branches.masked_code(self, prepared, args, kwargs, leaves)
        for name, value in prepared.stores.items():
            setattr(self, name, value)
        return prepared.code(self, *leaves)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and "_stochastic_depth_branch" in self.__dict__:
            refuse_bypass(self, value)
        super().__setattr__(name, value)


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
