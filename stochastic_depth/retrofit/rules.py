"""What a drop path is: which modules of other libraries multiply a residual branch by a random gate, and how.

A module is a drop path if its class is called `DropPath`, `StochasticDepth`, or ends in one of these names, as in timm,
torchvision, transformers (`BeitDropPath`, ...) and the DINO family; or if its class was told to `register_drop_path`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from stochastic_depth.copies import plain_class
from stochastic_depth.gate_draws import Granularity

_CLASS_NAMES = ("DropPath", "StochasticDepth")
_RATES = ("drop_prob", "p", "drop_rate", "drop_path_rate", "prob")


@dataclass(frozen=True)
class DropPathRule:
    """What a drop path does to a branch in training.

    Attributes:
        drop_rate: the chance that a gate is closed.
        rescale: "train" where it divides what is kept by the survival probability, else "none".
        granularity: "sample" where each sample has a gate of its own, "batch" where all share one.
    """

    drop_rate: float
    rescale: Literal["train", "none"] = "train"
    granularity: Granularity = "sample"


_registered: dict[type[nn.Module], Callable[[Any], DropPathRule]] = {}


def register_drop_path(cls: type[nn.Module], rule: Callable[[Any], DropPathRule]) -> None:
    """Tell `make_stochastic_` that modules of a class are drop paths.

    Args:
        cls: the class; its subclasses count too.
        rule: reads a module's rule from its attributes.

    Example:
        >>> class RandomSkip(nn.Module):
        ...     rate = 0.3
        >>> register_drop_path(RandomSkip, lambda module: DropPathRule(drop_rate=module.rate))
    """
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
        ValueError: if it looks like a drop path whose rate cannot be read.
    """
    kind = plain_class(module)
    for cls in kind.__mro__:
        if cls in _registered:
            return _registered[cls](module)
    name = kind.__name__
    if not name.endswith(_CLASS_NAMES):
        return None
    attributes = vars(module)
    rates = [attributes[attribute] for attribute in _RATES if attribute in attributes]
    if not rates:
        if any(module.children()):
            return None  # A wrapper of a whole branch, or a network that bears the name.
        raise ValueError(
            f"{name} looks like a drop path, but has none of the attributes {', '.join(_RATES)} for its rate. "
            "Tell what it does by stochastic_depth.register_drop_path."
        )
    granularity: Granularity = "batch" if attributes.get("mode") == "batch" else "sample"
    rescale: Literal["train", "none"] = "train" if attributes.get("scale_by_keep", True) else "none"
    return DropPathRule(float(rates[0] or 0.0), rescale, granularity)
