"""Rules of drop paths: which modules of other libraries multiply a residual branch by a random gate, and how.

A module is a drop path if its class is called `DropPath`, `StochasticDepth`, or ends in one of these names, as in timm,
torchvision, transformers (`BeitDropPath`, ...) and the DINO family; if its class was registered with
`register_drop_path`; or if it is called otherwise, draws random numbers, and on trial does what a drop path does, at a
rate that is one of its attributes.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.gate_draws import Granularity
from stochastic_depth.random_states import same_random_states
from stochastic_depth.residual import Rescale
from stochastic_depth.torch_private import without_torch_function

_CLASS_NAMES = ("DropPath", "StochasticDepth")
# Attributes that hold the rate.
RATES = ("drop_prob", "p", "drop_rate", "drop_path_rate", "prob")


@dataclass(frozen=True)
class DropPathRule:
    """How a drop path gates a branch.

    Attributes:
        drop_rate: probability that a gate is closed.
        rescale: "train" if it divides kept values by the survival probability in training, "eval" if it multiplies
            all values by it in evaluation, else "none".
        granularity: "sample" for one gate per sample, "batch" if all samples share one.
    """

    drop_rate: float
    rescale: Rescale = "train"
    granularity: Granularity = "sample"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TypeError: if the rate is not a number.
            ValueError: if it is not in [0, 1], or there is no such scaling or granularity.
        """
        if isinstance(self.drop_rate, (bool, str)) or not hasattr(self.drop_rate, "__float__"):
            raise TypeError(f"drop_rate must be a number in [0, 1], but is {self.drop_rate!r}.")
        if not 0 <= self.drop_rate <= 1:
            raise ValueError(f"drop_rate must be in [0, 1], but is {self.drop_rate:g}.")
        if self.rescale not in get_args(Rescale):
            raise ValueError(f"rescale must be one of 'eval', 'train', 'none', but is {self.rescale!r}.")
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be 'batch' or 'sample', but is {self.granularity!r}.")


_registered: dict[type[nn.Module], Callable[[Any], DropPathRule]] = {}


