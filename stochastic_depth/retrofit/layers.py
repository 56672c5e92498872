"""Whole layers as branches (LayerDrop, Fan et al. 2020): a closed layer returns its input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from stochastic_depth.compiling import eager
from stochastic_depth.copies import evaluating_, plain_class, plain_copy, tensor_without_data
from stochastic_depth.gate_draws import CLOSED, Gate
from stochastic_depth.residual import GatedBranch, masks_only, outside_graph
from stochastic_depth.retrofit.code.signatures import flatten, remember, unflatten
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.sizes import decide_by
from stochastic_depth.retrofit.recording.trace import Recording, record
from stochastic_depth.retrofit.running.comparison import deviation, tolerance
from stochastic_depth.retrofit.running.known_forms import MAX_SAMPLES
from stochastic_depth.retrofit.running.private_runs import private
from stochastic_depth.retrofit.shapes import samples_among
from stochastic_depth.torch_private import tree_map_only

# What layers call their hidden states, also where these are not their first argument.
_HIDDEN = ("hidden_states", "x")
# Number of sizes of a form that are kept.
_MAX_SIZES = 2**14


@dataclass(eq=False)
class GatedLayer(GatedBranch):
    """The gate of a whole layer.

    Attributes:
        drop_paths: whether drop paths inside the layer, which its gate replaces, apply the factor of the sum.
    """

    drop_paths: bool = False
    _structures: dict[Any, list[tuple[Recording | None, Any]]] = field(
        default_factory=dict[Any, "list[tuple[Recording | None, Any]]"], init=False, repr=False
    )
    _names: dict[Any, tuple[str, ...]] = field(default_factory=dict[Any, "tuple[str, ...]"], init=False, repr=False)
    # By form of call without sizes: the sizes with which the layer keeps samples apart, or with which it was not tried.
    _separate: dict[Any, set[Any]] = field(default_factory=dict[Any, "set[Any]"], init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_structures": {}, "_names": {}, "_separate": {}}

    @eager
    def hidden_of(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The hidden states of a call: the first tensor by the layer's own order, or that which its code calls so."""
        forward = plain_class(layer).forward
        if forward not in self._names:
            self._names[forward] = tuple(inspect.signature(forward).parameters)[1:]
        given = {**dict(zip(self._names[forward], args, strict=False)), **kwargs}
        for name in (*_HIDDEN, *self._names[forward]):
            if isinstance(given.get(name), Tensor):
                return cast(Tensor, given[name])
        leaves: list[Any] = []
        flatten((args, kwargs), leaves)
        return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)

    @eager
    def refuse_mixing(
        self, layer: nn.Module, plain: Callable[..., Any], leaves: Sequence[Any], of_batch: Sequence[bool | None]
    ) -> None:
        """Compare a run of the layer on some of its samples with one on all, once for each form of call.

        Of other sizes than the number of samples, such as lengths of texts, it tries the first, second, fourth, ….

        Args:
            layer: the layer; a copy of it runs, without noise.
            plain: its forward, of the layer and its leaves.
            leaves: the tensors and objects of the call.
            of_batch: whether each has a first dimension of samples.

        Raises:
            RuntimeError: if they differ.
        """
        num_samples = next(leaf.shape[0] for leaf, samples in zip(leaves, of_batch, strict=True) if samples)
        num = min(num_samples, MAX_SAMPLES)
        form = (layer.training, num, *(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves))
        sizes = tuple(leaf.shape[1:] for leaf in leaves if isinstance(leaf, Tensor))
        known = self._separate.setdefault(form, set())
        if num < 2 or sizes in known or len(known) >= _MAX_SIZES:
            return
        if len(known) & (len(known) + 1):
            known.add(sizes)
            return
        with private(), torch.no_grad(), self.passes.dry_run():
            copy = plain_copy(layer, Tensor.detach, Tensor.clone)
            copy.train(layer.training)
            all_rows = torch.arange(num)
            some = all_rows[(0.618 * all_rows) % 1 < 0.5]
            outputs: list[Tensor] = []
            for rows in (all_rows, some):
                given = [
                    leaf.index_select(0, rows.to(leaf.device)) if s else leaf
                    for leaf, s in zip(leaves, of_batch, strict=True)
                ]
                outputs.append(_first(plain(copy, *given)))
            whole, part = outputs[0].index_select(0, some.to(outputs[0].device)), outputs[1]
        if (difference := deviation(whole, part)) > tolerance(whole):
            raise RuntimeError(
                f"The layer {self.passes.names[self.index]} mixes samples: on some of them it differs by "
                f"{difference:.2g} of its largest value. Use granularity='batch'."
            )
        known.add(sizes)

    @eager
    def structure(self, layer: nn.Module, signature: Any, leaves: Sequence[Any]) -> Any:
        """The structure that the layer returns for a call, with None for all tensors."""
        form = (signature, *(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves))
        known = self._structures.get(form, [])
        for recording, structure in known:
            if recording is None or recording.holds(leaves):
                return structure
        try:
            recording = record(layer, signature, len(leaves), partial(decide_by, leaves))
            returned = next(iter(reversed(recording.graph.nodes))).args[0]
            structure = fx.map_arg(returned, lambda _: cast(fx.Node, None))
        except TraceError:
            # Only a run shows it, one for all sizes: in evaluation, without gradients, on a copy without hooks.
            recording, (args, kwargs) = None, unflatten(signature, leaves)
            with self.passes.dry_run():
                output = evaluating_(plain_copy(layer, Tensor.detach, Tensor.clone))(*args, **kwargs)
            structure = tree_map_only(Tensor, lambda _: None, output)
        remember(self._structures, form, [*known, (recording, structure)])
        return structure


