"""Fingerprints of blocks: those with the same code and configuration share what was recorded and proven."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import Tensor, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.retrofit.code.code_names import names_in_code
from stochastic_depth.retrofit.code.forms import NOT_CONFIGURATION, is_plain
from stochastic_depth.retrofit.rules import is_drop_path
from stochastic_depth.torch_private import buffer_dict, parameter_dict


def fingerprint(block: nn.Module, *, of_samples: bool = False) -> tuple[Any, ...]:
    """Equal for two blocks with the same code and configuration, whatever their weights.

    Args:
        block: the block.
        of_samples: whether it counts how children treat samples, which may depend on a layer's number.
    """
    return tuple(
        (
            path,
            plain_class(module),
            # The rates of drop paths rise from block to block; the gates replace them.
            ()
            if is_drop_path(module)
            else _configuration(module, names_in_code(plain_class(module))[0] if of_samples and path else ()),
            tuple(
                (
                    name,
                    None if tensor is None else (type(tensor), tuple(tensor.shape), tensor.dtype, tensor.requires_grad),
                )
                for name, tensor in _tensors(module)
            ),
        )
        for path, module in block.named_modules()
    )


def _configuration(module: nn.Module, names: Collection[str] = ()) -> tuple[tuple[str, str], ...]:
    """A module's attributes; a layer's number in its model only if it is among these names."""
    left_out = NOT_CONFIGURATION | _POSITIONS.difference(names)
    return tuple(sorted((n, _identity_of(v)) for n, v in module.__dict__.items() if n not in left_out))


# A layer's number in its model, which caches need, does not make it a different kind of layer.
_POSITIONS = {"layer_idx", "layer_id", "layer_index", "layer_number"}


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*parameter_dict(module).items(), *buffer_dict(module).items()]


def _identity_of(value: Any) -> str:
    if is_plain(value):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(_identity_of, cast('list[Any]', value)))})"
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return f"dict({','.join(f'{_identity_of(key)}:{_identity_of(item)}' for key, item in items)})"
    return f"{type(value).__name__}@{id(value)}"