def register_drop_path(cls: type[nn.Module], rule: Callable[[Any], DropPathRule]) -> None:
    """Register a class of drop paths for `make_stochastic_`.

    Args:
        cls: the class; its subclasses count too.
        rule: reads a module's rule from its attributes.

    Raises:
        TypeError: if `cls` is not a class of modules, or `rule` not a function.

    Example:
        >>> class RandomSkip(nn.Module):
        ...     rate = 0.3
        >>> register_drop_path(RandomSkip, lambda module: DropPathRule(drop_rate=module.rate))
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls must be a class of modules, such as DropPath, but is {cls!r}.")
    if not callable(rule):
        raise TypeError(f"rule must be a function of a module that returns its DropPathRule, but is {rule!r}.")
    _registered[cls] = rule


def is_drop_path(module: nn.Module) -> bool:
    """Whether a module is a drop path, of any rate."""
    try:
        return drop_path_rule(module) is not None
    except ValueError:
        return True


def drop_path_rule(module: nn.Module) -> DropPathRule | None:
    """The rule of a module that is a drop path, None for every other module.

    Raises:
        ValueError: if it looks like a drop path but its rate cannot be read.
    """
    kind = plain_class(module)
    for cls in kind.__mro__:
        if cls in _registered:
            return _registered[cls](module)
    name = kind.__name__
    if not name.endswith(_CLASS_NAMES):
        return _unnamed_rule(module)
    attributes = vars(module)
    rates = [attributes[attribute] for attribute in RATES if attribute in attributes]
    if not rates:
        if any(module.children()):
            return None  # A wrapper of a whole branch, or a network that bears the name.
        raise ValueError(
            f"{name} looks like a drop path, but has none of the attributes {', '.join(RATES)} for its rate. "
            "Register it with stochastic_depth.register_drop_path."
        )
    granularity: Granularity = "batch" if attributes.get("mode") == "batch" else "sample"
    rescale: Rescale = "train" if attributes.get("scale_by_keep", True) else "none"
    try:
        rate = float(rates[0] or 0.0)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{name} looks like a drop path, but its rate is {rates[0]!r}, which is no number. Register it with "
            "stochastic_depth.register_drop_path."
        ) from None
    rule = DropPathRule(rate, rescale, granularity)
    known = _seen.get(module)
    if known is not None and 0 < known[0].drop_rate < 1 and known[0] == replace(rule, drop_rate=known[0].drop_rate):
        _seen[module] = rule, known[1]  # Recipes change the rate in every step.
    elif known is None or known[0] not in (rule, replace(rule, rescale="eval")):
        by_paper = replace(rule, rescale="eval")
        reason = _otherwise(module, rule)
        _seen[module] = (by_paper, "") if reason and not _otherwise(module, by_paper, surely=True) else (rule, reason)
    return None if _seen[module][1] else _seen[module][0]


def _unnamed_rule(module: nn.Module) -> DropPathRule | None:
    """The rule of a module that does what a drop path does, whatever it is called."""
    kind = plain_class(module)
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return None
    if kind.__module__.startswith("torch.") or not _draws(kind):
        return None
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, float)}
    if module not in _unnamed:
        if not any(0 < value < 1 for value in numbers.values()):
            return None  # With a rate of 0 it does nothing that could be seen.
        _unnamed[module] = _on_trial(module, numbers)
    found = _unnamed[module]
    if found is None or found.rate not in numbers:
        return None
    value = numbers[found.rate]
    return DropPathRule(1 - value if found.is_survival else value, found.rescale, found.granularity)


def is_named(module: nn.Module) -> bool:
    """Whether a drop path is one by its name or registration, not by what it does on trial."""
    return _unnamed.get(module) is None


def leave(module: nn.Module, reason: str) -> None:
    """Take a module for no drop path any more, although it does what one does."""
    rule = drop_path_rule(module)
    if rule is not None:
        _unnamed[module], _seen[module] = None, (rule, reason)


class _Unnamed(NamedTuple):
    """What a drop path of another name does: the attribute with its rate or survival probability, and how it acts."""

    rate: str
    is_survival: bool
    rescale: Rescale
    granularity: Granularity


_unnamed: WeakKeyDictionary[nn.Module, _Unnamed | None] = WeakKeyDictionary()


def _draws(kind: type[nn.Module]) -> bool:
    """Whether the methods of a class, or functions that they call by name, may draw random numbers."""
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    pending = [each for part in classes for each in vars(part).values() if isinstance(each, FunctionType)]
    seen: set[FunctionType] = set()
    while pending:
        function = pending.pop()
        names = function.__code__.co_names
        if any(part in name.lower() for name in names for part in ("rand", "bernoulli", "uniform", "binomial")):
            return True
        seen.add(function)
        called = [function.__globals__.get(name) for name in names]
        pending += [each for each in called if isinstance(each, FunctionType) and each not in seen]
    return False


def _on_trial(module: nn.Module, numbers: Mapping[str, float]) -> _Unnamed | None:
    for name, value in numbers.items():
        kept_first = any(part in name.lower() for part in ("keep", "surviv"))
        for is_survival in (kept_first, not kept_first):
            rate = 1 - value if is_survival else value
            for granularity, rescale in itertools.product(get_args(Granularity), get_args(Rescale)):
                if 0 < rate < 1 and not _otherwise(module, DropPathRule(rate, rescale, granularity), surely=True):
                    return _Unnamed(name, is_survival, rescale, granularity)
    return None


def does_otherwise(module: nn.Module, *, again: bool = False) -> str:
    """Why a module that is called a drop path is none; empty where it is one, or is not called so.

    Args:
        module: the module.
        again: whether to try it again, because something besides its rule may have changed.
    """
    if again:
        _seen.pop(module, None)
    return _seen[module][1] if drop_path_rule(module) is None and module in _seen else ""


_seen: WeakKeyDictionary[nn.Module, tuple[DropPathRule, str]] = WeakKeyDictionary()


def _otherwise(module: nn.Module, rule: DropPathRule, *, surely: bool = False) -> str:
    """What a module does otherwise than a drop path of its rule, tried on numbers; empty where nothing shows.

    Args:
        module: the module.
        rule: its rule.
        surely: whether it must be seen to drop what the rule says.
    """
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return "it has modules or parameters of its own"
    if not 0 < rule.drop_rate < 1:
        return ""
    kind = plain_class(module)
    trial: nn.Module = object.__new__(kind)
    trial.__dict__.update(module.__dict__)
    for shape in _SHAPES_TRIED:
        x = torch.linspace(1, 2, 256, device="cpu").view(shape)  # Also where models are made without data.
        try:
            with same_random_states(), without_torch_function(), torch.no_grad():
                trial.training = False
                evaluated = kind.forward(trial, x)
                trial.training = True
                trained = [kind.forward(trial, x) for _ in range(_NUM_TRIED[rule.granularity])]
        except Exception:  # It takes something else than such samples; the proof will tell.
            if shape is _SHAPES_TRIED[-1]:
                return "it takes something else" if surely else ""
            continue
        # Noise (N, 1, 1, 1) is for images.
        if all(isinstance(y, torch.Tensor) and y.shape == x.shape for y in (evaluated, *trained)):
            break
    else:
        return "it gives something of another shape"
    if not torch.allclose(evaluated, x * (1 - rule.drop_rate) if rule.rescale == "eval" else x, rtol=1e-6):
        return "it changes what it is given in evaluation"
    num_drawn = len(trained) * (len(x) if rule.granularity == "sample" else 1)
    if all(torch.equal(y, x) for y in trained):
        takes_more = len(inspect.signature(kind.forward).parameters) > 2  # and acts where it is given more
        may_be_luck = num_drawn * rule.drop_rate < 25
        return (
            ""
            if (takes_more or may_be_luck) and not surely
            else f"it drops nothing, where its rate is {rule.drop_rate:g}"
        )
    kept = 1 / (1 - rule.drop_rate) if rule.rescale == "train" else 1.0
    for y in trained:
        factors = (y / x).flatten(1)
        if not torch.allclose(factors, factors[:, :1].expand_as(factors)):
            return "it drops single values of a sample"
        is_kept = torch.isclose(factors[:, 0], torch.tensor(kept, device="cpu", dtype=y.dtype), rtol=1e-4)
        if not (is_kept | (factors[:, 0] == 0)).all():
            return f"what it keeps is not multiplied by {kept:g}"
        if rule.granularity == "batch" and bool(is_kept.any()) and not is_kept.all():
            return "it drops single samples of a mini-batch"
    together = all(y.ne(0).any() == y.ne(0).all() for y in trained)
    if rule.granularity == "sample" and 0.1 <= rule.drop_rate <= 0.9 and together:
        return "it drops whole mini-batches"
    drawn = [y.flatten(1)[:, 0].eq(0) for y in trained]
    of_draws = torch.cat(drawn if rule.granularity == "sample" else [each[:1] for each in drawn]).double()
    dropped = of_draws.mean().item()
    deviation = (rule.drop_rate * (1 - rule.drop_rate) / num_drawn) ** 0.5
    if abs(dropped - rule.drop_rate) > 6 * deviation + 10 / num_drawn:
        return f"it drops {dropped:.2f} of the samples, where its rate is {rule.drop_rate:g}"
    return ""


_SHAPES_TRIED = ((64, 2, 2), (64, 1, 2, 2), (64, 4))
# Calls with 64 samples each.
_NUM_TRIED = {"sample": 16, "batch": 256}