class StochasticLayer(nn.Module):
    """Behavior of a whole layer that is a branch: output = input + gate * (layer(input) - input)."""

    _stochastic_depth_branch: GatedLayer

    @outside_graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with its first value gated. If the layer does not run, further tensors are None."""
        gated = self._stochastic_depth_branch
        name = gated.passes.names[gated.index]
        leaves: list[Any] = []
        signature = flatten((args, kwargs), leaves)
        hidden = gated.hidden_of(self, args, kwargs)
        if hidden is None:
            raise TypeError(f"The layer {name} is called without a tensor: it has no hidden states to return.")
        if self.training and gated.survival_prob < 1:
            _refuse_cache(name, (*args, *kwargs.values()))
        if masks_only.get():
            output = self._run(leaves, signature)
            weights = gated.weights(hidden, training=self.training)
            if gated.drop_paths and isinstance(weights, Tensor):
                weights = (weights > 0).to(weights.dtype)
            elif gated.drop_paths:
                weights = float(weights > 0)
            if isinstance(weights, Tensor):
                weights = weights.view(-1, *[1] * (hidden.dim() - 1))
            return _with_first(output, hidden + weights * (_first(output) - hidden))
        gate = gated.passes.gate(gated.index, hidden.shape[0], hidden.device, self.training)
        factor = 1.0 if gated.drop_paths else gated.factor(gate and gate.survival_prob)
        if gate is None or gate.num_open == hidden.shape[0]:
            # A copy, which is cheap compared with a layer: the layer may add to its input in place.
            before = hidden if factor == 1.0 else hidden.clone()
            output = self._run(leaves, signature)
            _check_shape(name, _first(output), hidden, hidden.shape[0])
            return output if factor == 1.0 else _with_first(output, _scaled(output, before, factor))
        if gate is CLOSED:
            others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf is not hidden]
            return _with_first(gated.structure(self, signature, leaves), gated.skip(hidden, self, others))
        return self._run_subset(leaves, signature, hidden, gate, factor)

    def _run(self, leaves: list[Any], signature: Any) -> Any:
        gated = self._stochastic_depth_branch

        def run(values: Any) -> Any:
            args, kwargs = unflatten(signature, values)
            return super(StochasticLayer, self).forward(*args, **kwargs)

        observer = gated.passes.observer
        return run(leaves) if observer is None else observer(gated.index, run, leaves)

    def _run_subset(self, leaves: list[Any], signature: Any, hidden: Tensor, gate: Gate, factor: float) -> Any:
        gated = self._stochastic_depth_branch
        assert gate.order is not None
        order = gate.order[: gate.num_open]
        kinds = [True if leaf is hidden else None if isinstance(leaf, Tensor) else False for leaf in leaves]

        def plain(layer: nn.Module, *values: Any) -> Any:
            args, kwargs = unflatten(signature, values)
            return plain_class(layer).forward(layer, *args, **kwargs)

        with gated.passes.dry_run():
            of_batch = samples_among(plain, self, leaves, kinds, hidden.shape[0])

        def dry(layer: nn.Module, samples: tuple[Tensor, ...]) -> Any:
            given = iter(samples)
            return plain(
                layer,
                *[next(given) if s else tensor_without_data(leaf) for leaf, s in zip(leaves, of_batch, strict=True)],
            )

        gated.refuse_mixing(self, plain, leaves, of_batch)
        batches = tuple(leaf for leaf, samples in zip(leaves, of_batch, strict=True) if samples)
        run = gate.order[: gated.num_run(gate, self, self, dry, batches)]
        taken = [leaf.index_select(0, run) if samples else leaf for leaf, samples in zip(leaves, of_batch, strict=True)]
        output = self._run(taken, signature)
        own = _first(output)[: gate.num_open]
        _check_shape(gated.passes.names[gated.index], own, hidden, gate.num_open)
        if factor == 1.0:
            first = hidden.to(own.dtype).index_copy(0, order, own)
        else:
            first = hidden.index_add(0, order, (own - hidden.index_select(0, order)).to(hidden.dtype), alpha=factor)
        return _with_first(gated.structure(self, signature, leaves), first)


class LayerDropPath(nn.Module):
    """Behavior of a drop path inside a gated layer: all samples that reach it have survived."""

    _stochastic_depth_branch: GatedLayer

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, ...) times the factor of the layer's sum."""
        gated = self._stochastic_depth_branch
        factor = gated.factor(gated.passes.survival_prob_of_call(gated.index, training=self.training))
        return x if factor == 1.0 else x * factor


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_first(structure: Any, first: Tensor) -> Any:
    if isinstance(structure, (tuple, list)):
        return type(structure)([first, *structure[1:]])
    return first


