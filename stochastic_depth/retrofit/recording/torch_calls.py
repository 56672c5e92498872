"""Properties of PyTorch's functions: how a graph names them, and what their results depend on."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stochastic_depth.retrofit.errors import StoredError
from stochastic_depth.torch_private import TorchDispatchMode, tree_leaves

# A tensor's memory address differs between calls of the same form.
ORIGIN = {"storage_offset", "data_ptr", "untyped_storage", "is_set_to", "__dlpack__"}
# Settings that `with` undoes, and calls that set nothing.
UNDONE_SETTINGS = {"_set_grad_enabled", "_record_function_exit", "_assert", "_set_multithreading_enabled"}
_STRUCTURE_METHODS = {
    "size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "is_signed", "element_size", "get_device", "__len__", "ndimension", "is_same_size", "has_names", "type",
    "is_tensor", "result_type", "can_cast", "promote_types", "is_nonzero_size", "is_conj", "is_neg", "is_inference",
    "is_shared", "is_pinned", "__hash__", "is_storage", "numpy_dtype", "broadcast_shapes", "dim_order",
    "has_torch_function", "is_distributed",
}  # fmt: skip
_STRUCTURE_ATTRIBUTES = {
    "shape", "ndim", "dtype", "device", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_xla", "is_nested",
    "is_sparse", "is_sparse_csr", "is_quantized", "is_leaf", "requires_grad", "layout", "itemsize", "nbytes", "names",
    "is_vulkan", "is_mkldnn", "is_maia", "is_ipu", "retains_grad", "output_nr", "_version", "grad_fn", "name",
    "_backward_hooks", "_has_symbolic_sizes_strides", "_is_view", "is_mtia",
}  # fmt: skip


def set_item(value: Tensor, index: Any, item: Any) -> Tensor:
    """`value[index] = item`, as a function."""
    value[index] = item
    return value


def name_of_function(func: Any) -> str:
    """The name of a function of PyTorch, or of the attribute that it reads."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


def is_structure(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function returns the form of a tensor, not its values, as `x.type()` does and `x.type(dtype)` not."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _STRUCTURE_ATTRIBUTES
    return name in _STRUCTURE_METHODS and (name != "type" or len(args) + len(kwargs) == 1)


_SIZES = {
    "size", "shape", "numel", "nelement", "nbytes", "__len__", "stride", "is_contiguous", "is_same_size", "dim_order",
    "broadcast_shapes", "__iter__", "unbind", "chunk", "unsafe_chunk", "split",
    "unsafe_split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit",
}  # fmt: skip


def tells_sizes(func: Any) -> bool:
    """Whether code may do something else after this function because of the sizes of its argument."""
    return name_of_function(func) in _SIZES


class ReadValues(TorchDispatchMode):
    """Notices that functions have read values of tensors: that the sizes of their results may depend on them.

    PyTorch marks the operations that do, among them the one that makes a number of a tensor, as `x[:length]` does.

    Attributes:
        any: whether it has happened since this was set to False.
    """

    supports_higher_order_operators = True  # Without it, they raise.

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.any and _reads_values(func, args):
            self.any = True
        return func(*args, **(kwargs or {}))


def _reads_values(func: Any, args: Sequence[Any]) -> bool:
    if not hasattr(func, "overloadpacket"):
        return False  # an operator of functions, such as `flex_attention`
    name = func.overloadpacket.__name__
    if name == "index":
        return any(isinstance(part, Tensor) and part.dtype in _MASKS for part in args[1])
    # Extensions need not mark theirs: a search for neighbors gives as many as there are.
    return func.namespace not in _OWN or not _READING.isdisjoint(func.tags) or name in _READING_UNMARKED


_MASKS = (torch.bool, torch.uint8)
_OWN = {"aten", "prim", "prims", "quantized", "c10d", "_c10d_functional"}
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READING_UNMARKED = {
    "tensor_split", "_pack_padded_sequence", "_to_sparse", "_to_sparse_csr", "_to_sparse_csc", "_to_sparse_bsr",
    "_to_sparse_bsc",
}  # fmt: skip
# Of these, it is a value, and no size, that a tensor gives as a number.
_NO_SIZES = {"full_like", "select", "fill_", "roll"}


def may_size_by_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether the sizes of a function's results may depend on the values that it reads."""
    name = name_of_function(func)
    if name == "__getitem__":
        return any(
            isinstance(part, slice) or (isinstance(part, Tensor) and (part.dim() or part.dtype in _MASKS))
            for part in tree_leaves(args[1])
        )
    if name in ("full", "new_full"):
        size = args[:1] if name == "full" else args[1:2]
        return not size or any(isinstance(part, Tensor) for part in tree_leaves(size))
    return name not in _NO_SIZES


def is_value(output: Any) -> bool:
    """Whether a call returned a plain value computed from the values of tensors."""
    if isinstance(output, (bool, int, float, complex, str)):
        return True
    if isinstance(output, (list, tuple)) and output:
        return any(is_value(item) for item in cast("list[Any]", output))
    return type(output).__module__ == "numpy"


def named_call(func: Any, args: Sequence[Any]) -> tuple[str, Any, Sequence[Any]]:
    """The graph's form of a call: kind of node, target and arguments."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if name in ("__set__", "__delete__"):
        raise StoredError("the forward sets an attribute of a tensor")
    if name == "__setitem__":
        return "call_function", set_item, args
    if name == "__getitem__":
        return "call_function", operator.getitem, args
    if isinstance(args[0] if args else None, Tensor) and getattr(Tensor, name, None) is func:
        return "call_method", name, args
    if isinstance(func, types.MethodDescriptorType) or getattr(func, "__qualname__", "").startswith("Tensor"):
        return "call_method", name, args
    return "call_function", func, args


def operands_by_position(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a function, with the operands of a sum by position: `torch.add(x, other=y)` becomes `add(x, y)`."""
    names = ("input", "other")[len(args) :] if name in SUMS else ()
    if not all(each in kwargs for each in names):
        return tuple(args), dict(kwargs)
    rest = {key: value for key, value in kwargs.items() if key not in names}
    return (*args, *[kwargs[each] for each in names]), rest


SUBTRACTIONS = {"sub", "sub_", "subtract", "isub", "__sub__", "__isub__"}
SUMS = {"add", "add_"} | SUBTRACTIONS
"""Names of the functions and methods that add and subtract."""


def as_method(name: str) -> Callable[..., Any]:
    """The method of this name of its first argument, as a function."""

    def method(value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, name)(*args, **kwargs)

    method.__name__ = name
    return method
