"""Proves that rewritten code equals a block's own code, on a few samples of a call, before it is used.

The reference is the block's own code, run with real tensors, in which the output of each gated branch is multiplied by
its gate. Both run on a stand-in of the block, without noise and without traces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.gate_draws import CLOSED, Gate
from stochastic_depth.residual import GatedBranch
from stochastic_depth.retrofit.code.called import as_called
from stochastic_depth.retrofit.code.reads import written_parameters
from stochastic_depth.retrofit.code.surroundings import unchanged_surroundings
from stochastic_depth.retrofit.errors import ProofError, TraceError
from stochastic_depth.retrofit.recording.layouts import order_of
from stochastic_depth.retrofit.recording.maps import NotComputed
from stochastic_depth.retrofit.recording.quiet import quiet
from stochastic_depth.retrofit.recording.recorder import Edits, run_block
from stochastic_depth.retrofit.recording.stand_in import sample_leaf, uniform
from stochastic_depth.retrofit.rewriting.generated_code import Code
from stochastic_depth.retrofit.rewriting.rewrite import GatedUse, edits_of
from stochastic_depth.retrofit.rewriting.sums import Key
from stochastic_depth.torch_private import (
    buffer_dict,
    disable_current_modes,
    outside_transforms,
    tree_leaves,
    version_of,
    without_torch_function,
)

Pattern = Mapping[Key, "bool | Tensor | None"]
"""A gate for each branch: open or closed, (n,) one per sample, or None for evaluation."""


MAX_SAMPLES = 64
"""With how many samples, at most, it is proven what runs on some of them: what mixes samples may need many."""

_Call = Callable[[], "tuple[Sequence[Any], Mapping[str, Any], list[Any]]"]
_Outcome = tuple[list[Any], "list[Tensor | None] | None"]
"""Outcome of a run: outputs, and gradients, or None if its backward fails."""


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


@contextmanager
def private() -> Generator[None]:
    """Context without lasting effects on random states or on other code's autograd graphs."""
    grad = torch.is_grad_enabled()
    with (
        outside_transforms(),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        disable_current_modes(),
        torch.autograd.graph.saved_tensors_hooks(_pack, _unpack),
        _without_autocast_cache(),
        quiet(),
    ):
        yield


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    with without_torch_function():  # It is no call of the block's code.
        return tensor.detach(), version_of(tensor)


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if version_of(tensor) != version:
        raise RuntimeError("a value that its backward needs was changed in place")
    return tensor


@contextmanager
def _without_autocast_cache() -> Generator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def prove(
    block: nn.Module,
    code: Code,
    uses: Sequence[GatedUse],
    gated: Mapping[Key, GatedBranch],
    fixed: FixedGates,
    call: _Call,
    many: tuple[int, _Call] | None,
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
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ProofError(f"{name} it fails ({type(error).__name__}: {first}){mixes}") from error
        absent = {index for index, output in enumerate(actual[0]) if isinstance(output, NotComputed)}
        rewind()
        expected = _own_outcome(block, call, edits, inlined, absent)
        zero = all(branch.skipped_grad == "zero" for branch in gated.values())
        try:
            _compare(expected, actual, name, zero_gradients=zero)
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
    block: nn.Module, call: _Call, edits: Edits, inlined: Collection[str], absent: Collection[int]
) -> _Outcome:
    args, kwargs, leaves = call()

    def run(given: list[Any]) -> Any:
        return run_block(block, *_replaced(args, kwargs, leaves, given), given, edits, inlined).output

    return _with_gradients(block, leaves, run, absent)


def _patterns(
    uses: Sequence[GatedUse], num_samples: int | None, *, training: bool
) -> list[tuple[str, dict[Key, bool | Tensor | None]]]:
    keys = list(dict.fromkeys(use.key for use in uses))
    patterns: list[tuple[str, dict[Key, bool | Tensor | None]]] = []
    if not training:
        patterns.append(("by the rule of evaluation", dict.fromkeys(keys, None)))
    patterns.append(("with all gates open", dict.fromkeys(keys, True)))
    patterns.append(("with all gates closed", dict.fromkeys(keys, False)))
    if len(keys) > 1:
        patterns.append(("with every second gate closed", {key: index % 2 == 0 for index, key in enumerate(keys)}))
    if num_samples is not None and num_samples > 1:
        # About half of them, in no order that arguments may have too, nor the same backwards; and the other half, which
        # has what is largest where the first has not.
        golden = 0.618 * torch.arange(num_samples)
        each = {key: (golden + 0.37 * index) % 1 < 0.5 for index, key in enumerate(keys)}
        for gate in each.values():
            gate[0], gate[-1] = True, False
        patterns.append((_SOME, dict(each)))
        patterns.append((_SOME, {key: ~gate for key, gate in each.items()}))
    return patterns


