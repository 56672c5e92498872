"""A call of a block, recorded on all of its samples or on a few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stochastic_depth.retrofit.code.forms import identities
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.run import Run, run_block
from stochastic_depth.retrofit.rewriting.num_samples import generalize, skeleton
from stochastic_depth.retrofit.running.arguments import MakesArguments, arguments_anew, behind_nodes
from stochastic_depth.retrofit.running.block_branches import BlockBranches
from stochastic_depth.retrofit.running.known_forms import MAX_SAMPLES

# Number of samples of a call that the proof runs on.
_NUM_SAMPLES = 4
# Number of arguments that are tested for holding samples.
_MAX_UNSURE = 4


class FewSamples(NamedTuple):
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


@dataclass(frozen=True, eq=False)
class BlockCall:
    """A call of a block.

    Attributes:
        branches: the block's branches.
        block: the block.
        signature: the structure of the arguments.
        leaves: the arguments that are tensors or objects.
        keeps_whole: whether arguments with as many rows as samples are taken for tables that all samples share.
    """

    branches: BlockBranches
    block: nn.Module
    signature: Any
    leaves: list[Any]
    keeps_whole: bool = False

    def copied(self, rows: Mapping[int, Tensor], *, with_gradients: bool = False) -> MakesArguments:
        """A function that makes private copies of the arguments, or of some of their rows.

        Args:
            rows: for arguments of which a part is wanted, its rows.
            with_gradients: all arguments that can require gradients.
        """
        anew = arguments_anew(self.signature, self.leaves, rows, self.branches.forms.called)

        def call() -> tuple[Sequence[Any], Mapping[str, Any], list[Any]]:
            args, kwargs, own = anew()
            for leaf in own:
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and torch.is_grad_enabled():
                    leaf.requires_grad_()
            return args, kwargs, own

        return call if with_gradients else anew

    def record(self, trial: nn.Module, rows: Mapping[int, Tensor]) -> Run:
        """Record the call on a stand-in of the block, with copies of the arguments or of some of their rows."""
        args, kwargs, own = behind_nodes(self.copied(rows))
        self.branches.forms.num_runs += 1
        return run_block(trial, args, kwargs, own, inlined=self.branches.inlined)

    def generalize(self, trial: nn.Module, whole: Run) -> FewSamples | None:
        """Generalize a recording of the call to any number of samples; None if it is unknown which rows are samples.

        It is compared with a recording of the same call with another number of samples. If an argument has as many rows
        as there are samples only by chance, the code fails unless all rows are kept.
        """
        first_of = identities(self.leaves) or range(len(self.leaves))
        lengths = {
            index: int(leaf.shape[0])
            for index, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and leaf.dim() and first_of[index] == index
        }
        if not lengths or 0 in lengths.values():
            return None
        # The first argument may be one that all samples share.
        for first in list(lengths)[:2]:
            if few := self._with_few(trial, whole, lengths, first):
                return few
        return None

    def _with_few(self, trial: nn.Module, whole: Run, lengths: Mapping[int, int], first: int) -> FewSamples | None:
        """`generalize` if the argument number `first` has a row for each sample, or several."""
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
            choices.sort(key=lambda kept, several=several: len(several.difference(kept)))
            for kept_whole in reversed(choices) if self.keeps_whole else choices:
                having_rows = {i: lengths[i] // num_samples for i in (first, *unsure) if i not in kept_whole}
                rows = _some_rows(having_rows, num, num_samples)
                try:
                    few = self.record(trial, rows)
                except TraceError:
                    continue
                if generalize(whole.graph, few.graph):
                    num_many = max(_NUM_SAMPLES, min(num_samples, MAX_SAMPLES))
                    many = _some_rows(having_rows, num_many, num_samples)
                    return FewSamples(rows, skeleton(few.graph, with_numbers=True), num_many, many)
        return None


def _some_rows(rows_per_sample: Mapping[int, int], num: int, num_samples: int) -> dict[int, Tensor]:
    """The rows of the first samples of each argument, starting over if there are too few."""
    return {i: torch.arange(num * each) % (num_samples * each) for i, each in rows_per_sample.items()}
