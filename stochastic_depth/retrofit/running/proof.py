"""Proves that rewritten code equals a block's own code, on a few samples of a call, before it is used.

The reference is the block's own code, run with real tensors, in which the output of each gated branch is multiplied by
its gate. Both run on a stand-in of the block, without noise and without traces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.gate_draws import CLOSED, Gate
from stochastic_depth.residual import GatedBranch
from stochastic_depth.retrofit.code.reads import written_parameters
from stochastic_depth.retrofit.code.surroundings import unchanged_surroundings
from stochastic_depth.retrofit.errors import ProofError
from stochastic_depth.retrofit.recording.edits import Edits
from stochastic_depth.retrofit.recording.maps import NotComputed
from stochastic_depth.retrofit.recording.run import run_block
from stochastic_depth.retrofit.recording.stand_in import uniform
from stochastic_depth.retrofit.rewriting.generated_code import Code
from stochastic_depth.retrofit.rewriting.rewrite import GatedUse, edits_of
from stochastic_depth.retrofit.rewriting.sums import Key
from stochastic_depth.retrofit.running.arguments import MakesArguments, anew_of, replaced
from stochastic_depth.retrofit.running.comparison import CoarsestType, Outcome, compare, differ, some_of
from stochastic_depth.torch_private import buffer_dict, tree_leaves

Pattern = Mapping[Key, "bool | Tensor | None"]
"""A gate for each branch: open or closed, (n,) one per sample, or None for evaluation."""


class FixedGates:
    """Replaces the draws of a model while rewritten code is compared with a block's own code."""

    observer = None
    graphs = None
    is_dry = False

    def __init__(self, like: Any) -> None:
        self.names: tuple[str, ...] = like.names
        self.survival_probs: tuple[float, ...] = like.survival_probs
        self.granularity: str = like.granularity
        self.dry_run: Callable[[], Any] = like.dry_run
        self.pattern: dict[int, bool | Tensor | None] = {}
        self._outer: Tensor | None = None

    def within(self, _samples: Tensor, _num_samples: int) -> AbstractContextManager[None]:
        """Nothing: `gate` keeps the samples itself."""
        return nullcontext()

    def gate(self, index: int, num_samples: int, device: torch.device, _training: bool) -> Gate | None:
        """The gate of branch `index`, for the number of samples that it sees."""
        gate = self.pattern[index]
        survival_prob = self.survival_probs[index]
        if gate is None:
            return None
        if isinstance(gate, bool):
            return Gate(num_samples, None, survival_prob) if gate else CLOSED
        if num_samples < len(gate):
            # A branch inside another one sees the samples for which that one is open.
            if self._outer is None or len(self._outer) != num_samples:
                raise RuntimeError(f"{self.names[index]} sees {num_samples} samples of {len(gate)}")
            of_samples = gate[self._outer]
        else:
            of_samples = gate.repeat_interleave(num_samples // len(gate))
        if not of_samples.any():
            return CLOSED
        order = of_samples.int().argsort(descending=True, stable=True)
        num_open = int(of_samples.sum())
        if num_samples == len(gate):
            self._outer = order[:num_open]
        return Gate(num_open, order.to(device), survival_prob)


def prove(
    block: nn.Module,
    code: Code,
    uses: Sequence[GatedUse],
    gated: Mapping[Key, GatedBranch],
    fixed: FixedGates,
    call: MakesArguments,
    many: tuple[int, MakesArguments] | None,
    *,
    training: bool,
    inlined: Collection[str] = (),
    only_some: bool = False,
) -> int:
    """Compare outputs and gradients of rewritten code and of the block's own code under several patterns of gates.

    Args:
        block: a stand-in, which uses the gates of `fixed`.
        code: the rewritten code.
        uses: places of the gated branches.
        gated: their gates.
        fixed: what gives the gates.
        call: makes the arguments of a call anew, and those of them that are opaque.
        many: where each sample has a gate of its own, a number of samples and a call with these; else None.
        training: whether the block is in training.
        inlined: paths of the children whose code was recorded as a part of the block's.
        only_some: whether to compare only where the branches run on some of the samples.

    Returns:
        Number of runs of the block.

    Raises:
        ProofError: if they differ; the message says where and by how much.
        TraceError: if the block's own code cannot be run again.
    """
    few, rewind = call, _rewinding(block)
    patterns = _patterns(uses, None if many is None else many[0], training=training)
    patterns = [each for each in patterns if each[0] == _SOME or not only_some]
    for name, pattern in patterns:
        call = many[1] if many is not None and name == _SOME else few
        for key, gate in pattern.items():
            fixed.pattern[gated[key].index] = gate
        edits = edits_of(uses, lambda use: _weights(pattern[use.key], gated[use.key], use.scale))  # noqa: B023
        _, _, leaves = call()
        rewind()
        # A branch that mixes samples fails or computes something else on a subset of them.
        mixes = ": its first dimension is not one of independent samples" if name == _SOME else ""
        try:
            with unchanged_surroundings(block, inlined, [leaf for leaf in leaves if not isinstance(leaf, Tensor)]):
                actual = _with_gradients(block, leaves, lambda given: code(block, *given))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ProofError(f"{name} it fails ({type(error).__name__}: {first}){mixes}") from error
        absent = {index for index, output in enumerate(actual.outputs) if isinstance(output, NotComputed)}
        rewind()
        expected = _own_outcome(block, call, edits, inlined, absent)
        zero = name != _SOME and all(branch.skipped_grad == "zero" for branch in gated.values())
        try:
            compare(expected, actual, name, zero_gradients=zero)
        except ProofError:
            rewind()
            with CoarsestType(torch.float32) as coarsest:
                again = _own_outcome(block, call, edits, inlined, absent)
            if any(differ(a, b) for a, b in zip(expected.outputs, again.outputs, strict=False)):
                mixes = ": its own code gives something else in each run, so it keeps a state"
            try:
                compare(expected, actual, name, zero_gradients=zero, computed_in=coarsest.found)
            except ProofError as error:
                raise ProofError(f"{error}{mixes}") from None
    return 2 * len(patterns)


_SOME = "run on some of the samples"


def _rewinding(block: nn.Module) -> Callable[[], None]:
    """Gives a stand-in the buffers and codebooks that it has now, which each of its runs may move."""
    buffers = [
        (buffer_dict(module), name, buffer) for module in block.modules() for name, buffer in _buffers_of(module)
    ]
    before = [(tensor, tensor.detach().clone()) for tensor in (*block.buffers(), *written_parameters(block))]

    def rewind() -> None:
        for held, name, buffer in buffers:
            held[name] = buffer
        for tensor, value in before:
            tensor.data.copy_(value)

    return rewind


def _buffers_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module.named_buffers(recurse=False)]


