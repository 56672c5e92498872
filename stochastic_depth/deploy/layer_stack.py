"""Removes whole layers of a transformers model, so that the result is a plain checkpoint with fewer layers.

What such a checkpoint is, only the model's class knows: which entry of the configuration has the number of these
layers, and what its code makes of the number of a layer. Models made anew from a changed configuration, the twins, show
it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.deploy.branches import BranchWithGate
from stochastic_depth.deploy.check import Check
from stochastic_depth.torch_private import child_dict


@dataclass(eq=False)
class LayerStack:
    """The list of layers of a model with a configuration.

    Attributes:
        owner: the model, which saves checkpoints.
        owner_path: where it is in the network, "" for the network itself.
        path: where the list of layers is in the owner.
        config: the configuration, or the part of it, that has the number of layers.
        field: its entry of the number of layers.
        kept: numbers of the layers that stay.
        twin: the owner made anew with as many layers, without data.
    """

    owner: nn.Module
    owner_path: str
    path: str
    config: Any
    field: str
    kept: list[int]
    twin: nn.Module

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        layers = self.owner.get_submodule(self.path)
        assert isinstance(layers, nn.ModuleList)
        return layers


def layer_stack_of(network: nn.Module, branches: Sequence[BranchWithGate], kept: Collection[int]) -> LayerStack | None:
    """The list whose layers are all branches of a network.

    Args:
        network: the network.
        branches: its branches.
        kept: indices of the branches that stay.

    Returns:
        None if there is no such list, or no configuration from which it could be made anew.
    """
    parents = {branch.found.name.rpartition(".")[0] for branch in branches}
    if len(parents) != 1 or any(branch.found.kind != "layer" for branch in branches):
        return None
    path = parents.pop()
    owner_path = next((each for each in _paths_to(path) if _is_config(_config_of(network.get_submodule(each)))), None)
    layers = network.get_submodule(path)
    if owner_path is None or not isinstance(layers, nn.ModuleList) or len(layers) != len(branches):
        return None
    owner = network.get_submodule(owner_path)
    path = path[len(owner_path) :].removeprefix(".")
    numbers = sorted(int(branches[index].found.name.rpartition(".")[2]) for index in kept)
    root = _config_of(owner)
    for config, field in _numbers_of_layers(root, len(layers)):
        with _changed(config, _shorter(config, field, numbers)):
            twin = _twin(owner, root, "meta")
        if twin is not None and _fits(owner, twin, path, len(numbers)):
            return LayerStack(owner, owner_path, path, config, field, numbers, twin)
    return None


def remove_layers_(stack: LayerStack) -> None:
    """Remove layers from a model without stochastic depth, and renumber the others.

    A layer's number is the index of its entry in a cache. The configuration gets the new number of layers, and its
    lists with an entry per layer, such as `layer_types`, lose the same entries.
    """
    layers = stack.layers
    left = [layers[index] for index in stack.kept]
    for name, value in _shorter(stack.config, stack.field, stack.kept).items():
        setattr(stack.config, name, value)
    del layers[:]
    layers.extend(left)
    theirs = dict(stack.twin.named_modules())
    parts = {id(part) for part in _parts(_config_of(stack.owner))}
    for name, module in stack.owner.named_modules():
        own, other = _config_of(module), _config_of(theirs.get(name))
        if _is_config(own) and _is_config(other) and id(own) not in parts:  # a copy, such as that of T5's decoder
            vars(own).update({key: value for key, value in vars(other).items() if isinstance(value, (int, list))})
    for new, (old, layer, like) in enumerate(zip(stack.kept, layers, theirs[stack.path].children(), strict=True)):
        like = dict(like.named_modules())
        for name, module in layer.named_modules():
            for key, value in vars(module).items():
                other = vars(like.get(name, nn.Module())).get(key)
                if type(value) is int and type(other) is int and value - other == old - new:
                    setattr(module, key, other)


def warn_if_no_checkpoint(stack: LayerStack, network: nn.Module, check: Check, *, stacklevel: int) -> None:
    """Warn if a checkpoint of the result would be loaded as another network.

    Args:
        stack: the layers that were removed.
        network: the result.
        check: what it computes.
        stacklevel: as in `warnings.warn`.
    """
    device = next(stack.owner.parameters()).device
    loaded = _twin(stack.owner, _config_of(stack.owner), device)
    try:
        if loaded is None:
            raise RuntimeError("it cannot be made from its configuration")
        loaded.load_state_dict(stack.owner.state_dict(), assign=True)
        if not stack.owner_path:
            check.refuse_difference(loaded, "save_pretrained")
            return
        parent, _, name = stack.owner_path.rpartition(".")
        children = child_dict(network.get_submodule(parent))
        try:
            children[name] = loaded
            check.refuse_difference(network, "save_pretrained")
        finally:
            children[name] = stack.owner
    except RuntimeError as error:
        warnings.warn(
            f"The result computes what it should, but save_pretrained would write another network: the code of "
            f"{type(stack.owner).__name__} depends on the number of a layer. Keep the first layers, or save the whole "
            f"module with torch.save. ({' '.join(str(error).split())[:200]})",
            stacklevel=stacklevel + 1,
        )


def _paths_to(path: str) -> Iterator[str]:
    """The paths of the modules that contain `path`, from outside."""
    yield ""
    parts = path.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts)))


def _config_of(module: nn.Module | None) -> Any:
    return None if module is None else vars(module).get("config")


def _is_config(value: Any) -> bool:
    return callable(getattr(value, "to_dict", None)) and callable(getattr(type(value), "from_dict", None))


def _parts(config: Any) -> Iterator[Any]:
    """A configuration, and those inside it, such as `text_config`."""
    yield config
    for value in vars(config).values():
        if _is_config(value):
            yield from _parts(value)


def _numbers_of_layers(config: Any, num_layers: int) -> Iterator[tuple[Any, str]]:
    for part in _parts(config):
        for name, value in vars(part).items():
            if type(value) is int and value == num_layers and ("layer" in name or "depth" in name or "block" in name):
                yield part, name


def _shorter(config: Any, field: str, kept: Sequence[int]) -> dict[str, Any]:
    """The entries that change."""
    num_layers = getattr(config, field)
    lists = {
        name: [value[index] for index in kept]
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list) and len(value) == num_layers
    }
    return {field: len(kept), **lists}


@contextmanager
def _changed(config: Any, entries: Mapping[str, Any]) -> Generator[None]:
    before = {name: getattr(config, name) for name in entries}
    try:
        vars(config).update(entries)
        yield
    finally:
        vars(config).update(before)


def _twin(owner: nn.Module, config: Any, device: torch.device | str) -> nn.Module | None:
    """The owner made anew from its configuration, as if a checkpoint were loaded; None if its class cannot do that."""
    try:
        type(config).from_dict(config.to_dict())  # as it is loaded, which lists with too many entries would prevent
        given = copy.deepcopy(config)  # with what is not saved: the choice of the code for attention and experts
        with torch.random.fork_rng(), torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plain_class(owner)(given)
    except Exception:
        return None


def _fits(owner: nn.Module, twin: nn.Module, path: str, num_layers: int) -> bool:
    """Whether all lists of modules of the twin have their length, and that at `path` the new one."""
    lists = {name: len(each) for name, each in owner.named_modules() if isinstance(each, nn.ModuleList)}
    others = {name: len(each) for name, each in twin.named_modules() if isinstance(each, nn.ModuleList)}
    lists[path] = num_layers
    inside = f"{path}."
    return {name: length for name, length in lists.items() if not name.startswith(inside)} == {
        name: length for name, length in others.items() if not name.startswith(inside)
    }
