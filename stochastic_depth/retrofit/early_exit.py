"""Losses of early exits: the model's own head on the hidden states after a layer (Elhoushi et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stochastic_depth.gate_draws import CLOSED
from stochastic_depth.retrofit.apply import controller
from stochastic_depth.retrofit.controller import Controller

_IGNORED = -100  # transformers and PyTorch's cross_entropy count no loss for labels of this value


def early_exit_loss(model: nn.Module, inputs: Mapping[str, Any], exits: Iterable[int], *, scale: float = 1.0) -> Tensor:
    """The training loss of LayerSkip: the weighted mean of the whole model's loss and those of early exits.

    It is sum_l e(l) J(l) / sum_l e(l), over the given layers that ran and the last one, with the losses J(l) of
    `early_exit_losses` and the weights e(l) of `early_exit_weights` (Elhoushi et al. 2024, section 4.1.2).

    Args:
        model: a causal language model with whole layers as branches, also inside a wrapper.
        inputs: arguments of a forward by name, with labels.
        exits: layers to exit after, in 0..L-1, such as from `rotating_exits`. The last layer always counts.
        scale: e_scale, weight of the early exits relative to the last layer. The authors use 0.1 to 1.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM  # doctest: +SKIP
        >>> model = LlamaForCausalLM(LlamaConfig(use_cache=False))  # doctest: +SKIP
        >>> depth = sd.make_stochastic_(model, sd.layerskip(0.2), layers=["model.layers.*"])  # doctest: +SKIP
        >>> exits = sd.rotating_exits(len(depth.names), every=4, step=step)  # doctest: +SKIP
        >>> sd.early_exit_loss(model, batch, exits, scale=0.2).backward()  # doctest: +SKIP
    """
    weights = early_exit_weights(len(_decoder_layers(controller(model))), scale)
    # Those of weight 0 (layer 0 has it by the authors' formula) need not be computed.
    losses = early_exit_losses(model, inputs, [layer for layer in exits if layer != 0 and scale != 0])
    total = sum(weights[layer] for layer in losses)
    if not total:  # a single layer
        return losses[len(weights) - 1]
    return torch.stack([loss * (weights[layer] / total) for layer, loss in losses.items()]).sum()


def early_exit_losses(model: nn.Module, inputs: Mapping[str, Any], exits: Iterable[int]) -> dict[int, Tensor]:
    """The losses of exits after chosen layers, through the model's own norm and head, and of the whole model.

    The model runs once. For each exit, everything after the layers runs again on the hidden states after that layer,
    with the model's own loss. This part is checkpointed: the logits of an exit are freed at once and computed again in
    the backward, so those of several exits are never in memory together.

    A closed layer has no loss. With `granularity="sample"`, the samples for which it is closed do not count: their
    labels become -100.

    Args:
        model: a causal language model with whole layers as branches, in training or in evaluation mode, also inside a
            wrapper such as DistributedDataParallel. All layers of its decoder must be branches; give layers that should
            never be dropped a survival probability of 1.
        inputs: arguments of a forward by name, with labels, as the model's own `loss` needs them.
        exits: layers to exit after, in 0..L-1.

    Returns:
        Losses by layer, in ascending order, of the exits whose layers ran and of the last layer, L-1, which has the
        model's own loss.

    Raises:
        ValueError: if an exit is not a layer, the inputs have no labels, or not all layers of a decoder are branches.
    """
    depth = controller(model)
    layers = _decoder_layers(depth)
    wanted = sorted(_checked(exits, len(layers)))
    if inputs.get("labels") is None:
        raise ValueError("The inputs have no labels: without them the model computes no loss.")
    labels: Tensor = inputs["labels"]
    hidden: dict[int, tuple[Tensor, Tensor | None]] = {}

    def note(layer: nn.Module, _args: Any, output: Any, *, index: int) -> None:
        states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        gate = depth.passes.gate(index, states.shape[0], states.device, layer.training)
        if gate is CLOSED or (gate is not None and gate.num_open == 0):
            return
        own = None
        if gate is not None and gate.order is not None:
            own = labels.new_full(labels.shape, _IGNORED)
            is_open = gate.order[: gate.num_open]
            own[is_open] = labels[is_open]
            if not (own[:, 1:] != _IGNORED).any():
                return
        hidden[index] = states, own

    hooks = [layers[index].register_forward_hook(partial(note, index=index)) for index in wanted]
    try:
        last_loss = _loss(model(**inputs), model)
    finally:
        for hook in hooks:
            hook.remove()
    losses: dict[int, Tensor] = {}
    for index, (states, own) in sorted(hidden.items()):
        given = dict(inputs) if own is None else {**inputs, "labels": own}
        losses[index] = checkpoint(partial(_loss_behind, depth, layers[-1], given), states, use_reentrant=False)  # pyright: ignore
    losses[len(layers) - 1] = last_loss
    return losses


def early_exit_weights(num_layers: int, scale: float) -> list[float]:
    """LayerSkip's weights of the exits, before division by their sum.

    e(l) = e_scale * sum_{i=0..l} i for l < L-1, and e(L-1) = L - 1 + e_scale * sum_{i=0..L-2} i (Elhoushi et al. 2024,
    section 4.1.2). Later exits count more; the first layer counts 0.

    Args:
        num_layers: L.
        scale: e_scale, at least 0; with 0, only the last layer counts.

    Raises:
        ValueError: if there is no layer, or `scale` is negative.

    Example:
        >>> early_exit_weights(4, 0.5)
        [0.0, 0.5, 1.5, 4.5]
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"num_layers must be a whole number of at least 1, but is {num_layers!r}.")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
        raise ValueError(f"scale must be a number of at least 0, but is {scale!r}.")
    early = [scale * layer * (layer + 1) / 2 for layer in range(num_layers - 1)]
    return [*early, num_layers - 1 + scale * (num_layers - 1) * (num_layers - 2) / 2]


