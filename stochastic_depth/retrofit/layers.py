"""Whole layers as branches (LayerDrop, Fan et al. 2020): a closed layer hands its input on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from stochastic_depth.passes import Gate
from stochastic_depth.residual import GatedBranch, compiled_inside
from stochastic_depth.retrofit.shapes import samples_among
from stochastic_depth.retrofit.trace import TraceError, flatten, plain_class, record, size_value, unflatten


class StochasticLayer(nn.Module):
    """Behaviour of a layer that is a branch as a whole: output = input + gate * (layer(input) - input)."""

    _stochastic_depth_branch: GatedBranch

    @compiled_inside
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns, its first value gated; where it does not run, further tensors are None."""
        gated = self._stochastic_depth_branch
        name = gated.passes.names[gated.index]
        leaves: list[Any] = []
        signature = flatten((args, kwargs), leaves)
        # The hidden states are the first tensor, given by position or, as some models do, by name.
        hidden = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if hidden is None:
            raise TypeError(f"The layer {name} is called without a tensor: it has no hidden states to hand on.")
        gate = gated.passes.gate(gated.index, hidden.shape[0], hidden.device, training=self.training)
        if gate is None:
            return _scaled(
                self._run(leaves, signature), hidden, gated.survival_prob if gated.rescale == "eval" else 1.0
            )
        factor = 1 / gate.survival_prob if gated.rescale == "train" else 1.0
        if gate.num_open == hidden.shape[0]:
            return _scaled(self._run(leaves, signature), hidden, factor)
        if gate.num_open == 0 and gate.order is None:
            return _with_first(self._structure(signature, leaves), gated.skip(hidden, self))
        return self._run_subset(leaves, signature, hidden, gate, factor)

    def _run(self, leaves: list[Any], signature: Any) -> Any:
        gated = self._stochastic_depth_branch

        def run(values: Any) -> Any:
            args, kwargs = unflatten(signature, values)
            return super(StochasticLayer, self).forward(*args, **kwargs)

        observer = gated.passes.observer
        return run(leaves) if observer is None else observer(gated.index, run, leaves)

    def _run_subset(self, leaves: list[Any], signature: Any, hidden: Tensor, gate: Gate, factor: float) -> Any:
        assert gate.order is not None
        order = gate.order[: gate.num_open]
        run = gate.order[: max(gate.num_open, 1)]
        kinds = [True if leaf is hidden else None if isinstance(leaf, Tensor) else False for leaf in leaves]

        def plain(layer: nn.Module, *values: Any) -> Any:
            args, kwargs = unflatten(signature, values)
            return plain_class(layer).forward(layer, *args, **kwargs)

        of_batch = samples_among(plain, self, leaves, kinds, hidden.shape[0])
        taken = [leaf.index_select(0, run) if samples else leaf for leaf, samples in zip(leaves, of_batch, strict=True)]
        output = self._run(taken, signature)
        own = _first(output)[: gate.num_open]
        if factor == 1.0:
            first = hidden.to(own.dtype).index_copy(0, order, own)
        else:
            first = hidden.index_add(0, order, (own - hidden.index_select(0, order)).to(hidden.dtype), alpha=factor)
        return _with_first(self._structure(signature, leaves), first)

    def _structure(self, signature: Any, leaves: list[Any]) -> Any:
        """What the layer returns, with None for all tensors."""
        try:
            recording = record(
                self,
                signature,
                len(leaves),
                lambda node: size_value(node, dict(zip(_placeholders(node), leaves, strict=True))),
            )
        except TraceError as error:
            gated = self._stochastic_depth_branch
            raise RuntimeError(
                f"It cannot be told what {gated.passes.names[gated.index]} returns when it is not run: {error}."
            ) from error
        return fx.map_arg(next(iter(reversed(recording.graph.nodes))).args[0], lambda _: cast(fx.Node, None))


def _placeholders(node: fx.Node) -> list[fx.Node]:
    return [other for other in node.graph.nodes if other.op == "placeholder"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_first(structure: Any, first: Tensor) -> Any:
    if isinstance(structure, (tuple, list)):
        return type(structure)([first, *structure[1:]])
    return first


def _scaled(output: Any, hidden: Tensor, factor: float) -> Any:
    own = _first(output)
    if own.shape != hidden.shape:
        raise RuntimeError(
            f"The layer makes {tuple(own.shape)} of hidden states {tuple(hidden.shape)}: it cannot be a branch."
        )
    if factor == 1.0:
        return output
    scaled = torch.add(hidden, own - hidden, alpha=factor)
    return type(output)([scaled, *output[1:]]) if isinstance(output, (tuple, list)) else scaled


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
                    f"The model skips layers itself, with a rate of {rate:g}, beside the gates. Set model"
                    f"{'.' if name else ''}{path.removeprefix('.') if name else path} = 0.0, and give the rate as "
                    f"a schedule: uniform({1 - rate:g})."
                )
