"""`make_stochastic_`, `controller` and `restore_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stochastic_depth.copies import plain_class
from stochastic_depth.gate_draws import GateDraws, Granularity, Ranks
from stochastic_depth.gates import Draw
from stochastic_depth.residual import GatedBranch, Rescale, SkippedGrad, StochasticResidual
from stochastic_depth.retrofit.classes import Unannounced, restore_class_, swap_class_
from stochastic_depth.retrofit.controller import Controller
from stochastic_depth.retrofit.finding.branches import Branch, Found, Where
from stochastic_depth.retrofit.finding.find import find_branches
from stochastic_depth.retrofit.layers import GatedLayer, LayerDropPath, StochasticLayer, refuse_own_layerdrop
from stochastic_depth.retrofit.rewriting.functional import FUNCTIONAL
from stochastic_depth.retrofit.root import StochasticRoot
from stochastic_depth.retrofit.running.block import StochasticBlock
from stochastic_depth.retrofit.running.block_branches import BlockBranches
from stochastic_depth.retrofit.running.known_forms import KnownForms
from stochastic_depth.retrofit.running.masked_drop_path import DropPathUses, StochasticDropPath
from stochastic_depth.schedules import SCHEDULES, LayerSchedule, Schedule, Values, to_survival_probs
from stochastic_depth.torch_private import is_compiled

_CONTROLLER = "_stochastic_depth"
_BRANCH = "_stochastic_depth_branch"


def make_stochastic_(
    model: nn.Module,
    schedule: Schedule | Values | None = None,
    *,
    granularity: Granularity | None = None,
    rescale: Rescale | None = None,
    skipped_grad: SkippedGrad = "zero",
    draw: Draw = "bernoulli",
    ranks: Ranks = "agree",
    where: Where | None = None,
    layers: str | Sequence[str] | None = None,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Controller:
    """Add stochastic depth (Huang et al. 2016) to a model, in place. Dropped branches do not run.

    The branches are the model's drop paths with a rate above 0 (timm, torchvision, transformers, your own with
    `register_drop_path`) and, with a schedule, its `Residual`s. If you give a schedule and the model has neither, they
    are the residual additions in its modules' code. In training, nothing of a branch with a closed gate runs: no
    forward, no backward, no activations, no update of BatchNorm statistics. Parameter names and `state_dict` do not
    change; `restore_` removes stochastic depth. Print the result to see how each branch is treated.

    Args:
        model: the model, not yet wrapped or compiled.
        schedule: survival over depth, such as `linear_decay(0.5)`, or one survival probability per branch, in a list, a
            tuple, a numpy array or a tensor. None keeps the rates of the model's drop paths.
        granularity: "batch": one gate per mini-batch and branch (the paper). "sample": one per sample; a branch runs on
            floor or ceil of p * N of the N samples, with mean exactly p * N, all equally likely. None: "batch" with a
            schedule, else as in the model's drop paths.
        rescale: "eval": multiply a branch by p in evaluation (the paper). "train": by 1/p in training.
        "none": neither. None: "eval" with a schedule, its authors' choice for a `LayerSchedule`, and without a schedule
            as in the model's drop paths.
        skipped_grad: "zero": parameters of a branch that did not run get gradients of zero, so that momentum and weight
            decay still act on them (as in the authors' code and with masks). "none": `.grad` is left alone, and
            optimizers skip them. Not with `torch.optim.SGD(..., fused=True)` and momentum: once some parameters have
            had a gradient and others have not, PyTorch raises "expected Tensor as element ..., but got NoneType". Use
            `foreach=True` there.
        draw: "bernoulli": independent gates (the paper). "equal_cost": floor or ceil of the expected number of branches
            in every step, with each p_l unchanged; after `depth.set_costs(depth.cost(x))` nearly the same FLOPs, or
            with `measure=True` nearly the same time.
        ranks: "agree": the same gates on every rank. "decorrelate": different gates on each rank.
        where: which branches: a predicate (name, module) -> bool, or fnmatch patterns of their names. The schedule
            spans the selected branches.
        layers: fnmatch patterns of whole layers that are branches (LayerDrop); with a schedule, the only ones. A closed
            layer returns its hidden states, the first tensor argument. Its gate replaces the gates of the drop paths
            inside it, which still apply the scaling; without a schedule, it has their rate.
        inputs: arguments of an example forward, in order or by name. The model runs on them without lasting effects,
            and the branches are found as its code runs, in the order in which it reaches them. Use this for code that
            depends on shapes or other arguments and cannot be read without, and for models that register their modules
            in another order. Modules that the example does not call then have no branches.
        seed: seed of the gates. Global random states are neither read nor changed.

    Returns:
        The controller, which `controller(model)` returns too.

    Raises:
        ValueError: if an argument is not one of the allowed values, or the model has no branch, is already stochastic,
            wrapped or compiled, or fails on `inputs`.
        TypeError: if `schedule` is a single number, or `inputs` is a tensor.

    Example:
        >>> import stochastic_depth as sd
        >>> net = sd.models.cifar_resnet(20)
        >>> sd.make_stochastic_(net, sd.linear_decay(0.5))
        <Controller of 9 branches, expected depth 6.50>
    """
    for name, value, allowed in (
        ("granularity", granularity, get_args(Granularity)),
        ("rescale", rescale, get_args(Rescale)),
        ("skipped_grad", skipped_grad, get_args(SkippedGrad)),
        ("draw", draw, get_args(Draw)),
        ("ranks", ranks, get_args(Ranks)),
    ):
        if value not in allowed and not (value is None and name in ("granularity", "rescale")):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but is {value!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, but is {seed!r}.")
    refuse_other_than_module(model)
    if isinstance(inputs, Tensor):
        raise TypeError("inputs must be the arguments of a forward, such as inputs=[images], but is a tensor.")
    if inputs is not None and not isinstance(inputs, (tuple, list, Mapping)):
        raise TypeError(f"inputs must be the arguments of a forward, such as inputs=[images], but is {inputs!r:.80}.")
    _refuse_wrapped(model)
    _refuse_lazy(model)
    _refuse_stochastic(model)
    layers = [layers] if isinstance(layers, str) else layers
    if layers is not None and (
        not isinstance(layers, (tuple, list)) or not layers or not all(isinstance(each, str) for each in layers)
    ):
        raise TypeError(f"layers must be patterns of names, such as ['model.layers.*'], but is {layers!r:.80}.")
    if layers is not None or schedule is not None:
        refuse_own_layerdrop(model)
    found = find_branches(model, where, layers, inputs, with_schedule=schedule is not None)
    branches = found.branches
    for branch in branches:
        if isinstance(branch.module, Unannounced):
            raise ValueError(
                f"{branch.name}: fold_ has put a factor into the code of this {plain_class(branch.module).__name__}, "
                "which no gate can be added to. Use a copy of the model from before fold_, or load the weights into a "
                "new model."
            )
    survival_probs = _survival_probs(schedule, branches)
    draws = GateDraws(
        [branch.name for branch in branches],
        survival_probs,
        seed=seed,
        granularity=granularity or _default_granularity(branches, schedule),
        draw=draw,
        ranks=ranks,
    )
    if schedule is None:
        draws.own_draws = frozenset(range(len(branches)))
    forms = KnownForms()
    for index, branch in enumerate(branches):
        own = (draws, index, rescale or _own_rescale(branch, schedule), skipped_grad)
        if branch.kind == "layer":
            _make_layer_stochastic(branch, GatedLayer(*own, drop_paths=tuple(branch.drop_paths)))
        else:
            _make_stochastic(branch, GatedBranch(*own), found, forms, own_rate=schedule is None)
    rescales = dict.fromkeys(rescale or _own_rescale(branch, schedule) for branch in branches)
    made = Controller(
        model,
        branches,
        draws,
        rescale=" or ".join(rescales),
        skipped_grad=skipped_grad,
        notes=found.notes,
        over_time=_over_time(schedule, len(branches)),
        follows_depth=callable(schedule),
    )
    setattr(model, _CONTROLLER, made)
    # Last, so that it wraps the behavior of a root that is itself a branch or a block.
    swap_class_(model, StochasticRoot, joins=_BRANCH in model.__dict__)
    return made


def _make_stochastic(branch: Branch, gated: GatedBranch, found: Found, forms: KnownForms, *, own_rate: bool) -> None:
    if branch.key is None:
        swap_class_(branch.module, StochasticResidual)
        setattr(branch.module, _BRANCH, gated)
        return
    block, path = branch.module, branch.key[0]
    if _BRANCH not in block.__dict__:
        swap_class_(block, StochasticBlock)
        own = BlockBranches(
            branch.block_name,
            found.drop_paths[block],
            found.known[block],
            forms,
            own_forward=block.__dict__.pop("forward", None),
            by_example=found.example is not None,
        )
        setattr(block, _BRANCH, own)
    own: BlockBranches = getattr(block, _BRANCH)
    own.add_branch(branch.key, gated, branch.parts)
    if own_rate and branch.rule is not None:
        own.rules[branch.key] = branch.rule
    if path and path != FUNCTIONAL:
        drop_path = block.get_submodule(path)
        if _BRANCH not in drop_path.__dict__:
            swap_class_(drop_path, StochasticDropPath)
            setattr(drop_path, _BRANCH, DropPathUses(branch.rule, own_rate))
        getattr(drop_path, _BRANCH).gated.append((block, gated))


def _make_layer_stochastic(branch: Branch, gated: GatedLayer) -> None:
    for module, behavior in (
        (branch.module, StochasticLayer),
        *((inner, LayerDropPath) for inner in branch.drop_paths),
    ):
        swap_class_(module, behavior)
        setattr(module, _BRANCH, gated)


def _own_rescale(branch: Branch, schedule: Schedule | Values | None) -> Rescale:
    if isinstance(schedule, LayerSchedule):
        return schedule.rescale
    return "eval" if schedule is not None or branch.rule is None else branch.rule.rescale


def _over_time(
    schedule: Schedule | Values | None, num_branches: int
) -> tuple[list[float], Callable[[float], float]] | None:
    if not isinstance(schedule, LayerSchedule) or schedule.over_time is None:
        return None
    return schedule.over_depth(num_branches), schedule.over_time


def _default_granularity(branches: Sequence[Branch], schedule: Schedule | Values | None) -> Granularity:
    if schedule is not None:
        return "batch"
    granularities: set[Granularity] = {branch.rule.granularity for branch in branches if branch.rule is not None}
    if len(granularities) > 1:
        raise ValueError(
            "Some drop paths of the model gate single samples, others the whole mini-batch: pass granularity='sample' "
            "or 'batch' for all of them."
        )
    return next(iter(granularities))


def controller(model: nn.Module) -> Controller:
    """The controller of a stochastic model, also after deepcopy, `torch.load`, or inside a wrapper.

    Raises:
        TypeError: if it is not a module.
        ValueError: if the model is not stochastic, or contains several stochastic models.
    """
    refuse_other_than_module(model)
    found = [module.__dict__[_CONTROLLER] for module in model.modules() if _CONTROLLER in module.__dict__]
    if len(found) == 1:
        return found[0]
    if not found:
        refuse_part(model)
    state = f"holds {len(found)} controllers" if found else "is not stochastic: call make_stochastic_ first"
    raise ValueError(f"This {type(model).__name__} {state}.")


def refuse_part(model: nn.Module) -> None:
    """Raise if a module without a controller has gates.

    Raises:
        ValueError: if it has.
    """
    if any(_BRANCH in module.__dict__ for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} is a part of a stochastic model, or a copy of one: use the whole model, and "
            "restore_ it before copying."
        )


def restore_(model: nn.Module) -> None:
    """Remove stochastic depth: the model is as before `make_stochastic_`, with its current weights.

    Raises:
        ValueError: if the model is not stochastic.
    """
    made = controller(model)
    made.detach()
    for module in model.modules():
        own = module.__dict__.keys() & {_BRANCH, _CONTROLLER}
        if own:
            restore_class_(module)
            forward = getattr(module.__dict__.get(_BRANCH), "own_forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        for name in own:
            delattr(module, name)


def _survival_probs(schedule: Schedule | Values | None, branches: Sequence[Branch]) -> list[float]:
    if schedule is None:
        return [1 - branch.rule.drop_rate for branch in branches if branch.rule is not None]
    num_branches = len(branches)
    if isinstance(schedule, (int, float)) or getattr(schedule, "ndim", None) == 0:
        raise TypeError(
            f"schedule must be a schedule, such as linear_decay({schedule}) or uniform({schedule}), or one survival "
            f"probability per branch, but is the number {schedule}. (A drop rate r is a survival probability of 1 - r.)"
        )
    if isinstance(schedule, str):
        raise TypeError(f"schedule must be a schedule, such as linear_decay(0.5), but is the name {schedule!r}.")
    name = next((name for name, known in SCHEDULES.items() if known is schedule), None)
    if name is not None:
        raise TypeError(f"schedule must be a schedule, such as {name}(0.5), but is {name} itself.")
    survival_probs = to_survival_probs(schedule(num_branches) if callable(schedule) else schedule)
    if len(survival_probs) != num_branches:
        raise ValueError(
            f"The schedule must give one survival probability per branch, {num_branches} in all, "
            f"but gives {len(survival_probs)}."
        )
    return survival_probs


def refuse_other_than_module(model: Any) -> None:
    """Raise if a model is none, such as the controller of one.

    Raises:
        TypeError: if it is not a module.
    """
    if not isinstance(model, nn.Module):
        given = "a Controller: pass the model itself" if isinstance(model, Controller) else f"{model!r:.80}"
        raise TypeError(f"model must be a torch.nn.Module, but is {given}.")


def _refuse_wrapped(model: nn.Module) -> None:
    order = "Call make_stochastic_ on the plain model first, and wrap or compile it afterward."
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, (DataParallel, DistributedDataParallel)) or kind.startswith(("FSDP", "FullySharded")):
            raise ValueError(f"The model is wrapped in {kind}. {order}")
    if is_compiled(model):
        raise ValueError(f"The model is compiled. {order}")


def _refuse_lazy(model: nn.Module) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{name} has no size yet: run the model once before make_stochastic_.")


def _refuse_stochastic(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _CONTROLLER in module.__dict__ or _BRANCH in module.__dict__:
            raise ValueError(
                f"The model is already stochastic ({name or 'its root'}). Change it with controller(model)."
                "set_survival_probs, or call restore_(model) first."
            )
