"""The `inspect` command: the branches of a published model, how each is treated, and what skipping them saves."""

from __future__ import annotations

import copy
import difflib
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.torch_private import tree_leaves
from stochastic_depth_lab.measure.kept_bytes import kept_bytes

_SOURCES = ("timm", "torchvision", "transformers")
_NUM_MEASURED = 5


def inspect_model(
    spec: str,
    drop_path_rate: float = 0.1,
    *,
    schedule: sd.Schedule | None = None,
    measure: bool = False,
    batch_size: int = 8,
    image_size: int | None = None,
    device: torch.device,
) -> str:
    """The table of a model's branches, rates and treatment, and the predicted saving of a training step.

    Args:
        spec: `timm:NAME`, `torchvision:NAME` or `transformers:TYPE`, where the last is a configuration's model type,
            such as `beit`. Weights are random.
        drop_path_rate: drop rate of the model; ignored by models without drop paths.
        schedule: survival over depth. None: the model's own rates.
        measure: also measure time and memory of a step against the original model, on this machine.
        batch_size: number of images in a measured step.
        image_size: width and height of the images. None: the model's own.
        device: where to measure.

    Returns:
        The text to print.

    Raises:
        ValueError: if there is no such source or model, or it has no branches.
    """
    for name, value in (("--batch-size", batch_size), ("--image-size", image_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}.")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"--drop-path-rate must be in [0, 1), but is {drop_path_rate:g}.")
    model, own_size = _create(spec, drop_path_rate)
    size = image_size or own_size
    model = model.to(device)
    original = copy.deepcopy(model) if measure else None
    images = torch.randn(batch_size, 3, size, size, device=device)
    try:
        depth = sd.make_stochastic_(model, schedule)
    except ValueError as error:
        if schedule is not None or "No residual branch" not in str(error):
            raise
        raise ValueError(f"{spec} has no drop paths with a rate. Give it one: --schedule linear_decay.") from error
    try:
        lines = [str(depth), "", str(depth.cost(images, measure=True) if measure else depth.cost(images[:2]))]
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{spec} does not take images of {size}x{size} pixels: {reason}") from error
    if original is not None:
        (own_s, own_bytes), (original_s, original_bytes) = _measure((model, original), images)
        lines.append(
            f"median of {_NUM_MEASURED} interleaved steps of {batch_size} images on {device}, "
            f"PyTorch {torch.__version__}: {own_s:.3f} s, the original {original_s:.3f} s ({own_s / original_s:.0%}); "
            f"kept for the backward {own_bytes / 2**20:.0f} MiB against {original_bytes / 2**20:.0f} MiB "
            f"({own_bytes / original_bytes:.0%})"
        )
    return "\n".join(lines)


def _create(spec: str, rate: float) -> tuple[nn.Module, int]:
    source, _, name = spec.partition(":")
    if source not in _SOURCES or not name:
        raise ValueError(
            f"The model must be one of {', '.join(f'{known}:NAME' for known in _SOURCES)}, but is {spec!r}."
        )
    try:
        return _CREATE[source](name, rate)
    except ImportError as error:
        raise ValueError(f"{spec} needs the package {source}: pip install {source}. ({error})") from error
    except RuntimeError as error:  # for example torchvision that was built for another PyTorch
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{spec} cannot be created with the installed packages: {reason}") from error


def _timm(name: str, rate: float) -> tuple[nn.Module, int]:
    import timm

    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise ValueError(f"timm has no model {name!r}. Similar names: {similar or 'none; see timm.list_models()'}.")
    try:
        model = timm.create_model(name, drop_path_rate=rate)
    except TypeError:
        model = timm.create_model(name)
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)  # pyright: ignore
    return model, int(config["input_size"][-1])


def _torchvision(name: str, rate: float) -> tuple[nn.Module, int]:
    from torchvision import models

    if name not in models.list_models():
        similar = ", ".join(difflib.get_close_matches(name, models.list_models(), n=3))
        raise ValueError(f"torchvision has no model {name!r}. Similar names: {similar or 'none'}.")
    try:
        return models.get_model(name, stochastic_depth_prob=rate), 224
    except TypeError:
        return models.get_model(name), 224


def _transformers(name: str, rate: float) -> tuple[nn.Module, int]:
    import transformers

    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=5)
        raise ValueError(f"transformers has no model type {name!r}. Similar names: {', '.join(similar) or 'none'}.")
    config = transformers.AutoConfig.for_model(name, drop_path_rate=rate)
    size: Any = getattr(config, "image_size", None) or 224
    return transformers.AutoModel.from_config(config), int(size if isinstance(size, int) else size[0])


_CREATE = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


def _measure(models: Sequence[nn.Module], images: Tensor) -> list[tuple[float, float]]:
    """For each model, the median time of a training step in seconds, and the mean bytes kept for its backward pass."""
    times: dict[nn.Module, list[float]] = {model.train(): [] for model in models}
    kept: dict[nn.Module, list[int]] = {model: [] for model in models}
    for _ in range(_NUM_MEASURED + 1):
        for model in models:
            begin = time.perf_counter()
            model.zero_grad()
            _loss(model, images).backward()
            if images.is_cuda:
                torch.cuda.synchronize()
            times[model].append(time.perf_counter() - begin)
            kept[model].append(kept_bytes(partial(_loss, model, images)))
    # The first step warms up.
    return [(statistics.median(times[model][1:]), statistics.fmean(kept[model][1:])) for model in models]


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    outputs = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.float().mean() for leaf in outputs]).sum()