def rotating_exits(num_layers: int, *, every: int, step: int) -> list[int]:
    """LayerSkip's rotation: in each step every R-th layer has an exit, shifted by one layer per step.

    The layers l in 0..L-1 with (l - step) mod R = 0, and always the last (Elhoushi et al. 2024, section 4.1.2,
    C_rot,R). A step then costs at most L / R + 2 heads instead of L.

    Args:
        num_layers: L.
        every: R, at least 1.
        step: number of the training step.

    Raises:
        ValueError: if `num_layers` or `every` is below 1, or `step` below 0.

    Example:
        >>> [rotating_exits(6, every=3, step=step) for step in range(3)]
        [[0, 3, 5], [1, 4, 5], [2, 5]]
    """
    for name, value, least in (("num_layers", num_layers, 1), ("every", every, 1), ("step", step, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, but is {value!r}.")
    return [layer for layer in range(num_layers) if (layer - step) % every == 0 or layer == num_layers - 1]


def _loss_behind(depth: Controller, last: nn.Module, inputs: Mapping[str, Any], states: Tensor) -> Tensor:
    """The loss of the model whose last layer gives these hidden states; no layer runs."""

    def put(_layer: nn.Module, _args: Any, output: Any) -> Any:
        return type(output)([states, *output[1:]]) if isinstance(output, (tuple, list)) else states

    hook = last.register_forward_hook(put)
    try:
        with depth.gates([False] * len(depth.names)):
            return _loss(depth.root(**inputs), depth.root)
    finally:
        hook.remove()


def _loss(output: Any, model: nn.Module) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(f"{type(model).__name__} returns no loss for these inputs: it must return one as output.loss.")
    return loss


def _decoder_layers(depth: Controller) -> list[nn.Module]:
    """The layers of the decoder, all of which are branches."""
    stacks = {branch.name.rpartition(".")[0] for branch in depth.branches}
    if any(branch.kind != "layer" for branch in depth.branches) or len(stacks) != 1:
        raise ValueError(
            "Early exits need the layers of one decoder as the only branches: pass layers=['model.layers.*'], or the "
            "pattern of your model's layers, to make_stochastic_."
        )
    stack = depth.root.get_submodule(stacks.pop())
    own = {branch.module for branch in depth.branches}
    without = [name for name, layer in stack.named_children() if layer not in own]
    if without:
        raise ValueError(
            f"Early exits need all layers as branches, but {', '.join(without[:8])} of {len(list(stack.children()))} "
            "are none: give layers= that match all, with a survival probability of 1 for those that always run."
        )
    return list(stack.children())


def _checked(exits: Iterable[int], num_layers: int) -> set[int]:
    checked: set[int] = set()
    for layer in exits:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ValueError(
                f"An exit must be a layer in 0..{num_layers - 1}, but is {layer!r}. Layer {num_layers - 1} is the last."
            )
        checked.add(layer)
    return checked - {num_layers - 1}
