"""Removes stochastic depth for good: folds survival probabilities into the weights, and removes dropped branches."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Literal, cast

from torch import nn

from stochastic_depth.copies import evaluating_
from stochastic_depth.cost import all_gates_open
from stochastic_depth.deploy.affine import (
    Calls,
    Holder,
    NotAffineError,
    last_affine,
    last_child,
    multiply_,
    num_places,
    parameter_of,
)
from stochastic_depth.deploy.batches import Inputs
from stochastic_depth.deploy.blocks import (
    holders,
    is_identity,
    replaced_,
    takes_one_argument,
    without_branches,
    without_layer,
)
from stochastic_depth.deploy.branches import BranchWithGate, branches_with_gates
from stochastic_depth.deploy.check import Check
from stochastic_depth.deploy.in_place import insert_copies_
from stochastic_depth.deploy.scalars import (
    BranchFactors,
    Scale,
    ScaledBlock,
    ScaledLayer,
    ScaledOutput,
    ScaledResidual,
)
from stochastic_depth.deploy.undo import Snapshot
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit import controller, restore_
from stochastic_depth.retrofit.apply import refuse_other_than_module, refuse_part
from stochastic_depth.retrofit.classes import swap_class_
from stochastic_depth.retrofit.remembered import Call
from stochastic_depth.retrofit.rewriting.sums import Key


def fold_(model: nn.Module, *, inputs: Inputs | None = None) -> None:
    """Remove stochastic depth from a trained model, in place, without changing what it computes in evaluation.

    With `rescale="eval"`, a branch is multiplied by p in evaluation (Huang et al. 2016). This factor moves into the
    weights and biases of the branch's last affine operations: BatchNorm, LayerNorm, LayerScale, convolution or linear.
    The other rescalings have no factor, so stochastic depth is only removed. Afterward the model has its original
    classes and the cost of constant depth, and its `state_dict` loads into a plain model.

    If a learned gate follows these operations, as in squeeze-and-excitation, its first weights are divided by the
    factor, so that it does not see it. In a whole layer with drop paths inside, each of their branches has the factor.
    If a branch does not end in an affine operation, or other code uses its last weights too, its factor stays as a
    scalar in the model's code, and a warning names the branch and the reason. The `state_dict` of such a model does not
    contain this factor.

    Outputs are the same up to rounding. In a precision below float32 the weights themselves are rounded: fold first,
    then convert. The last step checks the result: the model runs on an example in evaluation, twice before and twice
    after, without gradients. Training modes, buffers, attributes and random states stay as they are, but your hooks
    run. The example is `inputs`, or a call of the model since `make_stochastic_` (two samples of its first forward in
    each mode, kept in memory only), or else random numbers of a likely shape. If no example runs, a warning says that
    nothing was checked.

    Args:
        model: a stochastic model, in either mode. A model that is not stochastic stays as it is, with a warning.
        inputs: an example: the argument of a forward, several of them in a tuple or list, or a mapping of arguments by
            name.

    Raises:
        ValueError: if a factor can go neither into weights nor into the code, or the model is a part of a stochastic
            model; it is then unchanged.
        RuntimeError: if the outputs would change; the model is then unchanged.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> net = sd.models.cifar_resnet(20)
        >>> depth = sd.make_stochastic_(net, sd.linear_decay(0.5))
        >>> x = torch.randn(2, 3, 32, 32)
        >>> before = net.eval()(x)
        >>> sd.fold_(net)
        >>> torch.allclose(net(x), before, atol=1e-5), type(net.groups[0][0].residual).__name__
        (True, 'Residual')
    """
    refuse_other_than_module(model)
    if not is_stochastic(model):
        refuse_part(model)
        warnings.warn(
            f"{type(model).__name__} is not stochastic: there is nothing to fold. (fold_ comes after training, and "
            "before restore_.)",
            stacklevel=2,
        )
        return
    branches = branches_with_gates(model)
    check = Check(model, branches, inputs)
    if any(branch.test_factor != 1 for branch in branches):
        check.warn_if_impossible("fold_", stacklevel=2)
    before = _snapshot(model)
    try:
        kept, _ = remove_gates_(model, range(len(branches)), check.calls, before)
        check.refuse_difference(model, "fold_")
    except BaseException:
        before.put_back_()
        raise
    warn_of_scalars(kept, stacklevel=3)


def convert_rescale_(model: nn.Module, rescale: Literal["eval", "train"], *, inputs: Inputs | None = None) -> None:
    """Convert the weights of a stochastic model from one scaling convention to the other, in place.

    The paper (`rescale="eval"`) multiplies a branch by p in evaluation; drop path (`"train"`) multiplies it by 1/p in
    training. To convert, the branch's last affine operations are multiplied by p on the way to `"train"`, and divided
    by it on the way back. The model computes the same as before, in training and in evaluation. The optimizer's
    momentum is not converted: create a new optimizer.

    A branch whose factor cannot go into weights (see `fold_`) keeps its convention, with a warning. The result is
    checked on an example as in `fold_`, in evaluation and with every gate open.

    Args:
        model: a stochastic model.
        rescale: the new convention.
        inputs: an example, see `fold_`.

    Raises:
        RuntimeError: if the outputs would change; the model is then unchanged.
        ValueError: if the model is not stochastic, the convention is not one of the two, or a branch has the convention
            "none", which has no factor to convert; the model is then unchanged.

    Example:
        >>> import stochastic_depth as sd
        >>> net = sd.models.cifar_resnet(20)
        >>> depth = sd.make_stochastic_(net, sd.uniform(0.8))
        >>> sd.convert_rescale_(net, "train")
    """
    if rescale not in ("eval", "train"):
        raise ValueError(f"rescale must be 'eval' or 'train', but is {rescale!r}.")
    depth = controller(model)
    branches = branches_with_gates(model)
    if without := [branch.found.name for branch in branches if branch.gated.rescale == "none"]:
        raise ValueError(
            f"{len(without)} branches have rescale 'none' ({without[0]}, ...): neither training nor evaluation has a "
            f"factor to move. To continue training with one, pass rescale={rescale!r} to make_stochastic_."
        )
    passes = depth.passes
    open_gates = functools.partial(all_gates_open, passes)
    checks = [(Check(model, branches, inputs, context=context), context) for context in (nullcontext, open_gates)]
    if any(branch.gated.rescale != rescale and branch.gated.survival_prob != 1 for branch in branches):
        checks[0][0].warn_if_impossible("convert_rescale_", stacklevel=2)
    before = _snapshot(model)
    left: list[tuple[str, str, NotAffineError]] = []
    try:
        for branch in branches:
            if branch.gated.rescale == rescale:
                continue
            p = branch.gated.survival_prob
            if p != 1:
                try:
                    parameters = last_affine(model, branch, checks[0][0].calls)
                except NotAffineError as reason:
                    left.append((branch.found.name, branch.gated.rescale, reason))
                    continue
                before.keep_values(parameter_of(holder) for holder in parameters)
                multiply_(parameters, p if rescale == "train" else 1 / p)
            branch.gated.rescale = rescale
        depth.note_rescales([branch.gated.rescale for branch in branches])
        for check, context in checks:
            check.refuse_difference(model, "convert_rescale_", context=context)
    except BaseException:
        before.put_back_()
        raise
    for name, convention, reason in left:
        warnings.warn(f"{name} stays in the convention {convention!r}: {reason}.", stacklevel=2)


def _snapshot(model: nn.Module) -> Snapshot:
    return Snapshot(model, [controller(model), *(branch.gated for branch in branches_with_gates(model))])


def warn_of_scalars(kept: Sequence[tuple[str, float, str]], *, stacklevel: int) -> None:
    """Warn about branches whose factor stays a scalar, with the factor and the reason."""
    for name, p, reason in kept:
        warnings.warn(
            f"The survival probability {p:g} of {name} cannot go into weights: {reason}. It stays as a scalar in the "
            "model's code, which its state_dict does not contain.",
            stacklevel=stacklevel,
        )


def is_stochastic(model: nn.Module) -> bool:
    """Whether a model, or what it wraps, has a controller."""
    return any("_stochastic_depth" in module.__dict__ for module in model.modules())


def remove_gates_(
    model: nn.Module, keep: Collection[int], calls: Calls, before: Snapshot
) -> tuple[list[tuple[str, float, str]], nn.Module]:
    """Remove stochastic depth: fold the factors of the kept branches into their weights, and remove the other branches.

    Args:
        model: the stochastic model; it is changed.
        keep: indices of the branches to keep.
        calls: example calls of blocks of other libraries; may be empty.
        before: snapshot to restore if anything fails; it also keeps values that change.

    Returns:
        Branches whose factor stays a scalar, each with the factor and the reason; and the model, which is a new object
        only if its root itself was a branch.

    Raises:
        ValueError: if a branch cannot be dropped, or a factor kept; the model is then unchanged.
    """
    modes = {module: module.training for module in model.modules()}
    branches = branches_with_gates(model)
    weights: list[tuple[list[Holder], float]] = []
    scalars: dict[BranchWithGate, str] = {}
    for index in keep:
        branch = branches[index]
        if branch.test_factor != 1:
            try:
                weights.append((last_affine(model, branch, calls), branch.test_factor))
            except NotAffineError as reason:
                scalars[branch] = str(reason)
    dropped = [branch for index, branch in enumerate(branches) if index not in keep]
    children = _last_children(model, dropped, list(scalars), calls)
    left = [branch for branch in scalars if branch not in children]
    evaluating_(model)  # Keep the evaluation code of blocks.
    try:
        replacements, in_code = _replacements(model, dropped, left, calls)
    finally:
        for module, training in modes.items():
            module.training = training
    for block, made in replacements.items():
        for module in made.modules():
            if module not in modes:
                module.training = block.training
    # Nothing has been changed so far, and nothing fails from here on.
    restore_(model)
    for parameters, factor in weights:
        before.keep_values(parameter_of(holder) for holder in parameters)
        multiply_(parameters, factor)
    for branch, (child, path) in children.items():
        child.register_forward_hook(ScaledOutput(branch.test_factor, path))
    for block, scaled in in_code.items():
        swap_class_(block, ScaledBlock)
        block._branch_factors = scaled  # pyright: ignore
    for branch in left:
        found = branch.found
        if found.kind == "layer" and not found.drop_paths:
            _keep_scalar_(found.module, ScaledLayer, branch.test_factor)
        elif found.kind == "sum" and found.key is None and isinstance(found.module, Residual):
            _keep_scalar_(found.module, ScaledResidual, branch.test_factor)
    root = model
    for module, new in replacements.items():
        for made in replacements.values():  # a replacement may contain another block
            replaced_(made, module, new)
        root = replaced_(root, module, new)
    return [(branch.found.name, branch.test_factor, reason) for branch, reason in scalars.items()], root


def _keep_scalar_(module: nn.Module, behavior: type[nn.Module], factor: float) -> None:
    if type(module) is Residual and behavior is ScaledResidual:
        module.__class__ = ScaledResidual
    else:
        swap_class_(module, behavior)
    module.branch_factor = factor  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def _replacements(
    model: nn.Module, dropped: list[BranchWithGate], scaled: list[BranchWithGate], calls: Calls
) -> tuple[dict[nn.Module, nn.Module], dict[nn.Module, BranchFactors]]:
    """Replacements for modules, and blocks that have factors in their code instead."""
    new: dict[nn.Module, nn.Module] = {}
    dropped_keys: dict[nn.Module, set[Key]] = {}
    factors: dict[nn.Module, dict[Key, float]] = {}
    drop_paths: dict[nn.Module, tuple[str, ...]] = {}
    for branch in dropped:
        found = branch.found
        if found.treatment == "mask":
            raise ValueError(f"{found.name} cannot be taken out: {found.cause}.")
        if found.key is not None:
            dropped_keys.setdefault(found.module, set()).add(found.key)
            drop_paths[found.module] = branch.drop_paths
        elif found.kind == "layer":
            new[found.module] = _without_layer(model, found.module, _first(calls.get(found.module)))
        else:
            new[found.module] = _without_branch(cast(Residual, found.module))
    own = {branch: _own_drop_paths(model, branch) for branch in scaled}
    in_code = {branch.found.module for branch in scaled if branch.found.key is not None and not own[branch]}
    factors_of_blocks: dict[nn.Module, BranchFactors] = {}
    for branch in scaled:
        block, key = branch.found.module, branch.found.key
        if key is not None and block in dropped_keys:
            factors.setdefault(block, {})[key] = branch.test_factor
        elif key is not None and block in in_code:
            made = factors_of_blocks.setdefault(block, BranchFactors(branch.drop_paths, {}))
            made.factors[key] = branch.test_factor
        else:
            new.update({drop_path: Scale(branch.test_factor) for drop_path in own[branch]})
    for block, paths in drop_paths.items():
        try:
            made = without_branches(block, paths, dropped_keys[block], factors.get(block, {}), _first(calls.get(block)))
        except ValueError as error:
            name = next(branch.found.block_name for branch in dropped if branch.found.module is block)
            raise ValueError(f"{name or 'the model'}: {error}") from error
        is_idle = is_identity(made) and _is_alone(model, block) and takes_one_argument(block)
        new[block] = nn.Identity() if is_idle else made
    insert_copies_(model, new)
    return new, factors_of_blocks


def _first(calls: Sequence[Call] | None) -> Call | None:
    return calls[0] if calls else None


def _last_children(
    model: nn.Module,
    dropped: Sequence[BranchWithGate],
    scaled: Sequence[BranchWithGate],
    calls: Calls,
) -> dict[BranchWithGate, tuple[nn.Module, tuple[int, ...]]]:
    """For other libraries' blocks that keep all branches: the children whose outputs can take the factor."""
    changed = {branch.found.module for branch in dropped}
    children: dict[BranchWithGate, tuple[nn.Module, tuple[int, ...]]] = {}
    for branch in scaled:
        if branch.found.key is not None and branch.found.module not in changed:
            try:
                children[branch] = last_child(model, branch, calls)
            except NotAffineError:
                continue
    return children


