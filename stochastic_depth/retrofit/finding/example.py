"""Reads the code of a model's blocks while the model runs on an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from stochastic_depth.cost import undisturbed
from stochastic_depth.retrofit.code.effects import ChangedObjectError
from stochastic_depth.retrofit.code.signatures import flatten
from stochastic_depth.retrofit.code.surroundings import kept_surroundings
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.quiet import without_noise
from stochastic_depth.retrofit.recording.run import run_block
from stochastic_depth.retrofit.recording.stand_in import stand_in, untouched
from stochastic_depth.retrofit.running.arguments import arguments_anew, behind_nodes, copy_of_object
from stochastic_depth.retrofit.running.private_runs import private
from stochastic_depth.torch_private import tree_map

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Reading:
    """A recording of a block in one call; see `trace.Recording`."""

    graph: fx.Graph


class Example:
    """The calls of each module of a model on an example, in training and in evaluation.

    Args:
        model: the model; it runs twice, without noise and without lasting effects.
        inputs: arguments of its forward.

    Raises:
        ValueError: if the model cannot be run on them.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any] | Mapping[str, Any]) -> None:
        args, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        self._calls: dict[tuple[nn.Module, bool], Arguments] = {}
        self._num_calls: Counter[nn.Module] = Counter()
        self._places: dict[nn.Module, int] = {}
        modes = {module: module.training for module in model.modules()}
        training = False

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._num_calls[module] += training
            self._places.setdefault(module, len(self._places))
            if (module, training) not in self._calls:
                self._calls[module, training] = _copies((args, kwargs))

        hooks = [
            module.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
            for module in modes
            if not isinstance(module, torch.jit.ScriptModule)  # which allows none
        ]
        try:
            with undisturbed(model), untouched(model), kept_surroundings(model), torch.enable_grad():
                for training in (True, False):
                    for module in modes:
                        module.training = training
                    given, given_named = _copies((args, named))
                    with without_noise(model):
                        model(*given, **given_named)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, AssertionError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(f"The model fails on inputs ({type(error).__name__}: {first}).") from error
        finally:
            for hook in hooks:
                hook.remove()

    def place(self, module: nn.Module) -> int | None:
        """The place of a module in the order of first calls; None if it is not called."""
        return self._places.get(module)

    def num_uses(self, block: nn.Module, drop_path: nn.Module) -> int:
        """How often a call of a block in training calls a drop path; at least once."""
        return max(1, self._num_calls[drop_path] // max(1, self._num_calls[block]))

    def recordings(self, block: nn.Module, inlined: Collection[str] = ()) -> Iterator[Reading]:
        """Recordings of a block in its calls on the example.

        Args:
            block: the block.
            inlined: paths of the children whose own code is read as a part of the block's.

        Raises:
            TraceError: if its call in training cannot be recorded, which then could not be gated; if none of its calls
                can be recorded, or if there are none.
        """
        first_error: TraceError | None = None
        num_recorded = 0
        for training in (True, False):
            if (block, training) not in self._calls:
                continue
            try:
                graph = _recorded(block, self._calls[block, training], inlined, training=training)
            except TraceError as error:
                if training:
                    raise
                first_error = error
                continue
            num_recorded += 1
            yield Reading(graph)
        if not num_recorded:
            raise first_error or TraceError("the example never calls it")


def _recorded(block: nn.Module, arguments: Arguments, inlined: Collection[str], *, training: bool) -> fx.Graph:
    leaves: list[Any] = []
    signature = flatten(arguments, leaves)
    leaves = _told_apart(leaves)
    trial = stand_in(block, inlined)
    for module in trial.modules():
        module.training = training

    def run(called: set[type]) -> fx.Graph:
        args, kwargs, own = behind_nodes(arguments_anew(signature, leaves, {}, called))
        return run_block(trial, args, kwargs, own, inlined=inlined).graph

    with private():
        try:
            return run(set())
        except ChangedObjectError as error:
            if not error.kinds:
                raise
            return run(error.kinds)


def _copies(arguments: Any) -> Any:
    return tree_map(copy_of_object, arguments, is_leaf=_is_size)


def _is_size(value: Any) -> bool:
    # PyTorch would make a tuple of it.
    return isinstance(value, torch.Size)


def _told_apart(leaves: Sequence[Any]) -> list[Any]:
    """The values, with views for repetitions: what is one tensor in this call may be two in others (GCNII)."""
    first = {id(leaf): index for index, leaf in reversed(list(enumerate(leaves)))}
    return [
        leaf.view_as(leaf) if isinstance(leaf, Tensor) and first[id(leaf)] != index else leaf
        for index, leaf in enumerate(leaves)
    ]
