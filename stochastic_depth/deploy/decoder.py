"""Removes layers from a transformers decoder, so that the result is a plain checkpoint with fewer layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import nn

from stochastic_depth.deploy.branches import BranchWithGate


class Stack(NamedTuple):
    """The layers of a decoder, with the configuration that holds their number."""

    layers: nn.ModuleList
    config: Any


def stack_of(network: nn.Module, branches: Sequence[BranchWithGate]) -> Stack | None:
    """The list whose layers are all branches of a network; None if there is no such list or no configuration."""
    parents = {branch.found.name.rpartition(".")[0] for branch in branches}
    if len(parents) != 1 or any(branch.found.kind != "layer" for branch in branches):
        return None
    path = parents.pop()
    layers = network.get_submodule(path)
    config: Any = getattr(network.get_submodule(path.rpartition(".")[0]), "config", None)
    if not isinstance(layers, nn.ModuleList) or getattr(config, "num_hidden_layers", None) != len(layers):
        return None
    return Stack(layers, config)


def remove_layers_(stack: Stack, dropped: Collection[nn.Module]) -> None:
    """Remove layers from a decoder without stochastic depth, and renumber the others.

    A layer's number is the index of its entry in a cache. The configuration gets the new number of layers, and its
    lists with an entry per layer, such as `layer_types`, lose the same entries.
    """
    layers, config = stack
    kept = [index for index, layer in enumerate(layers) if layer not in dropped]
    num_layers = len(layers)
    left = [layers[index] for index in kept]
    of_layers = {
        name: [value[index] for index in kept]
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list) and len(value) == num_layers
    }
    del layers[:]
    layers.extend(left)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    config.num_hidden_layers = len(left)
    for name, values in of_layers.items():
        setattr(config, name, values)
