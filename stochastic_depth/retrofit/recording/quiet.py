"""Runs code without noise: dropout and drop paths keep everything, BatchNorm keeps its statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.random_states import same_random_states
from stochastic_depth.torch_private import BatchNorm

# The argument of each function for its drop rate, or its switch.
_OFF: dict[str, dict[str, Any]] = {
    **{
        name: {"p": 0.0}
        for name in (
            "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
            "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout_", "native_dropout",
        )
    },
    "scaled_dot_product_attention": {"dropout_p": 0.0},
    "multi_head_attention_forward": {"dropout_p": 0.0},
    "rrelu": {"training": False},
}  # fmt: skip
QUIETED = {"bernoulli", "bernoulli_", "rand", "rand_like"}
"""Draws that a run without noise replaces by values that keep everything."""
# A uniform draw that survives with any probability above 0.001.
_ALMOST_ONE = 0.9990234375
_POSITIONS = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10, "rrelu": 3}


_drawn_for_samples: ContextVar[list[str] | None] = ContextVar("drawn_for_samples", default=None)


@contextmanager
def drawn_for_samples() -> Generator[list[str]]:
    """Gives the names of the functions that draw one number for each sample within, as drop paths do."""
    names: list[str] = []
    token = _drawn_for_samples.set(names)
    try:
        yield names
    finally:
        _drawn_for_samples.reset(token)


_DRAWS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "bernoulli", "bernoulli_", "rand", "rand_like", "uniform_"}


def _note_draw(name: str, output: Any) -> None:
    noted = _drawn_for_samples.get()
    if noted is None or name not in _DRAWS or not isinstance(output, Tensor) or output.dim() < 2:
        return
    if output.shape[0] > 1 and output.shape[1:].numel() == 1:
        noted.append(name)


class _Quiet(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        # One draw for each sample, as drop paths make; alive, so that no other tensor has the identity of one.
        self._of_samples: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        output = self._drawn(func, name, args, kwargs or {})
        _note_draw(name, output)
        return output

    def _drawn(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in _OFF:
            for switch, value in _OFF[name].items():
                position = _position(func, name, switch)
                if len(args) > position:
                    args = (*args[:position], value, *args[position + 1 :])
                else:
                    kwargs = {**kwargs, switch: value}
        elif name == "bernoulli_" and isinstance(args[0], Tensor):
            return args[0].fill_(1.0)
        elif name == "bernoulli":
            return torch.ones_like(args[0])
        elif name in ("rand", "rand_like"):
            make = torch.empty if name == "rand" else torch.empty_like
            kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
            drawn = make(*args, **kwargs).fill_(_ALMOST_ONE)
            if drawn.dim() > 1 and drawn.numel() == len(drawn):
                self._of_samples[id(drawn)] = drawn
            return drawn.add_(_to_sort_by(drawn), alpha=2**-11) if drawn.dim() == 1 else drawn
        elif name in ("lt", "le", "__lt__", "__le__") and id(args[0]) in self._of_samples:
            return torch.ones_like(args[0], dtype=torch.bool)  # Whichever way it is compared, it keeps everything.
        elif name in _WITHOUT_DRAWS:
            return _WITHOUT_DRAWS[name](*args, **kwargs)
        elif name == "batch_norm":
            args, kwargs = _with_running_statistics(args, kwargs)
        output = func(*args, **kwargs)
        if name in _STILL:
            # Still drawn, so that it is noticed, but the same for all samples.
            return _STILL[name](output, *args, **kwargs)
        return output


def _still_gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, **given: Any) -> Tensor:
    dim = given.get("dim", -1)
    soft = (logits / tau).softmax(dim)
    if not hard:
        return soft
    largest = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return largest - soft.detach() + soft


def _still_multinomial(weights: Tensor, num_samples: int, replacement: bool = False, **_: Any) -> Tensor:
    if replacement:
        return weights.argmax(-1, keepdim=True).expand(*weights.shape[:-1], num_samples).clone()
    return weights.topk(num_samples, -1).indices


def _to_sort_by(drawn: Tensor) -> Tensor:
    """Numbers from 0 to 1 in no order: one number for each sample may be drawn to sort the samples by."""
    return (0.618 * torch.arange(1, len(drawn) + 1) % 1).to(drawn.device, drawn.dtype)


# Functions that draw where a mode does not see it.
_WITHOUT_DRAWS: dict[str, Callable[..., Tensor]] = {
    "gumbel_softmax": _still_gumbel_softmax,
    "multinomial": _still_multinomial,
}


def _still_normal(output: Tensor, _input: Any, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return output.fill_(mean + std / 2)


def _still_uniform(output: Tensor, _input: Any, low: float = 0.0, high: float = 1.0, **given: Any) -> Tensor:
    low, high = given.get("from", low), given.get("to", high)
    return output.fill_(low + (high - low) * _ALMOST_ONE)


def _filled(value: float) -> Callable[..., Tensor]:
    def fill(output: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return output.fill_(value)

    return fill


def _still_randn(output: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    output.fill_(0.5)
    return output.add_(_to_sort_by(output)) if output.dim() == 1 else output


def _still_integer(output: Tensor, *args: Any, **given: Any) -> Tensor:
    bounds = [value for value in args if type(value) is int]
    return output.fill_(given.get("high", given.get("to", bounds[-1] if bounds else 2)) - 1)


def _still_order(output: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    # Backwards: what exchanges samples would not be seen where each stays in its place.
    return output.copy_(torch.arange(len(output) - 1, -1, -1))


# Replacements for noise are not zero, which would hide the values that they multiply.
_STILL: dict[str, Callable[..., Tensor]] = {
    "randn": _still_randn,
    "randn_like": _still_randn,
    "normal_": _still_normal,
    "uniform_": _still_uniform,
    "exponential_": _filled(1.0),
    "log_normal_": _filled(1.0),
    "geometric_": _filled(1.0),
    "cauchy_": _filled(0.5),
    "randint": _still_integer,
    "randint_like": _still_integer,
    "random_": _still_integer,
    "randperm": _still_order,
}


def _position(func: Any, name: str, switch: str) -> int:
    if name in _POSITIONS:
        return _POSITIONS[name]
    try:
        return list(inspect.signature(func).parameters).index(switch)
    except (ValueError, TypeError):
        return 1


def _with_running_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # torch.batch_norm has weight and bias before the statistics, nn.functional.batch_norm behind them; in both the
    # switch is the sixth argument.
    mean = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
    if mean is None:
        return args, kwargs
    if len(args) > 5:
        return (*args[:5], False, *args[6:]), kwargs
    return args, {**kwargs, "training": False}


@contextmanager
def quiet() -> Generator[None]:
    """Context without noise, which restores random states afterward."""
    with same_random_states(), _Quiet():
        yield


NOISY = (BatchNorm, torch.jit.ScriptModule)
"""Modules whose noise is not that of functions: statistics of the batch, and whatever scripted code does in C++."""


@contextmanager
def without_noise(model: nn.Module) -> Generator[None]:
    """Context in which a model runs without noise: `quiet`, and modules of the kinds `NOISY` run as in evaluation."""
    noisy = [module for module in model.modules() if isinstance(module, NOISY)]
    modes = [module.training for module in noisy]
    try:
        for module in noisy:
            module.training = False
        with quiet():
            yield
    finally:
        for module, training in zip(noisy, modes, strict=True):
            module.training = training
