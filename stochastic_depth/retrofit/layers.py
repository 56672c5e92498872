"""Whole layers as branches (LayerDrop, Fan et al. 2020): a closed layer returns its input."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from stochastic_depth.compiling import call_in_trace, eager
from stochastic_depth.copies import plain_class, plain_copy, tensor_without_data, without_data
from stochastic_depth.gate_draws import CLOSED, Gate
from stochastic_depth.residual import GatedBranch, masks_only, outside_graph
from stochastic_depth.retrofit.code.signatures import flatten, remember, unflatten
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.hidden_states import hidden_states_of
from stochastic_depth.retrofit.recording.maps import NotComputed
from stochastic_depth.retrofit.recording.sizes import decide_by
from stochastic_depth.retrofit.recording.trace import Recording, record
from stochastic_depth.retrofit.rules import drop_path_rule
from stochastic_depth.retrofit.running.collected import are_collected
from stochastic_depth.retrofit.running.comparison import CoarsestType, deviation, some_of, tolerance
from stochastic_depth.retrofit.running.known_forms import MAX_SAMPLES
from stochastic_depth.retrofit.running.private_runs import private
from stochastic_depth.retrofit.shapes import samples_among
from stochastic_depth.torch_private import tree_map_only

# Number of sizes of a form that are kept.
_MAX_SIZES = 2**14


@dataclass(eq=False)
class GatedLayer(GatedBranch):
    """The gate of a whole layer.

    Attributes:
        drop_paths: drop paths inside the layer: its gate replaces theirs, and they apply the factor of the sum.
    """

    drop_paths: tuple[nn.Module, ...] = ()
    calls_drop_paths: bool | None = field(default=None, init=False, repr=False)
    """Whether the layer's own code has called one of them in training; None before its first run."""
    _structures: dict[Any, list[tuple[Recording | None, Any]]] = field(
        default_factory=dict[Any, "list[tuple[Recording | None, Any]]"], init=False, repr=False
    )
    # By form of call without sizes: the sizes with which the layer keeps samples apart, or with which it was not tried.
    _separate: dict[Any, set[Any]] = field(default_factory=dict[Any, "set[Any]"], init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_structures": {}, "_separate": {}}

    @eager
    def refuse_mixing(
        self,
        layer: nn.Module,
        hidden: Tensor,
        plain: Callable[..., Any],
        leaves: Sequence[Any],
        of_batch: Sequence[bool | None],
    ) -> None:
        """Compare a run of the layer on some of its samples with one on all, once for each form of call.

        Of other sizes than the number of samples, such as lengths of texts, it tries the first, second, fourth, ….

        Args:
            layer: the layer; a copy of it runs, without noise.
            hidden: its hidden states, (N, ...).
            plain: the first output of its forward, of the layer and its leaves.
            leaves: the tensors and objects of the call.
            of_batch: whether each has a first dimension of samples.

        Raises:
            RuntimeError: if they differ.
        """
        num = min(hidden.shape[0], MAX_SAMPLES)
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
            some = all_rows[some_of(num)]
            outputs: list[Tensor] = []
            with CoarsestType(torch.float32) as coarsest:
                for rows in (all_rows, some):
                    given = [
                        leaf.index_select(0, rows.to(leaf.device)) if s else leaf
                        for leaf, s in zip(leaves, of_batch, strict=True)
                    ]
                    outputs.append(plain(copy, *given))
            _check_shape(self.passes.names[self.index], outputs[0], hidden, num)
            whole, part = outputs[0].index_select(0, some.to(outputs[0].device)), outputs[1]
        if (difference := deviation(whole, part)) > tolerance(whole, coarsest.found):
            raise RuntimeError(
                f"The layer {self.passes.names[self.index]} mixes samples: on some of them it differs by "
                f"{difference:.2g} of its largest value. Use granularity='batch'."
            )
        known.add(sizes)

    @eager
    def structure(self, layer: nn.Module, signature: Any, leaves: Sequence[Any]) -> Any:
        """What the layer returns for a call, with placeholders for all tensors but those that it was given."""
        form = (layer.training, signature, *(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves))
        known = self._structures.get(form, [])
        fits = (each for recording, each in known if recording is None or recording.holds(leaves))
        if (structure := next(fits, None)) is None:
            recording, structure = self._structure_of(layer, signature, leaves)
            remember(self._structures, form, [*known, (recording, structure)])
        missing = NotComputed(
            f"This value was not computed, because stochastic depth dropped the layer {self.passes.names[self.index]} "
            "in this step, for all samples or some. A layer whose further outputs are needed can be no branch: leave "
            "it out of layers=, or leave out layers= and use a schedule for the branches inside the layers."
        )
        return tree_map_only(_Returned, lambda of: missing if of.leaf is None else leaves[of.leaf], structure)

    def _structure_of(self, layer: nn.Module, signature: Any, leaves: Sequence[Any]) -> tuple[Recording | None, Any]:
        try:
            recording = record(layer, signature, len(leaves), functools.partial(decide_by, leaves))
        except TraceError:
            recording = None
        if recording is not None:
            *_, end = recording.graph.nodes
            output = end.args[0]
            values = recording.placeholder_values(leaves)
            if not isinstance(output, fx.Node) or _is_tensor(output, values):
                number = {node: index for index, node in enumerate(values)}
                return recording, fx.map_arg(output, lambda node: cast(fx.Node, _Returned(number.get(cast(Any, node)))))
        # Only a run shows it, such as whether the child of `return self.child(x)` returns a tuple.
        try:
            return recording, self._returned(without_data(layer), signature, [tensor_without_data(of) for of in leaves])
        except Exception:  # Without data, other errors than with: its code may read values, or name a device.
            copy = plain_copy(layer, Tensor.detach, Tensor.clone)
            copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return recording, self._returned(copy, signature, copies)

    def _returned(self, layer: nn.Module, signature: Any, leaves: Sequence[Any]) -> Any:
        """What a private copy of the layer returns, with `_Returned` for each tensor."""
        args, kwargs = unflatten(signature, leaves)
        with private(), torch.no_grad(), self.passes.dry_run():
            output = layer(*args, **kwargs)
        number = {id(leaf): index for index, leaf in enumerate(leaves)}
        return tree_map_only(Tensor, lambda value: _Returned(number.get(id(value))), output)


def _is_tensor(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a recording shows that a value is a tensor; of a child's output or a part of it, it does not.

    Args:
        node: the value.
        values: the opaque arguments.
    """
    if node.op == "placeholder":
        return isinstance(values[node], Tensor)
    operands = node.args if node.op in ("call_function", "call_method") else ()
    return any(isinstance(each, fx.Node) and _is_tensor(each, values) for each in operands)


@dataclass(frozen=True)
class _Returned:
    """A tensor in what a layer returns: `leaf` is its number among the layer's inputs, None if it is none of them."""

    leaf: int | None


class StochasticLayer(nn.Module):
    """Behavior of a whole layer that is a branch: output = input + gate * (layer(input) - input)."""

    _stochastic_depth_branch: GatedLayer

    @outside_graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with its first value gated; further values are placeholders if it does not run."""
        if not isinstance(self, StochasticLayer):  # restored; someone, such as a wrapper, has kept this method
            return type(self).forward(self, *args, **kwargs)
        if (call := call_in_trace(self, args, kwargs)) is not None:
            return call
        gated = self._stochastic_depth_branch
        name = gated.passes.names[gated.index]
        leaves: list[Any] = []
        signature = flatten((args, kwargs), leaves)
        hidden = hidden_states_of(self, args, kwargs)
        if hidden is None:
            raise TypeError(f"The layer {name} is called without a tensor: it has no hidden states to return.")
        if self.training and gated.survival_prob < 1:
            _refuse_cache(name, (*args, *kwargs.values()))
            if not all(drop_path.training for drop_path in gated.drop_paths):
                raise RuntimeError(
                    f"A drop path inside the layer {name} is in evaluation mode, but its gate is the layer's: call "
                    "eval() on the layer, or set its survival probability to 1 with depth.set_survival_probs."
                )
        if masks_only.get() or are_collected(self):
            output = self._run(hidden, leaves, signature)
            weights = gated.weights(hidden, training=self.training)
            if gated.drop_paths and isinstance(weights, Tensor):
                weights = (weights > 0).to(weights.dtype)
            elif gated.drop_paths:
                weights = float(weights > 0)
            if isinstance(weights, Tensor):
                weights = weights.view(-1, *[1] * (hidden.dim() - 1))
            return with_first(output, hidden + weights * (_first(output) - hidden))
        num_samples = hidden.size(0)  # A nested tensor has no shape.
        gate = gated.passes.gate(gated.index, num_samples, hidden.device, self.training)
        factor = 1.0 if gated.drop_paths else gated.factor(gate and gate.survival_prob)
        if gate is None or gate.num_open == num_samples:
            # A copy, which is cheap compared with a layer: the layer may add to its input in place.
            before = hidden if factor == 1.0 else hidden.clone()
            output = self._run(hidden, leaves, signature)
            if self.training and gated.drop_paths and gated.calls_drop_paths is None:
                gated.calls_drop_paths = False
                warnings.warn(
                    f"The layer {name} does not call its drop paths in training. It may drop samples by other code, "
                    "and then they are dropped twice: set its own rate to 0.",
                    stacklevel=2,
                )
            _check_shape(name, _first(output), hidden, num_samples)
            return output if factor == 1.0 else with_first(output, _scaled(output, before, factor))
        if gate is CLOSED:
            others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf is not hidden]
            return with_first(gated.structure(self, signature, leaves), gated.skip(hidden, self, others))
        return self._run_subset(leaves, signature, hidden, gate, factor)

    def _run(self, hidden: Tensor, leaves: list[Any], signature: Any) -> Any:
        gated = self._stochastic_depth_branch

        def run(given: Any) -> Any:
            args, kwargs = unflatten(signature, given[1])
            return super(StochasticLayer, self).forward(*args, **kwargs)

        observer = gated.passes.observer
        return run((hidden, leaves)) if observer is None else observer(gated.index, run, (hidden, leaves))

    def _run_subset(self, leaves: list[Any], signature: Any, hidden: Tensor, gate: Gate, factor: float) -> Any:
        gated = self._stochastic_depth_branch
        assert gate.order is not None
        order = gate.order[: gate.num_open]
        kinds = [True if leaf is hidden else None if isinstance(leaf, Tensor) else False for leaf in leaves]

        def plain(layer: nn.Module, *values: Any) -> Any:
            args, kwargs = unflatten(signature, values)
            return _first(plain_class(layer).forward(layer, *args, **kwargs))

        with gated.passes.dry_run():
            of_batch = samples_among(plain, self, leaves, kinds, hidden.shape[0])

        def dry(layer: nn.Module, samples: tuple[Tensor, ...]) -> Any:
            given = iter(samples)
            return plain(
                layer,
                *[next(given) if s else tensor_without_data(leaf) for leaf, s in zip(leaves, of_batch, strict=True)],
            )

        gated.refuse_mixing(self, hidden, plain, leaves, of_batch)
        batches = tuple(leaf for leaf, samples in zip(leaves, of_batch, strict=True) if samples)
        run = gate.order[: gated.num_run(gate, self, self, dry, batches)]
        taken = [leaf.index_select(0, run) if samples else leaf for leaf, samples in zip(leaves, of_batch, strict=True)]
        output = self._run(taken[kinds.index(True)], taken, signature)
        if len(run) == 1:
            gated.mend_batch_norms(_first(output), [leaf for leaf in taken if isinstance(leaf, Tensor)])
        own = _first(output)[: gate.num_open]
        _check_shape(gated.passes.names[gated.index], own, hidden, gate.num_open)
        if factor == 1.0:
            first = hidden.to(own.dtype).index_copy(0, order, own)
        else:
            first = hidden.index_add(0, order, (own - hidden.index_select(0, order)).to(hidden.dtype), alpha=factor)
        return with_first(gated.structure(self, signature, leaves), first)


class LayerDropPath(nn.Module):
    """Behavior of a drop path inside a gated layer: all samples that reach it have survived."""

    _stochastic_depth_branch: GatedLayer

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, ...) times the factor of the layer's sum."""
        gated = self._stochastic_depth_branch
        gated.calls_drop_paths = True
        factor = gated.factor(gated.passes.survival_prob_of_call(gated.index, training=self.training))
        return x if factor == 1.0 else x * factor

    def __setattr__(self, name: str, value: Any) -> None:
        gated = self.__dict__.get("_stochastic_depth_branch")
        if gated is None or name in ("training", "__class__", "_stochastic_depth_branch"):
            super().__setattr__(name, value)
            return
        before = drop_path_rule(self)
        super().__setattr__(name, value)
        if drop_path_rule(self) != before:
            raise RuntimeError(
                f"This drop path is a part of the layer {gated.passes.names[gated.index]}, whose gate has "
                "a rate of its own: change that with controller(model).set_survival_probs."
            )


def _first(output: Any) -> Tensor:
    first = output[0] if isinstance(output, (tuple, list)) else output
    if isinstance(first, Tensor):
        return first
    kind = type(output).__name__ + ("" if first is output else f" that begins with a {type(first).__name__}")
    raise TypeError(
        f"A layer of layers= returns a {kind}. It needs to return its hidden states, or a tuple or list that begins "
        "with them."
    )


def with_first(structure: Any, first: Tensor) -> Any:
    """What a layer returns, with another first value."""
    if not isinstance(structure, (tuple, list)):
        return first
    values: list[Any] = [first, *structure[1:]]
    named = getattr(type(structure), "_make", None)
    return type(structure)(values) if named is None else named(values)


def _scaled(output: Any, hidden: Tensor, factor: float) -> Tensor:
    return torch.add(hidden, _first(output) - hidden, alpha=factor)


def _check_shape(name: str, own: Tensor, hidden: Tensor, num_samples: int) -> None:
    if not hidden.is_nested and own.shape != (num_samples, *hidden.shape[1:]):
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
        for owner, path in ((module, f"{name}."), (module.__dict__.get("config"), f"{name}.config.")):
            for attribute in ("layerdrop", "layer_drop"):  # fairseq and transformers, torchaudio
                rate = getattr(owner, "__dict__", {}).get(attribute, 0.0)
                if isinstance(rate, float) and rate > 0:
                    raise ValueError(
                        f"The model itself skips layers too, with a rate of {rate:g}. Set "
                        f"model.{path.removeprefix('.')}{attribute} = 0.0, and give the rate as a schedule: "
                        f"uniform({1 - rate:g})."
                    )