def _without_layer(model: nn.Module, layer: nn.Module, call: Call | None) -> nn.Module:
    is_alone = _is_alone(model, layer)
    if is_alone and takes_one_argument(layer):
        return nn.Identity()
    try:
        return without_layer(layer, call)
    except ValueError:
        if not is_alone:
            raise
        return nn.Identity()  # Enough if the Sequential itself calls it; it takes one argument.


def _is_alone(model: nn.Module, module: nn.Module) -> bool:
    """Whether only Sequentials hold a module, so that only its forward is used."""
    return all(type(parent).forward is nn.Sequential.forward for parent, _ in holders(model, module))


def _own_drop_paths(model: nn.Module, branch: BranchWithGate) -> tuple[nn.Module, ...]:
    """The drop paths that multiply only this branch, so that a scalar can replace them."""
    found = branch.found
    if found.kind == "layer":
        return found.drop_paths
    if found.key is None:
        return () if isinstance(found.module, Residual) else (found.module,)
    path = found.key[0]
    known: tuple[Key, ...] = found.module._stochastic_depth_branch.known  # pyright: ignore
    if not path or sum(other == path for other, _ in known) > 1:
        return ()
    drop_path = found.module.get_submodule(path)
    return (drop_path,) if num_places(model, drop_path) == num_places(model, found.module) else ()


def _without_branch(residual: Residual) -> nn.Module:
    if residual.shortcut is None or type(residual.shortcut) is nn.Identity:
        return nn.Identity()
    # The shortcut keeps its name, and with it those of its parameters.
    return nn.Sequential(OrderedDict(shortcut=residual.shortcut))
