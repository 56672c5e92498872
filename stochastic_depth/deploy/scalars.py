"""Modules and hooks that keep a branch's factor if no weights can take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.compiling import eager
from stochastic_depth.copies import plain_class
from stochastic_depth.deploy.batches import own_tensors
from stochastic_depth.deploy.blocks import ScaledForward, scaled_forward
from stochastic_depth.deploy.undo import without_traces
from stochastic_depth.residual import Residual, outside_graph
from stochastic_depth.retrofit.code.signatures import PLAIN_TYPES, flatten, remember
from stochastic_depth.retrofit.errors import CutError, TraceError
from stochastic_depth.retrofit.hidden_states import hidden_states_of
from stochastic_depth.retrofit.layers import with_first
from stochastic_depth.retrofit.rewriting.sums import Key
from stochastic_depth.torch_private import tree_leaves


class Scale(nn.Module):
    """Multiplies by a number. It replaces a drop path and has no state.

    Args:
        factor: the number.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The product. x: (...)."""
        return x * self.factor

    def extra_repr(self) -> str:
        """The number, for `print`."""
        return f"{self.factor:g}"


class ScaledResidual(Residual):
    """The sum of a shortcut and a scaled branch, `shortcut(x) + branch_factor * branch(x)`."""

    branch_factor: float

    def forward(self, x: Tensor) -> Tensor:
        """The sum. x: (N, ...)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return torch.add(shortcut, self.branch(x), alpha=self.branch_factor)


class ScaledOutput:
    """Forward hook that multiplies a module's output by a number, after all other hooks.

    Args:
        factor: the number.
        path: position of the values in the module's output: () for the output itself, (0,) for its first entry.
    """

    def __init__(self, factor: float, path: tuple[int, ...] = ()) -> None:
        self.factor = factor
        self.path = path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        """The module's output, multiplied."""
        return self._scaled(output, self.path)

    def _scaled(self, output: Any, path: tuple[int, ...]) -> Any:
        if not path:
            return output * self.factor
        entries = list(output)
        entries[path[0]] = self._scaled(entries[path[0]], path[1:])
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


class ScaledLayer(nn.Module):
    """Behavior of a whole layer that is a scaled branch: input + branch_factor * (layer(input) - input)."""

    branch_factor: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, its first value scaled relative to the hidden states."""
        hidden = hidden_states_of(self, args, kwargs)
        assert hidden is not None
        hidden = hidden.clone()  # The layer may add to its input in place.
        output = super().forward(*args, **kwargs)
        own = output[0] if isinstance(output, (tuple, list)) else output
        scaled = torch.add(hidden, own - hidden, alpha=self.branch_factor)
        return with_first(output, scaled)


@dataclass
class BranchFactors:
    """Factors of branches in another library's block, and the block's scaled code for each form of call.

    Attributes:
        drop_paths: paths of its drop paths whose calls are branches; empty if the branches are additions.
        factors: the factor of each branch.
    """

    drop_paths: tuple[str, ...]
    factors: dict[Key, float]
    _forms: dict[Any, list[ScaledForward]] = field(default_factory=dict[Any, "list[ScaledForward]"], repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Code is bound to its module: a copied or loaded module makes its own.
        return {**self.__dict__, "_forms": {}}

    @eager
    def forward_for(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The scaled forward for a call, and its opaque arguments.

        Raises:
            RuntimeError: if the block's code cannot be rewritten for this call.
        """
        leaves: list[Any] = []
        signature = flatten((args, kwargs), leaves)
        attributes = tuple(item for item in block.__dict__.items() if isinstance(item[1], PLAIN_TYPES))
        form = (signature, attributes, torch.is_grad_enabled())
        known = self._forms.get(form, [])
        for made in known:
            if made.recording.holds(leaves):
                return made.function, leaves
        try:
            made = scaled_forward(block, self.drop_paths, self.factors, signature, leaves)
            if not torch.compiler.is_compiling():
                # The same code with factors of 1 must compute what the block computes.
                _refuse_other_code(block, scaled_forward(block, self.drop_paths, {}, signature, leaves), args, kwargs)
        except (CutError, TraceError) as error:
            raise RuntimeError(
                f"A {plain_class(block).__name__} whose branch has a factor cannot be called in this form: {error}. "
                "Write the sum as Residual(branch, shortcut) before fold_."
            ) from error
        remember(self._forms, form, [*known, made])
        return made.function, leaves


def _refuse_other_code(block: nn.Module, made: ScaledForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def run(forward: Callable[..., Any]) -> list[Tensor]:
        values, named = own_tensors((args, kwargs))
        with torch.no_grad(), without_traces(block):
            output = forward(*values, **named)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    def recorded(*values: Any, **named: Any) -> Any:
        leaves: list[Any] = []
        flatten((values, named), leaves)
        return made.function(block, *leaves)

    ours, own = run(recorded), run(partial(plain_class(block).forward, block))
    if len(ours) != len(own) or not all(_is_close(a, b) for a, b in zip(ours, own, strict=True)):
        raise TraceError("a recording of its code computes something else than the code")


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)


class ScaledBlock(nn.Module):
    """Behavior of another library's block whose branches neither its weights nor its children can scale."""

    _branch_factors: BranchFactors

    @outside_graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, with its branches scaled."""
        forward, leaves = self._branch_factors.forward_for(self, args, kwargs)
        return forward(self, *leaves)