def _own_outcome(
    block: nn.Module, call: MakesArguments, edits: Edits, inlined: Collection[str], absent: Collection[int]
) -> Outcome:
    args, kwargs, leaves = call()

    def run(given: list[Any]) -> Any:
        return run_block(block, *replaced(args, kwargs, leaves, given), given, edits, inlined).output

    return _with_gradients(block, leaves, run, absent)


def _patterns(
    uses: Sequence[GatedUse], num_samples: int | None, *, training: bool
) -> list[tuple[str, dict[Key, bool | Tensor | None]]]:
    keys = list(dict.fromkeys(use.key for use in uses))
    patterns: list[tuple[str, dict[Key, bool | Tensor | None]]] = []
    if not training or any(use.is_evaluated for use in uses):
        patterns.append(("by the rule of evaluation", dict.fromkeys(keys, None)))
    patterns.append(("with all gates open", dict.fromkeys(keys, True)))
    patterns.append(("with all gates closed", dict.fromkeys(keys, False)))
    if len(keys) > 1:
        patterns.append(("with every second gate closed", {key: index % 2 == 0 for index, key in enumerate(keys)}))
    if num_samples is not None and num_samples > 1:
        some = {key: some_of(num_samples, 0.37 * index) for index, key in enumerate(keys)}
        # The other samples have what is largest where the first have not. And code may treat a single sample otherwise.
        only = torch.arange(num_samples) == num_samples - 1
        patterns.append((_SOME, dict(some)))
        patterns.append((_SOME, {key: ~gate for key, gate in some.items()}))
        patterns.append((_SOME, dict.fromkeys(keys, only)))
    return patterns


def _weights(gate: bool | Tensor | None, branch: GatedBranch, scale: float) -> float | Tensor:
    factor = branch.factor(None if gate is None else branch.survival_prob) / scale
    if gate is None or isinstance(gate, bool):
        return factor if gate is None or gate else 0.0
    return gate.double() * factor


def _with_gradients(
    block: nn.Module, leaves: Sequence[Any], run: Callable[[list[Any]], Any], absent: Collection[int] = ()
) -> Outcome:
    """The outcome of a run, with gradients of all outputs but `absent`."""
    # Not the leaves themselves, which in-place code could not change.
    anew = {id(leaf): anew_of(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
    given = [anew.get(id(leaf), leaf) for leaf in leaves]
    outputs = tree_leaves(run(given))
    if not any(isinstance(output, Tensor) for output in outputs):
        # Code that returns nothing has only what it does to its arguments.
        outputs += [leaf for leaf in given if isinstance(leaf, Tensor)]
    sources = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    sources += [parameter for parameter in block.parameters() if parameter.requires_grad]
    ends = [
        out
        for index, out in enumerate(outputs)
        if isinstance(out, Tensor) and out.requires_grad and index not in absent
    ]
    outputs = [out.detach() if isinstance(out, Tensor) else out for out in outputs]
    left = [leaf.detach() for leaf in given if isinstance(leaf, Tensor)]
    if not ends or not sources:
        no_gradients: list[Tensor | None] = [None] * len(sources)
        return Outcome(outputs, no_gradients, left)
    generator = torch.Generator().manual_seed(1)
    weights = [(uniform(end.shape, generator) - 0.5).to(end.device, end.dtype) for end in ends]
    gradients: list[Tensor | None] | None
    try:
        gradients = list(torch.autograd.grad(ends, sources, weights, allow_unused=True))
    except RuntimeError:
        gradients = None
    return Outcome(outputs, gradients, left)
