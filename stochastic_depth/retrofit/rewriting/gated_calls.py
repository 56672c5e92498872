"""Functions that rewritten code calls instead of a residual addition or a drop path: a gated branch, or a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stochastic_depth.residual import GatedBranch, masked, outside_graph
from stochastic_depth.retrofit.recording.maps import MAP_REASON, NotComputed
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL
from stochastic_depth.retrofit.rewriting.generated_code import Code
from stochastic_depth.retrofit.rewriting.sums import DropPaths, Identity, Key, Paths
from stochastic_depth.retrofit.rules import DropPathRule
from stochastic_depth.torch_private import child_dict


class BranchInput(NamedTuple):
    """An input of a branch.

    Attributes:
        samples: whether its first dimension is one of samples.
        carried: whether it is the shortcut or what that is computed from.
    """

    samples: bool
    carried: bool


class BlockGates(Protocol):
    """What a block knows about its branches, as far as its rewritten code needs it."""

    name: str
    drop_paths: DropPaths
    known: dict[Key, Identity]
    gated: dict[Key, GatedBranch]
    rules: dict[Key, DropPathRule]

    def parts_at(self, block: nn.Module, key: Key, paths: Paths) -> nn.Module:
        """What holds the parameters that a branch has on one way through the code."""
        ...


def _gates_of(block: nn.Module) -> BlockGates | None:
    """The gates of a block; None for a copy of it without data, whose shapes are being looked up."""
    return block.__dict__["_stochastic_depth_branch"]


def in_training(block: nn.Module, key: Key) -> bool:
    """Whether the rule of training holds for a branch: a drop path in evaluation keeps everything.

    Raises:
        RuntimeError: if its drop path was replaced.
    """
    if key[0] in ("", FUNCTIONAL):
        return block.training
    module: Any = block
    for name in key[0].split("."):
        module = child_dict(module).get(name)
        if module is None:
            break
    if module is None or "_stochastic_depth_branch" not in module.__dict__:
        raise RuntimeError(
            f"The drop path {key[0]} of a {type(block).__name__} was replaced after make_stochastic_, so that its gate "
            "has no effect. Call restore_(model), change the model, and make it stochastic again."
        )
    return module.training


def make_gated_sum(
    key: Key,
    paths: Paths,
    function: Callable[..., Tensor],
    inputs: Sequence[BranchInput],
    *,
    is_evaluated: bool = False,
    capturable: bool = True,
) -> Callable[..., Tensor]:
    """A function `(block, shortcut, *values)` that adds a branch to its shortcut if its gate is open.

    Args:
        key: which branch of the block it is.
        paths: paths of the modules and parameters that it uses here.
        function: the branch, `(block, *values)`.
        inputs: what is known of each of the values.
        is_evaluated: whether the rule of evaluation holds in training too.
        capturable: whether a CUDA graph may repeat the branch.
    """
    only = len(inputs) == 1 and inputs[0].samples
    others_at = [index for index, kind in enumerate(inputs) if not kind.carried]
    of_batch = [kind.samples for kind in inputs]

    @outside_graph
    def gated_sum(block: nn.Module, shortcut: Tensor, *values: Any) -> Tensor:
        gates = _gates_of(block)
        if gates is None:
            return shortcut + function(block, *values)
        gated, parts = gates.gated[key], gates.parts_at(block, key, paths)
        training = in_training(block, key) and not is_evaluated
        others = [values[index] for index in others_at if isinstance(values[index], Tensor)]
        if only:
            return gated.add(
                shortcut,
                values[0],
                block,
                function,
                parts=parts,
                training=training,
                extra_inputs=others,
                capturable=capturable,
            )
        shared = [value for value, samples in zip(values, of_batch, strict=True) if not samples]
        own = tuple(value for value, samples in zip(values, of_batch, strict=True) if samples)

        def of_samples(module: nn.Module, taken: tuple[Tensor, ...]) -> Tensor:
            rest, some = iter(shared), iter(taken)
            return function(module, *(next(some if samples else rest) for samples in of_batch))

        return gated.add(shortcut, own, block, of_samples, parts=parts, training=training, extra_inputs=others)

    return gated_sum


def make_gated_sum_and_maps(
    make_sum: Callable[..., Any], function: Callable[..., Any], inputs: Sequence[BranchInput], num_maps: int
) -> Callable[..., Any]:
    """The sum that `make_sum` makes, and the attention maps of the branch: placeholders unless all samples ran."""

    @outside_graph
    def gated_sum_and_maps(block: nn.Module, shortcut: Tensor, *values: Any) -> tuple[Any, ...]:
        seen: list[tuple[Any, ...]] = []

        def first(module: nn.Module, *given: Any) -> Tensor:
            output, *maps = function(module, *given)
            if output.shape[0] == shortcut.shape[0]:
                seen.append(tuple(maps))
            return output

        summed = make_sum(first, inputs, capturable=False)(block, shortcut, *values)
        return summed, *(seen[-1] if seen else [NotComputed(MAP_REASON)] * num_maps)

    return gated_sum_and_maps


def make_gated_value(
    make_sum: Callable[..., Any],
    function: Callable[..., Tensor],
    inputs: Sequence[BranchInput],
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
) -> Callable[..., Tensor]:
    """For a block without a shortcut that drops its whole output: closed gates return zeros."""
    gated_sum = make_sum(function, inputs)

    @outside_graph
    def gated_value(block: nn.Module, *values: Any) -> Tensor:
        tensor = next(value for value in values if isinstance(value, Tensor))
        rows = next((v.shape[0] for v, kind in zip(values, inputs, strict=True) if kind.samples), shape[0])
        return gated_sum(block, tensor.new_zeros(rows, *shape[1:], dtype=dtype), *values)

    return gated_value


def make_mask(key: Key, gates: BlockGates, *, is_evaluated: bool = False) -> Code:
    """A function `(block, x)` that masks what a branch has computed; by the rule of evaluation, if that holds."""

    @outside_graph
    def gated_output(block: nn.Module, x: Tensor) -> Tensor:
        gates = _gates_of(block)
        if gates is None:
            return x
        return masked(gates.gated[key], x, training=in_training(block, key) and not is_evaluated)

    gated_output.__name__ = f"gated_output_{list(gates.known).index(key)}"
    return gated_output


def write_back(argument: Tensor, result: Tensor) -> Tensor:
    """Change an argument of a block as the block's own sum does, in place: its caller may use it again."""
    return argument if result is argument else argument.copy_(result)
