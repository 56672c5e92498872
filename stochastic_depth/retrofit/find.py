"""Finds the residual branches of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from torch import nn

from stochastic_depth.residual import Residual
from stochastic_depth.retrofit.controller import Branch

Where = Callable[[str, nn.Module], bool] | str | Sequence[str]


def find_branches(model: nn.Module, where: Where | None) -> list[Branch]:
    """The branches of all `Residual`s of a model, in the order of `model.named_modules()`.

    A `Residual` that is used several times is one branch: its one gate holds for all its uses in a pass.

    Args:
        model: the model.
        where: filter, see `make_stochastic_`.

    Raises:
        ValueError: if there is none, none that passes the filter, or one that computes something else than its sum.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Residual)]
    if not found:
        raise ValueError(
            f"No residual branch was found in {type(model).__name__}: looked for stochastic_depth.Residual modules. "
            "Write the sums of the model as Residual(branch, shortcut)."
        )
    chosen = [(name, module) for name, module in found if _passes_filter(where, name, module)]
    if not chosen:
        names = ", ".join(name for name, _ in found[:3])
        raise ValueError(f"where={where!r} matches none of the {len(found)} branches: {names}, ...")
    for name, module in chosen:
        if type(module).forward is not Residual.forward:
            raise ValueError(
                f"{name} is a {type(module).__name__} with a forward of its own, which the gate would replace. "
                "Keep Residual's forward, and put what comes before or after the sum into modules around it."
            )
    return [Branch(name, module, module.branch) for name, module in chosen]


def _passes_filter(where: Where | None, name: str, module: nn.Module) -> bool:
    if where is None:
        return True
    if callable(where):
        return bool(where(name, module))
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
