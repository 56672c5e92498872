"""Stand-ins for a block: the same code on private state, so that running it leaves no trace on the block.

A stand-in shares nothing that a forward may change: attributes are copied one level deep, buffers are cloned, hooks are
left out, and parameters are either the block's own or random. Random ones are better for a comparison, because a branch
that contributes nothing at initialization (a LayerScale of zero) would hide differences.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from types import GeneratorType
from typing import Any, cast

import torch
from torch import Tensor, nn

from stochastic_depth.copies import own_class
from stochastic_depth.random_states import seed_everything
from stochastic_depth.retrofit.classes import Unannounced
from stochastic_depth.retrofit.code.code_names import names_in_code, with_inlined
from stochastic_depth.retrofit.code.own_forward import bound_anew, own_forward
from stochastic_depth.retrofit.code.places import attribute_of
from stochastic_depth.retrofit.code.reads import written_parameters
from stochastic_depth.retrofit.code.user_data import copied, has_no_data, private_copy
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.layouts import in_order, order_of
from stochastic_depth.retrofit.recording.scripted import Scripted
from stochastic_depth.retrofit.rules import is_drop_path
from stochastic_depth.torch_private import (
    HOOKS,
    TENSORS_AND_CHILDREN,
    BatchNorm,
    buffer_dict,
    call_instead,
    call_with_own_hooks,
    child_dict,
    parameter_dict,
    pre_hook_dict,
    without_torch_function,
)

# Larger parameters are used as they are, unless they are zero: a stand-in should not take the memory of a large block.
_MAX_RANDOM = 2**16


def stand_in(
    block: nn.Module, inlined: Collection[str] = (), *, own_parameters: bool = False, own_values: bool = False
) -> nn.Module:
    """A module that runs the block's code on private state.

    Drop paths inside return their input, and BatchNorm uses its running statistics.

    Args:
        block: the block, plain or stochastic.
        inlined: paths of the children whose code counts as the block's.
        own_parameters: whether the block's parameters are used, which then receive gradients.
        own_values: whether other parameters with the same values are used, instead of random ones.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor | None] = {}
    written = {id(parameter) for parameter in written_parameters(block)}
    own_code = with_inlined(block, inlined)

    def parameter_of(parameter: nn.Parameter) -> Tensor:
        if id(parameter) not in tensors:
            made = parameter
            if not own_parameters:
                data = _data_of(parameter, clone=id(parameter) in written)
                made = nn.Parameter(data if own_values else _awake(data, generator), parameter.requires_grad)
                _tell_as(made, parameter)
            tensors[id(parameter)] = made
        return cast(Tensor, tensors[id(parameter)])

    def buffer_of(buffer: Tensor) -> Tensor:
        if id(buffer) not in tensors:
            data = torch.zeros(buffer.shape, dtype=buffer.dtype) if has_no_data(buffer) else buffer.detach().clone()
            if not (own_parameters or own_values) and data.is_floating_point() and not data.any():
                data = uniform(data.shape, generator).to(data.device, data.dtype)
            _tell_as(data, buffer)
            tensors[id(buffer)] = data
        return cast(Tensor, tensors[id(buffer)])

    def module_of(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            made[id(module)] = Scripted(module if own_parameters else copy.deepcopy(module), quiet=True)
            return made[id(module)]
        inner = child_dict(module).get("_orig_mod")
        if inner is not None and type(module).__name__ == "OptimizedModule":
            return module_of(inner)
        plain = own_class(module)
        kind = _passing(plain) if is_drop_path(module) else plain
        new = made[id(module)] = object.__new__(kind)
        new.__dict__.update(copied(module.__dict__))
        for name, value in new.__dict__.items():
            if isinstance(value, GeneratorType) and name in names_in_code(plain)[0]:
                raise TraceError(
                    f"it may advance the generator {name} of a {plain.__name__}, of which there is no copy"
                )
        own = new.__dict__.pop("_stochastic_depth_branch", None)
        if own is not None:
            # Rewritten code asks for it.
            new.__dict__["_stochastic_depth_branch"] = None
        new.__dict__.pop("_stochastic_depth", None)
        if getattr(plain, "gradient_checkpointing", None) is not None:
            # Layers of transformers checkpoint their own forward; the checkpointed code runs here.
            new.__dict__["gradient_checkpointing"] = False
        for name in HOOKS:
            new.__dict__[name] = OrderedDict[Any, Any]()
        for number, hook in pre_hook_dict(module).items():
            if _makes_weight(hook, module):
                pre_hook_dict(new)[number] = hook
        is_norm = isinstance(module, BatchNorm) and module.track_running_stats
        # Noise that `quiet` does not know, such as that of Python's generator, is the same in all runs of a child.
        call = _call_in_evaluation if is_norm else call_with_own_hooks
        seed = _nothing if module in own_code else functools.partial(seed_everything, 0)
        call_instead(new, functools.partial(call, new, seed))
        new.__dict__["_parameters"] = {
            name: None if value is None else parameter_of(value) for name, value in parameter_dict(module).items()
        }
        new.__dict__["_buffers"] = {
            name: None if value is None else buffer_of(value) for name, value in buffer_dict(module).items()
        }
        new.__dict__["_modules"] = {
            name: None if value is None else module_of(value) for name, value in child_dict(module).items()
        }
        if hasattr(own, "own_forward"):
            new.__dict__["forward"] = own_forward(module, new)
        return new

    root = module_of(block)
    for new in made.values():
        if not isinstance(new, Scripted):
            own = new.__dict__
            own.update({name: bound_anew(own[name], made) for name in own.keys() - _NOT_COPIED})
    return root


def _makes_weight(hook: Any, module: nn.Module) -> bool:
    """Whether a hook computes a weight of its module before each call: weight_norm, spectral_norm, pruning, EqualLR."""
    name = attribute_of(hook, "name")
    is_named = isinstance(name, str) and any(key.startswith(f"{name}_") for key in parameter_dict(module))
    return is_named or type(hook).__module__.startswith("torch.nn.utils")


def _nothing() -> None:
    pass


def _call_in_evaluation(norm: nn.Module, before_forward: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
    """Call a BatchNorm with its running statistics, whatever mode the block's code sees."""
    training, norm.__dict__["training"] = norm.training, False
    try:
        return call_with_own_hooks(norm, before_forward, *args, **kwargs)
    finally:
        norm.__dict__["training"] = training


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Context in which the modules of a model have copies of their attributes, which code may change."""
    memo: dict[int, Any] = {}
    # The attributes of scripted modules are fixed.
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(module, dict(module.__dict__), dict(buffer_dict(module))) for module in modules]
    for module, own, _ in before:
        module.__dict__.update({n: private_copy(v, memo) for n, v in own.items() if n not in _NOT_COPIED})
    try:
        yield
    finally:
        for module, own, buffers in before:
            buffer_dict(module).clear()
            buffer_dict(module).update(buffers)
            module.__dict__.clear()
            module.__dict__.update(own)


_NOT_COPIED = {*TENSORS_AND_CHILDREN, "_non_persistent_buffers_set", "training", *HOOKS}


@functools.cache
def _passing(plain: type[nn.Module]) -> type[nn.Module]:
    def forward(_self: nn.Module, x: Any, *_args: Any, **_kwargs: Any) -> Any:
        return x

    return cast("type[nn.Module]", type(plain.__name__, (Unannounced, plain), {"forward": forward}))


def _data_of(parameter: nn.Parameter, *, clone: bool) -> Tensor:
    if has_no_data(parameter):
        return parameter
    return parameter.detach().clone() if clone else parameter.detach()


def _tell_as(new: Tensor, original: Tensor) -> None:
    """Give a tensor what code may have set on another one, and its class of parameters."""
    vars(new).update(vars(original))
    if isinstance(original, nn.Parameter) and type(new) is nn.Parameter is not type(original):
        with suppress(TypeError):  # of another layout, as classes of quantized weights
            new.__class__ = type(original)


def _awake(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values with a parameter's form; the parameter's own values if it is large and not zero."""
    plain = type(tensor) is Tensor and not has_no_data(tensor)
    if plain and (not tensor.is_floating_point() or (tensor.numel() > _MAX_RANDOM and bool(tensor.any()))):
        return tensor
    device = tensor.device if not has_no_data(tensor) else torch.device("cpu")
    values = uniform(tensor.shape, generator)
    if tensor.numel() == max(tensor.shape, default=1):
        values = values + 0.5  # gains, biases, scales
    else:
        values = (2 * values - 1) * math.sqrt(3 * tensor.shape[0] / tensor.numel())
    return values.to(device, tensor.dtype)


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform random numbers, even under `quiet`."""
    with without_torch_function():
        return torch.empty(shape).uniform_(generator=generator)


def sample_leaf(value: Any, rows: Tensor | None) -> Any:
    """A private copy of an argument: some of its samples, or all of them.

    Args:
        value: the argument.
        rows: (n,) indices of samples; None for all of them.
    """
    if not isinstance(value, Tensor):
        return value
    if has_no_data(value):
        shape = value.shape if rows is None else (len(rows), *value.shape[1:])
        data = uniform([int(size) for size in shape], torch.Generator().manual_seed(2))
        value_like = data.to(value.dtype)
        return value_like.requires_grad_(value.requires_grad)
    data = value.detach()
    data = data.clone() if rows is None else _different(_numbers(data.index_select(0, rows.to(data.device))))
    if rows is not None and (order := order_of(value)) is not None:
        data = in_order(data, order)  # Sums have the order of their first operand.
    if isinstance(value, nn.Parameter):
        data = nn.Parameter(data, requires_grad=False)
    _tell_as(data, value)
    return data.requires_grad_(value.requires_grad) if data.is_floating_point() or data.is_complex() else data


def _numbers(samples: Tensor) -> Tensor:
    """The samples, with 0 for NaN and infinity: a mask does not remove those of a bad sample. Masks have -infinity."""
    is_plain = samples.layout is torch.strided and samples.is_floating_point()
    return samples.masked_fill(samples.isnan() | samples.isposinf(), 0) if is_plain else samples


def _different(samples: Tensor) -> Tensor:
    """The samples, made different from each other if their values can be changed a little.

    On equal samples, code that mixes samples would not be noticed.
    """
    if samples.dtype is torch.bool and (samples.all() or not samples.any()):
        return samples ^ (uniform(samples.shape, torch.Generator().manual_seed(3)) < 0.25).to(samples.device)
    if samples.dtype in _WHOLE_NUMBERS and samples.layout is torch.strided and samples.numel():
        return _told_apart(samples) if (samples == samples[:1]).all() else samples
    if (
        samples.layout is not torch.strided
        or not samples.is_floating_point()
        or len(samples) < 2
        or samples[0].numel() == 0
    ):
        return samples
    flat = samples.reshape(len(samples), -1).double().nan_to_num()
    if torch.pdist(flat[:, :4096].cpu()).min() > 0:
        return samples
    # Not infinite values or their substitutes, as in an attention mask.
    ordinary = samples.abs() < _LARGE
    generator = torch.Generator().manual_seed(3)
    noise = (2 * uniform(samples.shape, generator) - 1).to(samples.device, samples.dtype)
    scale = float(samples[ordinary].double().std()) if int(ordinary.sum()) > 1 else 0.0
    return torch.where(ordinary, samples + noise * (scale if scale > 0 else 1.0), samples)


_WHOLE_NUMBERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _told_apart(samples: Tensor) -> Tensor:
    """Equal samples of whole numbers or masks made different, without values that none of them has or that are larger.

    The largest value, or the last one of a mask, is in the first sample only; the smallest is in the second only, or
    the first one of a mask is not.
    """
    first = torch.arange(len(samples), device=samples.device).view(-1, *[1] * (samples.dim() - 1))
    if samples.dtype is torch.bool:
        if samples.dim() == 1:
            return samples
        rank = samples.cumsum(-1)
        num = rank[..., -1:]
        is_last, is_first = (rank == num) & (num > 1), (rank == 1) & (num > 2)
        return samples & ~(is_last & (first != 0)) & ~(is_first & (first == 1))
    low, high = int(samples.min()), int(samples.max())
    if low == high:
        others = high - 1 - (first - 1) % max(high - 1, 1)
        return torch.where(first == 0, samples, others.to(samples.dtype)) if high > 1 else samples
    rolled = torch.stack([sample.roll(index, -1) for index, sample in enumerate(samples)])
    above = low + (high - low > 2)
    return torch.cat([rolled[:1].clamp(above), rolled[1:2].clamp(max=high - 1), rolled[2:].clamp(above, high - 1)])


_LARGE = 1e4
