"""Makes a smaller, plain network from a trained one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, get_args

from torch import Tensor, nn

from stochastic_depth.cost import observed
from stochastic_depth.deploy.batches import Inputs, call_of
from stochastic_depth.deploy.branches import branches_with_gates
from stochastic_depth.deploy.check import Check
from stochastic_depth.deploy.choice import Order, dropping, forward_flops, num_parameters, removal_order
from stochastic_depth.deploy.fold import is_stochastic, remove_gates_, warn_of_scalars
from stochastic_depth.deploy.layer_stack import layer_stack_of, remove_layers_, warn_if_no_checkpoint
from stochastic_depth.deploy.undo import Snapshot
from stochastic_depth.retrofit import controller, make_stochastic_
from stochastic_depth.retrofit.apply import refuse_other_than_module
from stochastic_depth.retrofit.remembered import Call
from stochastic_depth.torch_private import child_dict


def subnetwork(
    model: nn.Module,
    keep: Sequence[int] | None = None,
    *,
    num_blocks: int | None = None,
    cost: float | None = None,
    parameters: float | None = None,
    order: Order = "last",
    calibration: Iterable[Any] | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """A smaller network made from a trained one, without some branches and their parameters; every shortcut stays.

    Kept branches count as in evaluation (the survival probability is folded into the weights, see `fold_`), so the
    outputs are those of the evaluated network whose other branches return zero. The result is a new, plain network;
    kept modules keep their names. Later BatchNorm layers still have the statistics of the whole network: see
    `recalibrate_batchnorm_`.

    If the branches are the whole layers of a transformers model (`layers=`), or of its encoder or decoder, removed
    layers leave the list and the configuration, and the others are renumbered. The result has its original class, and
    `save_pretrained` writes a plain checkpoint with fewer layers. A warning says if it would be loaded as another
    network, because the model's code depends on the number of a layer.

    A `Residual` becomes its shortcut. A block of another library becomes a `torch.fx.GraphModule` of the rest of its
    evaluation code, or an `nn.Identity` if nothing is left and it takes one argument. If later code may change the
    result in place, they return a copy.

    The last step checks the result on an example, as `fold_` does, against the evaluated model whose other branches
    return zero.

    Args:
        model: a stochastic model; it is not changed. One that was not trained with stochastic depth works too, with a
            warning, because it never ran without a branch in training.
        keep: indices of the branches to keep, in the controller's `names`. Or instead one budget:
        num_blocks: number of branches to keep.
        cost: largest share of the whole network's forward FLOPs to keep, in (0, 1].
        parameters: largest share of its parameters to keep, in (0, 1].
        order: which branches are removed first under a budget. "last": the last in the network. "survival": those with
            the lowest survival probability, later ones first if equal. "lesion": those whose absence changes the
            outputs least, by the squared difference on `calibration`.
        calibration: batches for "lesion": tensors, tuples that begin with one, or mappings of arguments.
        inputs: an example: the argument of a forward, several of them in a tuple or list, or a mapping of arguments by
            name. If a block's code depends on sizes or arguments, the result accepts calls like this one. None means an
            earlier call of the model; for `cost`, zeros of the image size in the model's attributes, or of 32x32
            pixels.

    Raises:
        ValueError: if not exactly one of `keep` and the budgets is given, `keep` is empty, has an index out of range or
            twice, a budget is below the smallest possible network, or a branch cannot be removed.
        RuntimeError: if the outputs of the result differ from those described above.

    Example:
        >>> import stochastic_depth as sd
        >>> net = sd.models.cifar_resnet(20)
        >>> depth = sd.make_stochastic_(net, sd.linear_decay(0.5))
        >>> small = sd.subnetwork(net, cost=0.6)
        >>> sum(isinstance(module, sd.Residual) for module in small.modules())
        5
    """
    refuse_other_than_module(model)
    given = {"keep": keep, "num_blocks": num_blocks, "cost": cost, "parameters": parameters}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"Give exactly one of {', '.join(given)}, but {' and '.join(names) or 'none'} is given.")
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(map(repr, get_args(Order)))}, but is {order!r}.")
    network = _stochastic_copy(model)
    branches = branches_with_gates(network)
    if all(branch.gated.survival_prob == 1 for branch in branches):
        warnings.warn(
            f"{type(model).__name__} was not trained with stochastic depth: without some of its branches it may be far "
            "less accurate.",
            stacklevel=2,
        )
    example = None if inputs is None else call_of(inputs)
    if keep is not None:
        kept = _checked(keep, len(branches))
    else:
        kept = sorted(_within_budget(network, num_blocks, cost, parameters, order, calibration, example))
    dropped = [index for index in range(len(branches)) if index not in kept]
    remembered = controller(model).calls if is_stochastic(model) else None
    context = partial(observed, branches[0].gated.passes, dropping(branches, dropped))
    check = Check(network, branches, inputs, remembered=remembered, context=context)
    check.warn_if_impossible("subnetwork", stacklevel=2)
    # A guess is good enough for a comparison, but not to specialize the code of blocks.
    calls = {} if check.origin == "guessed" else check.calls
    stack = layer_stack_of(network, branches, kept)
    if stack is None:
        scalars, network = remove_gates_(network, kept, calls, Snapshot(network))
        _drop_idle_relus_(network)
    else:
        names = {branches[index].found.name for index in kept}
        scalars, network = remove_gates_(network, range(len(branches)), calls, Snapshot(network))
        scalars = [scalar for scalar in scalars if scalar[0] in names]
        remove_layers_(stack)
        check.forget_blocks()  # The layers have new names.
    check.refuse_difference(network, "subnetwork")
    warn_of_scalars(scalars, stacklevel=3)
    if stack is not None and not scalars:
        warn_if_no_checkpoint(stack, network, check, stacklevel=3)
    return network


def branches_to_keep(
    model: nn.Module,
    *,
    num_blocks: int | None = None,
    cost: float | None = None,
    order: Order = "last",
    calibration: Iterable[Any] | None = None,
    inputs: Inputs | None = None,
) -> list[int]:
    """Indices of the branches that `subnetwork` keeps under a budget, most important first.

    The branch that would be removed last comes first.

    Args:
        model: a model with or without stochastic depth; it is not changed.
        num_blocks: number of branches to keep. Or instead:
        cost: largest share of the whole network's forward FLOPs to keep, in (0, 1].
        order: as in `subnetwork`.
        calibration: as in `subnetwork`.
        inputs: as in `subnetwork`.

    Raises:
        ValueError: if not exactly one budget is given, or it cannot be met.
    """
    refuse_other_than_module(model)
    if (num_blocks is None) == (cost is None):
        raise ValueError("Give exactly one of num_blocks and cost.")
    network, example = _stochastic_copy(model), None if inputs is None else call_of(inputs)
    return _within_budget(network, num_blocks, cost, None, order, calibration, example)


def _stochastic_copy(model: nn.Module) -> nn.Module:
    network = copy.deepcopy(model)
    if not is_stochastic(network):
        make_stochastic_(network, lambda num_branches: [1.0] * num_branches)
    return network


def _checked(keep: Sequence[int], num_branches: int) -> list[int]:
    if not isinstance(keep, Iterable):
        raise TypeError(f"keep must be a list of indices of branches, but is {keep!r}.")
    kept = list(keep)
    if not kept:
        raise ValueError(
            "keep is empty, but at least one branch must stay. To keep a number of branches, use num_blocks."
        )
    for index in kept:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(
                f"keep must contain indices, 0..{num_branches - 1}, but contains {index!r}. It is not a list of gates."
            )
        if not 0 <= index < num_branches:
            raise ValueError(f"keep must contain indices in 0..{num_branches - 1}, but contains {index}.")
    if len(set(kept)) != len(kept):
        raise ValueError(f"keep contains {next(index for index in kept if kept.count(index) > 1)} several times.")
    return sorted(kept)


def _within_budget(
    network: nn.Module,
    num_blocks: int | None,
    cost: float | None,
    parameters: float | None,
    order: Order,
    calibration: Iterable[Any] | None,
    example: Call | None,
) -> list[int]:
    branches = branches_with_gates(network)
    removal = removal_order(network, branches, order, calibration)
    if num_blocks is not None:
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 1 <= num_blocks <= len(branches):
            raise ValueError(f"num_blocks must be a whole number in 1..{len(branches)}, but is {num_blocks!r}.")
        return removal[len(branches) - num_blocks :][::-1]
    if cost is not None:
        call = (_guessed_example(network), {}) if example is None else example
        kept = forward_flops(network, branches[0].gated.passes, call).keep(cost, removal, branches)
    else:
        assert parameters is not None
        kept = num_parameters(network, branches).keep(parameters, removal, branches)
    return [index for index in reversed(removal) if index in kept]


def _guessed_example(model: nn.Module) -> tuple[Tensor]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size: Any = config.get("input_size", (3, 32, 32))[-1] if hasattr(config, "get") else 32
    size = getattr(model, "image_size", size)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d):
            return (module.weight.new_zeros(1, module.in_channels, size, size),)
        if isinstance(module, nn.Linear):
            return (module.weight.new_zeros(1, module.in_features),)
        if isinstance(weight, Tensor):
            break
    raise ValueError(f"cost counts FLOPs on an example: pass inputs that {type(model).__name__} accepts.")


def _drop_idle_relus_(network: nn.Module) -> None:
    """Remove a ReLU that follows another one after a block was dropped: it changes nothing."""
    for module in network.modules():
        if type(module) is nn.Sequential:
            _drop_idle_relus_in_(module, after_relu=False)


def _drop_idle_relus_in_(sequence: nn.Sequential, *, after_relu: bool) -> bool:
    """Whether the output of the sequence comes from a ReLU; `after_relu` says so for its input."""
    for name, child in list(child_dict(sequence).items()):  # repeated ones too
        if type(child) is nn.ReLU:
            if after_relu:
                setattr(sequence, name, nn.Identity())
            after_relu = True
        elif type(child) is nn.Sequential:
            after_relu = _drop_idle_relus_in_(child, after_relu=after_relu)
        elif type(child) is not nn.Identity:
            after_relu = False
    return after_relu
