"""Guesses a model's inputs if none are given and no call was seen. A guess is good if the model runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.retrofit.remembered import Call

_NUM_SAMPLES, _LENGTH = 2, 7
_IMAGE_SIZES = (32, 64, 224)
_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def guessed_calls(model: nn.Module) -> Iterator[Call]:
    """Calls that the model may accept, from its own description and its first layer."""
    given = _dummy_inputs(model)
    if given is not None:
        yield (), given
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        generator = torch.Generator().manual_seed(0)
        for shape in _shapes(model, module):
            if isinstance(module, nn.Embedding):
                # Small indices, which are valid in other embeddings too.
                tokens = torch.randint(min(2, module.num_embeddings), shape, generator=generator)
                yield (tokens.to(weight.device),), {}
            else:
                values = torch.randn(shape, generator=generator)
                yield (values.to(weight.device, weight.dtype),), {}
        return


def _dummy_inputs(model: nn.Module) -> dict[str, Any] | None:
    """The example inputs of transformers models."""
    try:
        given: Any = getattr(model, "dummy_inputs", None)
    except Exception:  # it is computed
        return None
    parameter = next(model.parameters())
    if not isinstance(given, dict):
        return None
    entries = cast("dict[str, Any]", given).items()
    return {name: value.to(parameter.device) if isinstance(value, Tensor) else value for name, value in entries}


def _shapes(model: nn.Module, first: nn.Module) -> Iterator[tuple[int, ...]]:
    for kind, num_dims in _CONVOLUTIONS.items():
        if isinstance(first, kind):
            for size in _image_sizes(model) if num_dims == 2 else (_IMAGE_SIZES[1], 16):
                yield (_NUM_SAMPLES, cast(Any, first).in_channels, *[size] * num_dims)
    if isinstance(first, nn.Linear):
        yield _NUM_SAMPLES, first.in_features
        yield _NUM_SAMPLES, _LENGTH, first.in_features
    if isinstance(first, nn.Embedding):
        yield _NUM_SAMPLES, _LENGTH
    if isinstance(first, (nn.LayerNorm, nn.RMSNorm)):
        yield _NUM_SAMPLES, *first.normalized_shape
        yield _NUM_SAMPLES, _LENGTH, *first.normalized_shape
    if isinstance(first, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
        yield _NUM_SAMPLES, first.num_features
        yield _NUM_SAMPLES, first.num_features, _IMAGE_SIZES[0], _IMAGE_SIZES[0]


def _image_sizes(model: nn.Module) -> list[int]:
    """Sizes from the model's attributes, then common ones."""
    named: list[Any] = [
        getattr(owner, name, None)
        for owner in (model, getattr(model, "patch_embed", None), getattr(model, "config", None))
        for name in ("img_size", "image_size")
    ]
    pretrained: Any = getattr(model, "pretrained_cfg", None)
    if hasattr(pretrained, "get"):
        named.append(pretrained.get("input_size"))
    sizes = [size[-1] if isinstance(size, (tuple, list)) and size else size for size in named]
    return list(dict.fromkeys([*(size for size in sizes if isinstance(size, int)), *_IMAGE_SIZES]))
