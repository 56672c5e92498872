"""Runs a branch without data before its first real run, to tell which of its inputs hold samples.

Callers wrap it into `attribution.dry_run`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import eager
from stochastic_depth.copies import evaluating_, plain_copy, tensor_without_data, without_data

_MAX_UNKNOWN = 4

Function = Callable[..., Any]


@eager
def samples_among(
    function: Function, block: nn.Module, inputs: Sequence[Any], kinds: Sequence[bool | None], num_samples: int
) -> list[bool]:
    """The inputs of a branch whose first dimension is the samples.

    An argument whose first dimension has length N may hold samples or not (a bias per head, with as many heads as
    samples). A trial decides: with one more sample, the branch can run in only one of the two cases.

    Args:
        function: the branch, which takes the block and the inputs.
        block: the block.
        inputs: all inputs of the branch.
        kinds: for each input, whether it holds samples; None if unknown.
        num_samples: N.

    Raises:
        RuntimeError: if this cannot be determined, or an input that holds samples does not have N of them.
    """
    lengths = [value.shape[0] if isinstance(value, Tensor) and value.dim() else None for value in inputs]
    for length, kind in zip(lengths, kinds, strict=True):
        if kind and length not in (num_samples, None):
            raise RuntimeError(
                f"An input of the branch has {length} entries, but the shortcut has {num_samples} samples. "
                "granularity='batch' does not need them to agree."
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
    reason = ""
    meta_block = evaluating_(without_data(block))
    for guess in itertools.product((False, True), repeat=len(unknown[:_MAX_UNKNOWN])):
        guessed = list(is_batch)
        for index, of_batch in zip(unknown, guess, strict=False):
            guessed[index] = of_batch
        tried = [
            tensor_without_data(value, num_samples + 1 if of_batch else None)
            for value, of_batch in zip(inputs, guessed, strict=True)
        ]
        try:
            fits = _output(function, meta_block, tried).shape[:1] == (num_samples + 1,)
            reason = "its output does not begin with one entry per sample"
        except Exception as error:  # whatever the code raises for shapes that do not fit, such as PyTorch's asserts
            fits, reason = False, (str(error).splitlines() or [type(error).__name__])[0]
        if fits:
            possible.append(guessed)
    if len(possible) == 1:
        return possible[0]
    if not possible:
        raise RuntimeError(
            f"It is unknown which of the branch's inputs have one entry per sample: with one more it fails ({reason}). "
            "Use granularity='batch'."
        )
    return _samples_by_influence(function, block, inputs, possible)


def _samples_by_influence(
    function: Function, block: nn.Module, inputs: Sequence[Any], possible: Sequence[list[bool]]
) -> list[bool]:
    """Decide by influence if shapes are ambiguous: an entry per sample changes only this sample's output.

    This runs a copy of the block with random parameters, whose branch is not zero by chance. Entries of whole numbers,
    such as positions, are reversed, so that they stay valid.
    """
    undecided = [index for index in range(len(inputs)) if len({guess[index] for guess in possible}) > 1]
    others = {
        index: inputs[index][:1].flip(-1)
        for index in undecided
        if isinstance(inputs[index], Tensor) and not inputs[index].is_floating_point() and inputs[index].dim() > 1
    }
    fitting = [inputs[index] for index in undecided if index not in others]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in fitting) or any(
        torch.equal(other, inputs[index][:1]) for index, other in others.items()
    ):
        shapes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
        raise RuntimeError(
            f"It is unknown which of the branch's inputs, of shapes {shapes}, "
            "have one entry per sample. Use another batch size, or granularity='batch'."
        )
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    trial = evaluating_(plain_copy(block, random_like, Tensor.clone))
    expected = _output(function, trial, inputs)
    decided = list(possible[0])
    for index in undecided:
        changed = list(inputs)
        first = others[index] if index in others else random_like(inputs[index][:1])
        changed[index] = torch.cat([first, inputs[index].detach()[1:]])
        decided[index] = torch.equal(_output(function, trial, changed)[1:], expected[1:])
    return decided


def _output(function: Function, block: nn.Module, inputs: Sequence[Any]) -> Tensor:
    output = function(block, *inputs)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