def _weights(gate: bool | Tensor | None, branch: GatedBranch, scale: float) -> float | Tensor:
    factor = branch.factor(None if gate is None else branch.survival_prob) / scale
    if gate is None or isinstance(gate, bool):
        return factor if gate is None or gate else 0.0
    return gate.double() * factor


def _replaced(args: Any, kwargs: Any, leaves: Sequence[Any], given: Sequence[Any]) -> tuple[Any, Any]:
    """The arguments with the opaque ones replaced by other tensors."""
    new = {id(leaf): value for leaf, value in zip(leaves, given, strict=True)}

    def put(value: Any) -> Any:
        if id(value) in new:
            return new[id(value)]
        if type(value) in (tuple, list):
            return type(value)(put(item) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return cast(Any, type(value))(*[put(item) for item in cast("tuple[Any, ...]", value)])
        if type(value) is dict:
            return {key: put(item) for key, item in cast("dict[Any, Any]", value).items()}
        return value

    return put(tuple(args)), put(dict(kwargs))


def _with_gradients(
    block: nn.Module, leaves: Sequence[Any], run: Callable[[list[Any]], Any], absent: Collection[int] = ()
) -> _Outcome:
    """Outputs of a run, and gradients of its inputs and of the block's parameters, of all outputs but `absent`."""
    # Not the leaves themselves, which in-place code could not change.
    anew = {id(leaf): _anew(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
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
    if not ends or not sources:
        no_gradients: list[Tensor | None] = [None] * len(sources)
        return outputs, no_gradients
    generator = torch.Generator().manual_seed(1)
    weights = [(uniform(end.shape, generator) - 0.5).to(end.device, end.dtype) for end in ends]
    try:
        return outputs, list(torch.autograd.grad(ends, sources, weights, allow_unused=True))
    except RuntimeError:
        return outputs, None


def behind_nodes(call: _Call) -> tuple[Any, Any, list[Any]]:
    """The arguments of a call, whose tensors are no leaves of autograd: code in place could not change those."""
    args, kwargs, leaves = call()
    given = [_anew(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
    anew = {id(leaf): new for leaf, new in zip(leaves, given, strict=True)}
    given = [anew[id(leaf)] for leaf in leaves]
    return *_replaced(args, kwargs, leaves, given), given


def _anew(leaf: Tensor) -> Tensor:
    """The same tensor behind a node of autograd, with the attributes that somebody has set on it."""
    new = leaf.clone()
    vars(new).update(vars(leaf))
    return new


_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}


def _compare(expected: _Outcome, actual: _Outcome, name: str, *, zero_gradients: bool) -> None:
    """Compare two outcomes.

    A parameter that only the samples of closed gates use, such as that of an expert that none of the others is sent to,
    has no gradient where its branch runs on some of the samples, and a mask gives zeros.

    Raises:
        ProofError: if they differ.
    """
    outputs, others = expected[0], actual[0]
    if len(outputs) != len(others):
        raise ProofError(f"{name} it returns {len(others)} values, not {len(outputs)}")
    for index, (a, b) in enumerate(zip(outputs, others, strict=True)):
        if isinstance(b, NotComputed):
            continue
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            difference = deviation(a, b)
            if a.dtype != b.dtype:
                raise ProofError(f"{name} output {index} is of {b.dtype}, not of {a.dtype}")
            if difference > tolerance(a):
                raise ProofError(f"{name} output {index} differs by {difference:.2g} of its largest value")
            if order_of(a) != order_of(b):
                raise ProofError(f"{name} the dimensions of output {index} lie in another order in memory")
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or (type(a) is not type(b)):
            raise ProofError(f"{name} output {index} is a {type(b).__name__}, not a {type(a).__name__}")
    if expected[1] is None:
        return  # The block's own code has no backward.
    if actual[1] is None:
        raise ProofError(f"{name} its backward fails")
    largest = max((float(a.abs().max()) for a in expected[1] if a is not None and a.numel()), default=0.0)
    for a, b in zip(expected[1], actual[1], strict=True):
        if a is None or (b is None and not (zero_gradients and name != _SOME) and not a.any()):
            continue
        if b is None:
            raise ProofError(f"{name} a gradient is missing")
        # A gradient that is tiny compared with the others is rounding.
        difference = deviation(a, b, at_least=1e-3 * largest)
        if difference > 10 * tolerance(a):
            raise ProofError(f"{name} a gradient differs by {difference:.2g} of its largest value")


def deviation(expected: Tensor, actual: Tensor, *, at_least: float = 0.0) -> float:
    """Largest difference of two tensors, relative to the largest value; infinite if their shapes differ.

    Args:
        expected: the tensor whose largest value is the reference.
        actual: the other tensor.
        at_least: lower bound for the largest value.
    """
    if expected.shape != actual.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    kind = torch.float64 if not expected.is_complex() else torch.complex128
    if expected.is_sparse:
        expected, actual = expected.to_dense(), actual.to_dense()
    a, b = expected.to(kind), actual.to(kind)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), a - b).abs().nan_to_num(nan=float("inf")).max()
    scale = max(float(a.abs().nan_to_num(nan=0.0, posinf=0.0).max()), at_least)
    return float(difference) / scale if scale > 0 else float(difference)


def tolerance(tensor: Tensor) -> float:
    """Tolerance for rounding errors in this dtype, relative to the largest value."""
    if torch.is_autocast_enabled(tensor.device.type) if tensor.device.type != "meta" else False:
        return _TOLERANCES[torch.bfloat16]
    return _TOLERANCES.get(tensor.dtype, 0.0)


def arguments_anew(
    signature: Any,
    leaves: Sequence[Any],
    rows: Mapping[int, Tensor],
    called: Collection[type],
    unflatten: Callable[[Any, Sequence[Any]], Any],
) -> _Call:
    """Returns a function that makes private copies of the arguments of a call.

    Args:
        signature: signature of the arguments.
        leaves: the opaque arguments.
        rows: indices of the samples to take, by the position of the leaf.
        called: classes of objects whose methods are single calls.
        unflatten: puts the arguments together.
    """

    def call() -> tuple[Sequence[Any], Mapping[str, Any], list[Any]]:
        made: dict[int, Any] = {}  # What is given twice is one object.
        for index, leaf in enumerate(leaves):
            if id(leaf) not in made:
                is_tensor = isinstance(leaf, Tensor)
                made[id(leaf)] = sample_leaf(leaf, rows.get(index)) if is_tensor else copy_of_object(leaf)
        own = [made[id(leaf)] for leaf in leaves]
        for value, leaf in zip(own, leaves, strict=True):
            if type(leaf) in called:
                as_called(value)
        args, kwargs = unflatten(signature, own)
        return args, kwargs, own

    return call


def copy_of_object(leaf: Any) -> Any:
    """A copy of an object that code may change; tensors, modules and functions are not copied.

    Raises:
        TraceError: if it cannot be copied.
    """
    if isinstance(leaf, Iterator):
        raise TraceError(f"it is given an iterator (a {type(leaf).__name__}), which a look at it would use up")
    if isinstance(leaf, (Tensor, nn.Module)) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return leaf
    tensors = [(tensor, tensor.detach().clone()) for tensor in _tensors_of(leaf, set())]
    try:
        return copy.deepcopy(leaf, {id(tensor): own for tensor, own in tensors})
    except Exception as error:
        raise TraceError(f"its {type(leaf).__name__} argument cannot be copied ({error})") from error


def _tensors_of(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (nn.Module, type)):
        seen.add(id(value))
        items: Any = ()
        if isinstance(value, (list, tuple)):
            items = cast("list[Any]", value)
        elif isinstance(value, dict):
            items = cast("dict[Any, Any]", value).values()
        elif hasattr(value, "__dict__") and not callable(value):
            items = vars(value).values()
        for item in items:
            yield from _tensors_of(item, seen)
