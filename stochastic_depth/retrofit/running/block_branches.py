"""The gated branches of a block of another library, and the forms of its calls that are known."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.residual import GatedBranch
from stochastic_depth.retrofit.code.fingerprints import fingerprint
from stochastic_depth.retrofit.code.forms import form_of_any_size
from stochastic_depth.retrofit.code.reads import Reads
from stochastic_depth.retrofit.code.state_of_children import StateOfChildren
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL
from stochastic_depth.retrofit.rewriting.gated_calls import in_training
from stochastic_depth.retrofit.rewriting.sums import BranchParts, DropPaths, Identity, Key, Paths
from stochastic_depth.retrofit.rules import DropPathRule
from stochastic_depth.retrofit.running.known_forms import MAX_FORMS, MAX_SAMPLES, Form, KnownForms, Prepared

CallForm = tuple[Any, ...]
"""The form of a call: structure, leaves, settings, and what the code reads elsewhere."""


class MaskedBranchWarning(UserWarning):
    """A branch is computed and masked because it cannot be skipped: correct, but nothing is saved."""


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
        rules: the rules of its drop paths as found, if the branches have these rates.
        own_forward: a forward that was set on the block instead of its class's.
        own_forms: the forms in which this block was called.
        reads: what the block's code may read besides its arguments; None before the first call.
        fingerprint: equal for blocks that share prepared code; None if it must be computed anew.
        by_example: whether they were found by an example.
        mask_of_call: why a call was masked whose code is proven; empty if there was none.
        telling: paths of the children that have given the block's code plain values, which it has read by them.
    """

    name: str
    drop_paths: DropPaths
    known: dict[Key, Identity]
    forms: KnownForms = field(default_factory=KnownForms)
    rules: dict[Key, DropPathRule] = field(default_factory=dict[Key, DropPathRule])
    own_forward: Callable[..., Any] | None = None
    gated: dict[Key, GatedBranch] = field(default_factory=dict[Key, GatedBranch])
    parts: dict[Key, nn.Module] = field(default_factory=dict[Key, nn.Module])
    own_forms: dict[CallForm, Form] = field(default_factory=dict[Any, Form], repr=False)
    reads: Reads | None = field(default=None, repr=False)
    fingerprint: Any = field(default=None, repr=False)
    by_example: bool = False
    mask_of_call: str = ""
    telling: frozenset[str] = frozenset()
    _own_forms_of_any_size: dict[CallForm, Form] = field(default_factory=dict[Any, Form], repr=False)
    _parts_on_paths: dict[Any, BranchParts] = field(default_factory=dict[Any, BranchParts], repr=False)
    _state_of_children: StateOfChildren | None = field(default=None, repr=False)

    def add_branch(self, key: Key, gated: GatedBranch, parts: nn.Module) -> None:
        """Gate one of the known branches."""
        self.gated[key], self.parts[key] = gated, parts

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own objects again.
        return {
            **self.__dict__,
            "own_forms": {},
            "_own_forms_of_any_size": {},
            "_parts_on_paths": {},
            "reads": None,
            "fingerprint": None,
            "_state_of_children": None,
        }

    def parts_at(self, block: nn.Module, key: Key, paths: Paths) -> nn.Module:
        """The holder of a branch's parameters on one path through the code."""
        parts = self._parts_on_paths.get((key, paths))
        if parts is None:
            known = self.parts.get(key)
            is_same = isinstance(known, BranchParts) and known.paths == paths
            parts = cast(BranchParts, known) if is_same else BranchParts(block, *paths)
            self._parts_on_paths[key, paths] = parts
        return parts

    @property
    def inlined(self) -> tuple[str, ...]:
        """Paths of the children whose own code is read as part of the block's code."""
        return self.drop_paths.inlined

    @property
    def was_called(self) -> bool:
        """Whether any call has shown how the branches are treated."""
        return bool(self.own_forms)

    def cause_of_mask(self, key: Key) -> str:
        """Why a branch is masked in the calls so far; empty if it is skipped in all of them."""
        causes = (own.prepared.masked[key] for own in self.own_forms.values() if key in own.prepared.masked)
        return next(causes, self.mask_of_call)

    @property
    def can_mask(self) -> bool:
        """Whether the gates have an effect in the block's own code: where modules are its drop paths."""
        return bool(self.drop_paths) and not any(key[0] == FUNCTIONAL for key in self.gated)

    @property
    def granularity(self) -> str:
        """Whether there is one gate per batch or per sample."""
        return next(iter(self.gated.values())).passes.granularity

    @property
    def ungated(self) -> list[str]:
        """For each addition without a gate that calls have shown, what it uses."""
        return list(dict.fromkeys(used for own in self.own_forms.values() for used in own.prepared.ungated))

    def known_form(self, form: CallForm, leaves: Sequence[Any]) -> Form | None:
        """A form in which this block was called, if only with arguments of other sizes and if these do not matter."""
        own = self.own_forms.get(form)
        if own is None and self._own_forms_of_any_size:
            own = self._own_forms_of_any_size.get(self._of_any_size(form, leaves))
            if own is not None:
                _remember(self.own_forms, form, own)
        return own

    def shared_code(self, block: nn.Module, form: CallForm, leaves: Sequence[Any]) -> Prepared | None:
        """Code that an equal block has prepared for this form of a call."""
        if self.fingerprint is None:
            self.fingerprint = self.make_fingerprint(block)
        of_any_size = self.forms.prepared.get((self.fingerprint, self._of_any_size(form, leaves)))
        return of_any_size or self.forms.prepared.get((self.fingerprint, form))

    def add_form(self, form: CallForm, leaves: Sequence[Any], prepared: Prepared) -> Form:
        """Remember the code for a form of this block's calls."""
        own = Form(prepared, prepared.num_blocks)
        prepared.num_blocks += 1
        _remember(self.own_forms, form, own)
        if prepared.is_of_any_size:
            form = self._of_any_size(form, leaves)
            _remember(self._own_forms_of_any_size, form, own)
        self.forms.remember((self.fingerprint, form), prepared)
        return own

    def _of_any_size(self, form: CallForm, leaves: Sequence[Any]) -> CallForm:
        signature, of_leaves, *others = form
        # A child may mix samples from some number of them on: it is proven with this number.
        num_rows = MAX_SAMPLES if self.granularity == "sample" else 0
        return signature, form_of_any_size(leaves, of_leaves, num_rows), *others

    def of_drop_paths(self, block: nn.Module) -> dict[nn.Module, GatedBranch]:
        """The gated drop paths that are modules, each with a gate of it."""
        return {
            block.get_submodule(path): branch
            for (path, _), branch in self.gated.items()
            if path not in ("", FUNCTIONAL)
        }

    def is_plain(self, block: nn.Module) -> bool:
        """Whether the block's own code is correct as it is: in evaluation without forced gates and without a factor."""
        if block.training or self.drop_paths.scaled:
            return False
        return all(
            branch.rescale != "eval"
            and branch.passes.observer is None
            and not branch.passes.forced
            and not in_training(block, key)
            for key, branch in self.gated.items()
        )

    def reads_with(self, block: nn.Module, leaves: Sequence[Any]) -> Reads:
        """The values that the block's code may read in a call with these arguments."""
        skipped = (Tensor, *self.forms.called)
        arguments = [leaf for leaf in leaves if not isinstance(leaf, skipped)]
        return Reads(block, (*self.inlined, *sorted(self.telling.difference(self.inlined))), arguments)

    def of_children(self) -> tuple[Any, ...]:
        """What of the children decides what they give, and how they treat samples; empty before the first call."""
        return () if self._state_of_children is None else self._state_of_children.now()

    def look_again(self, block: nn.Module, leaves: Sequence[Any]) -> Reads:
        """Read the block again after its children changed: adapters, conversions, a copy."""
        self.reads, self.fingerprint = self.reads_with(block, leaves), None
        self._state_of_children = StateOfChildren(block, of_samples=self.granularity == "sample")
        self.own_forms, self._own_forms_of_any_size, self._parts_on_paths = {}, {}, {}
        for parts in self.parts.values():
            if isinstance(parts, BranchParts):
                parts.refresh()
        return self.reads

    def make_fingerprint(self, block: nn.Module) -> Any:
        """What blocks that share prepared code have in common."""
        rules = tuple((key, branch.rescale, branch.skipped_grad) for key, branch in self.gated.items())
        forward = getattr(self.own_forward, "__func__", self.own_forward)
        return (
            *fingerprint(block, of_samples=self.granularity == "sample"),
            forward,
            tuple(self.known.items()),
            rules,
            self.granularity,
            self.drop_paths,
            self.inlined,
        )

    def described(self, block: nn.Module) -> str:
        """The block in a message."""
        return f"The block {self.name or 'the model'} ({plain_class(block).__name__})"

    def refusal(self, block: nn.Module, error: Exception) -> str:
        """The message of the error if the block's additions cannot be gated."""
        names = ", ".join(branch.passes.names[branch.index] for branch in self.gated.values())
        other = "granularity='batch', " if self.granularity == "sample" else ""
        example = "" if self.by_example else "inputs=[...] to find its branches on an example, "
        whole = f"layers=[{self.name!r}] for the whole layer, " if self.name else ""
        return (
            f"{self.described(block)} cannot be gated here ({names}): {error}. "
            f"Use {other}{example}{whole}where= to leave it out, or write the sum as stochastic_depth.Residual."
        )

    def warn_of_mask(self, block: nn.Module, key: Key, cause: str) -> None:
        """Warn, once per class, that a branch is masked."""
        branch = self.gated[key]
        kind = (plain_class(block), key, re.sub(r"\d", "", cause))  # How much it differs by differs.
        if kind in self.forms.warned:
            return
        self.forms.warned.add(kind)
        without = "if it mixes no samples and computes nothing for later layers besides its hidden states"
        whole = f" layers=[{self.name!r}] runs it as a whole, {without}." if self.name else ""
        warnings.warn(
            f"The branch {branch.passes.names[branch.index]} is computed and masked, which saves nothing. "
            f"{self.described(block)}: {cause}. Other blocks of this class may be affected too.{whole}",
            MaskedBranchWarning,
            stacklevel=2,
        )

    def warn_of_own_drop(self, block: nn.Module, function: str) -> None:
        """Warn, once per class, that a block seems to drop its branches itself."""
        kind = plain_class(block), function
        if kind not in self.forms.warned:
            self.forms.warned.add(kind)
            warnings.warn(
                f"{self.described(block)} draws one number for each sample ({function}): it may drop its branches "
                "itself, and then they are dropped twice. Set its own rate to 0.",
                stacklevel=2,
            )


def _remember(forms: dict[CallForm, Form], form: CallForm, own: Form) -> None:
    """Add a form, instead of the oldest if there are too many."""
    if len(forms) >= MAX_FORMS:
        del forms[next(iter(forms))]
    forms[form] = own