def _scaled(output: Any, hidden: Tensor, factor: float) -> Tensor:
    return torch.add(hidden, _first(output) - hidden, alpha=factor)


def _check_shape(name: str, own: Tensor, hidden: Tensor, num_samples: int) -> None:
    if own.shape != (num_samples, *hidden.shape[1:]):
        raise RuntimeError(
            f"The layer {name} turns hidden states {(num_samples, *hidden.shape[1:])} into {tuple(own.shape)}: "
            "it cannot be a branch."
        )


def _refuse_cache(name: str, values: Iterable[Any]) -> None:
    """Raise if a layer that may be dropped in training receives a cache of keys and values."""
    # A dropped layer stores nothing in it: later reads would miss keys, or find those of other tokens.
    if any(hasattr(value, "get_seq_length") and hasattr(value, "update") for value in values):
        raise ValueError(
            f"The layer {name} may be dropped in training, but receives a key-value cache, in which a dropped layer "
            "stores nothing. Set model.config.use_cache = False, or call model.eval() to generate."
        )


def refuse_own_layerdrop(model: nn.Module) -> None:
    """Raise if the model skips layers by itself.

    Raises:
        ValueError: if it does; the message says where to switch it off.
    """
    for name, module in model.named_modules():
        for owner, path in (
            (module, f"{name}.layerdrop"),
            (getattr(module, "config", None), f"{name}.config.layerdrop"),
        ):
            rate = getattr(owner, "layerdrop", 0.0)
            if isinstance(rate, float) and rate > 0:
                raise ValueError(
                    f"The model itself skips layers too, with a rate of {rate:g}. Set model"
                    f"{'.' if name else ''}{path.removeprefix('.') if name else path} = 0.0, and give the rate as "
                    f"a schedule: uniform({1 - rate:g})."
                )
