"""Runs a branch without data, to know its shapes, and which inputs are samples, before its first real run."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.retrofit.trace import plain_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MAX_UNKNOWN = 4

Function = Callable[..., Any]


def output_without_data(function: Function, block: nn.Module, inputs: Sequence[Any]) -> Any:
    """What a branch gives for these inputs, its tensors on the meta device."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return function(without_data(block), *[_meta(value) for value in inputs])


def samples_among(
    function: Function, block: nn.Module, inputs: Sequence[Any], kinds: Sequence[bool | None], num_samples: int
) -> list[bool]:
    """Which inputs of a branch have a first dimension of samples.

    An argument whose first dimension happens to be N long may hold samples, or not (a bias per head, with as many heads
    as samples). It is tried: with one sample more the branch can run in one of the two cases only.

    Args:
        function: the branch, which takes the block and the inputs.
        block: the block.
        inputs: all inputs of the branch.
        kinds: for each whether it holds samples, None where that is unknown.
        num_samples: N.

    Raises:
        RuntimeError: if it cannot be told, or an input that holds samples does not have N of them.
    """
    lengths = [value.shape[0] if isinstance(value, Tensor) and value.dim() else None for value in inputs]
    for length, kind in zip(lengths, kinds, strict=True):
        if kind and length not in (num_samples, None):
            raise RuntimeError(
                f"An input of the branch has {length} entries, where the shortcut has {num_samples} samples. "
                "With granularity='batch' that is no obstacle."
            )
    unknown = [
        index
        for index, (length, kind) in enumerate(zip(lengths, kinds, strict=True))
        if kind is None and length == num_samples and num_samples > 1
    ]
    is_batch = [bool(kind) and length is not None for kind, length in zip(kinds, lengths, strict=True)]
    if not unknown:
        return is_batch
    possible: list[list[bool]] = []
    meta_block = without_data(block)
    for guess in itertools.product((False, True), repeat=len(unknown[:_MAX_UNKNOWN])):
        guessed = list(is_batch)
        for index, of_batch in zip(unknown, guess, strict=False):
            guessed[index] = of_batch
        tried = [
            _meta(value, num_samples + 1 if of_batch else None) for value, of_batch in zip(inputs, guessed, strict=True)
        ]
        try:
            fits = _output_shape(function, meta_block, tried)[:1] == (num_samples + 1,)
        except (RuntimeError, ValueError, IndexError):
            fits = False
        if fits:
            possible.append(guessed)
    if len(possible) != 1:
        shapes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
        raise RuntimeError(
            f"It cannot be told which of the branch's inputs, of shapes {shapes}, "
            "hold one entry per sample. Use another batch size, or granularity='batch'."
        )
    return possible[0]


def without_data(block: nn.Module) -> nn.Module:
    """A copy of a block without data, hooks and stochastic depth, in evaluation mode."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        for parameter in module._parameters.values():  # pyright: ignore[reportPrivateUsage]
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for buffer in module._buffers.values():  # pyright: ignore[reportPrivateUsage]
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        for hooks in _HOOKS:
            memo[id(getattr(module, hooks))] = OrderedDict[Any, Any]()
        own = module.__dict__.get("_stochastic_depth_branch")
        if own is not None:
            memo[id(own)] = None
    made = copy.deepcopy(block, memo)
    for module in made.modules():
        module.__class__ = plain_class(module)
    return made.eval()


def _output_shape(function: Function, block: nn.Module, inputs: Sequence[Any]) -> torch.Size:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        output = function(block, *inputs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output).shape


def _meta(value: Any, num_samples: int | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = value.shape if num_samples is None else (num_samples, *value.shape[1:])
    return torch.empty(shape, dtype=value.dtype, device="meta")
