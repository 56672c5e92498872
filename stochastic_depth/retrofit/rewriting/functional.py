"""Functional drop paths: a branch's output times noise of its samples, in the code of a block instead of a module.

timm's `drop_path`, torchvision's `stochastic_depth`, `drop_connect` of EfficientNets and hand-written versions look
the same in a recording: a value is multiplied by a tensor (N, 1, ..., 1) that is made of Bernoulli draws, of the floor
of a uniform draw plus the survival probability, or of a comparison of uniform draws with a probability, and of nothing
else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

from torch import fx, nn

from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.recording.quiet import QUIETED
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.retrofit.rewriting.operations import SAME_MEMORY, sources
from stochastic_depth.retrofit.rewriting.plain_forms import name_values_changed_in_place, spell_out_additions
from stochastic_depth.retrofit.rules import DropPathRule

FUNCTIONAL = "()"
"""Path of a functional drop path."""

_DRAWS = {
    "bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm",
    "multinomial", "normal", "normal_", "uniform_", "random_", "exponential_", "geometric_", "log_normal_", "cauchy_",
    "poisson",
}  # fmt: skip


def functional_drop_path(x: Any, _noise: Any = None) -> Any:
    """Replaces a functional drop path in a recording and returns its input."""
    return x


@dataclass(frozen=True)
class FunctionalDropPath:
    """A functional drop path in a recording.

    Attributes:
        product: the multiplication by the noise.
        value: the multiplied value.
        operand: the index of the noise among the arguments of the product.
        rule: its rule.
        division: the division by the survival probability, if it follows the product.
    """

    product: fx.Node
    value: fx.Node
    operand: int
    rule: DropPathRule
    division: fx.Node | None = None

    @property
    def num_samples(self) -> int | None:
        """Number of samples of the recorded call, if known."""
        shape = self.value.meta.get("shape")
        return shape[0] if shape else None


def find_functional(graph: fx.Graph) -> list[FunctionalDropPath]:
    """The functional drop paths in a recording, in order."""
    found: list[FunctionalDropPath] = []
    for node in graph.nodes:
        if _name(node) not in ("mul", "mul_", "imul") or len(node.args) != 2:
            continue
        for operand in (1, 0):
            noise, value = node.args[operand], node.args[1 - operand]
            if isinstance(noise, fx.Node) and isinstance(value, fx.Node):
                rule = _rule_of(noise, value)
                if rule is not None:
                    division = _division_of(node, 1 - rule.drop_rate) if rule.rescale == "none" else None
                    rule = rule if division is None else replace(rule, rescale="train")
                    found.append(FunctionalDropPath(node, value, operand, rule, division))
                    break
    return found


def put_functional(graph: fx.Graph, block: nn.Module) -> list[FunctionalDropPath]:
    """Replace each functional drop path in a recording by a call of `functional_drop_path`.

    Raises:
        TraceError: if the code draws other random numbers.
    """
    name_values_changed_in_place(graph, block)
    spell_out_additions(graph, block)
    found = find_functional(graph)
    draws = [draw for each in found for draw in _draws_of(cast(fx.Node, each.product.args[each.operand]))]
    if len(set(draws)) < len(draws):
        raise TraceError(
            "one random draw drops several of its branches together, which gates of their own would not do"
        )
    for each in found:
        node, keep = each.product, 1 - each.rule.drop_rate
        node.meta["noise"] = each.operand
        # A run without noise multiplies by this.
        node.meta["scale"] = 1 / keep if each.rule.rescale == "train" else 1.0
        node.op, node.target, node.args, node.kwargs = (
            "call_function", functional_drop_path, (_undivided(each.value, keep),), {},
        )  # fmt: skip
        if each.division is not None:
            each.division.replace_all_uses_with(next(arg for arg in each.division.args if isinstance(arg, fx.Node)))
            graph.erase_node(each.division)
    for node in reversed(list(graph.nodes)):
        if found and not node.users and _is_noise_node(node):
            graph.erase_node(node)
    for node in graph.nodes:
        if _name(node) in _DRAWS and node.op != "call_module":
            raise TraceError(f"the forward draws random numbers itself ({_name(node)})")
    return found


def scaled_value(product: fx.Node, keep: float) -> fx.Node | None:
    """The value that a node multiplies by a survival probability, as the paper does in evaluation; else None."""
    numbers = [each for each in product.args if isinstance(each, (int, float))]
    if _name(product) not in ("mul", "mul_", "imul", "rmul", "multiply") or len(product.args) != 2 or product.kwargs:
        return None
    return product.all_input_nodes[0] if len(numbers) == 1 and math.isclose(numbers[0], keep) else None


def _is_noise_node(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and (
        _name(node) in _DRAWS | _MAKES | _FORMS | {"getattr", "_after"} or _function(node) is not None or is_size(node)
    )


_MAKES = {"new_empty", "empty", "empty_like", "new_full", "full", "new_ones", "ones", "zeros", "new_zeros", "full_like"}


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _rule_of(noise: fx.Node, value: fx.Node) -> DropPathRule | None:
    """The rule of a product with this value, if the other operand is the noise of a drop path."""
    draws = _draws_of(noise)
    if len(draws) != 1:
        return None
    shape = noise.meta.get("shape")
    if shape is not None and any(size != 1 for size in shape[1:]):
        return None  # Noise of single values is dropout.
    if shape is None and not _is_of_samples(draws[0]):
        return None
    gate = _gate_of(draws[0], noise)
    if gate is None:
        return None
    keep, factor = gate
    divided = math.isclose(factor * keep, 1) if keep < 1 else False
    if not divided and not math.isclose(factor, 1):
        return None
    divided = divided or _undivided(value, keep) is not value
    granularity = "batch" if _has_no_rows(draws[0], noise) else "sample"
    return DropPathRule(1 - keep, "train" if divided else "none", granularity)


def _draws_of(noise: fx.Node) -> list[fx.Node]:
    return [node for node in _values(noise) if _name(node) in QUIETED]


def _gate_of(draw: fx.Node, noise: fx.Node) -> tuple[float, float] | None:
    """The survival probability and the value of the noise where it is open; None if it is no gate.

    The noise is computed from single values of the draw, in whatever way the code computes it.
    """

    def at(drawn: float) -> float:
        return float(_number(noise, draw, drawn))

    try:
        if _name(draw) in ("bernoulli", "bernoulli_"):
            prob = _bernoulli_prob(draw)
            closed, opened = at(0.0), at(1.0)
            return None if prob is None or closed or not opened else (prob, opened)
        ends, grid = (0.0, 1 - 2**-53), [(index + 0.5) / 64 for index in range(64)]
        values = [at(drawn) for drawn in (ends[0], *grid, ends[1])]
    except _NoNumberError:
        return None
    factor = max(values)
    # A run without noise draws nearly 1, and takes it for smaller than any number.
    compared = any(_name(node) in ("lt", "le") and node.args[0] is draw for node in _values(noise))
    if not values[0 if compared else -1]:
        return None
    if factor <= 0 or not set(values) <= {0.0, factor} or sum(a != b for a, b in pairwise(values)) > 1:
        return None
    first = values[0]
    if values[-1] == first:
        return 1.0, factor
    low, high = ends
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if at(middle) == first else (low, middle)
    keep = high if first else 1 - high
    # The number in the code, which rounding may miss.
    written = {each for node in _values(noise) for each in node.args if isinstance(each, float)}
    return next((each for part in written for each in (part, 1 - part) if abs(each - keep) < 1e-9), keep), factor


class _NoNumberError(Exception):
    """Noise that is not computed from numbers and a draw alone."""


def _number(node: Any, draw: fx.Node, drawn: float) -> Any:
    """The value of noise if its draw has a value."""
    if node is draw:
        return drawn
    if isinstance(node, (bool, int, float)):
        return node
    if not isinstance(node, fx.Node) or is_size(node):
        raise _NoNumberError
    name = _name(node)
    if name in _FORMS:
        return _number(node.args[0], draw, drawn)
    if name == "_after":
        return _number(node.args[1], draw, drawn)
    if name in _FILLED:
        return _FILLED[name]
    function = _function(node)
    if function is None or node.kwargs:
        raise _NoNumberError
    try:
        return function(*(_number(each, draw, drawn) for each in node.args))
    except (TypeError, ZeroDivisionError):
        raise _NoNumberError from None


def _function(node: fx.Node) -> Callable[..., Any] | None:
    """The function of numbers that a node computes, in place or not."""
    name = _name(node).strip("_")
    return _FUNCTIONS.get(name) or _FUNCTIONS.get(name.removeprefix("i"))


def _rsub(a: float, b: float) -> float:
    return b - a


# Functions that change the form of noise, not its values.
_FORMS = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "view", "view_as", "reshape", "expand", "expand_as",
    "unsqueeze", "squeeze", "getitem", "contiguous", "clone", "detach",
}  # fmt: skip
_FILLED = {"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0, "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "radd": operator.add, "sub": operator.sub, "subtract": operator.sub, "rsub": _rsub,
    "mul": operator.mul, "multiply": operator.mul, "rmul": operator.mul, "div": operator.truediv,
    "divide": operator.truediv, "truediv": operator.truediv, "true_divide": operator.truediv, "neg": operator.neg,
    "floor": math.floor, "ceil": math.ceil, "round": round, "bool": bool, "ge": operator.ge, "gt": operator.gt,
    "le": operator.le, "lt": operator.lt, "eq": operator.eq, "ne": operator.ne, "logical_not": operator.not_,
    "invert": operator.not_, "bitwise_not": operator.not_,
}  # fmt: skip


def _values(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all nodes that its value depends on, except through its form."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        current = pending.pop()
        if current in seen or is_size(current):
            continue
        seen.add(current)
        yield current
        if _name(current) not in _MAKES | {"rand"}:
            pending += sources(current)


def _form_of_draw(draw: fx.Node) -> Any:
    """The sizes of a draw as written in the code; None if they are copied from another tensor."""
    source: Any = draw.args[0] if _name(draw) in ("bernoulli", "bernoulli_") else draw
    if not isinstance(source, fx.Node) or _name(source) not in _MAKES | {"rand"}:
        return None
    sizes = [each for each in source.args if not isinstance(each, fx.Node) or is_size(each)]
    return sizes or None


def _is_of_samples(draw: fx.Node) -> bool:
    """Whether the form of a draw is (N, 1, ...) or (1, 1, ...), as far as the code shows."""
    sizes = _form_of_draw(draw)
    return sizes is not None and _mentions(sizes, lambda each: each == 1 and type(each) is int)


def _mentions(size: Any, what: Callable[[Any], bool]) -> bool:
    if isinstance(size, (tuple, list)):
        return any(_mentions(each, what) for each in cast("list[Any]", size))
    if isinstance(size, fx.Node):
        # The 0 in shape[0] is not a size.
        return what(size) or any(_mentions(each, what) for each in size.args if size.target is not operator.getitem)
    return what(size)


def _has_no_rows(draw: fx.Node, noise: fx.Node) -> bool:
    shape = noise.meta.get("shape")
    if shape is not None and "samples" in noise.meta:
        return not noise.meta["samples"]
    if shape is not None:
        return math.prod(shape) == 1
    return not _mentions(_form_of_draw(draw), _is_row)


def _is_row(size: Any) -> bool:
    """Whether a size is read from a tensor, or a number that stands for one."""
    if isinstance(size, fx.Node):
        return size.target is operator.getitem or (size.target == "size" and len(size.args) > 1)
    return type(size) is int and size > 1


def _bernoulli_prob(draw: fx.Node) -> float | None:
    """The probability of a Bernoulli draw, if it is a number in the code."""
    given = [each for each in (*draw.args[1:], *draw.kwargs.values()) if isinstance(each, float)]
    if not given and isinstance(draw.args[0], fx.Node):
        # bernoulli(full(..., survival_prob)) or bernoulli(ones(...) * survival_prob)
        given = [
            each
            for node in _values(draw.args[0])
            if _name(node) in ("full", "full_like", "new_full", "mul", "mul_", "imul")
            for each in (*node.args, *node.kwargs.values())
            if isinstance(each, float)
        ]
    return given[0] if len(given) == 1 and 0 < given[0] <= 1 else None


def _undivided(value: fx.Node, keep: float) -> fx.Node:
    """The value before division by the survival probability; the value itself if it was not divided."""
    return value.all_input_nodes[0] if _divides(value, keep) else value


def _division_of(product: fx.Node, keep: float) -> fx.Node | None:
    """The division by the survival probability of a product that nothing else uses."""
    node = product
    while len(users := [user for user in node.users if not is_size(user)]) == 1:
        (node,) = users
        if _divides(node, keep):
            return node
        # Such as a gain: dividing before it or after it is the same.
        if node.op == "call_module" or _name(node) not in SAME_MEMORY | {"mul", "mul_", "imul", "multiply"}:
            return None
    return None


def _divides(node: fx.Node, keep: float) -> bool:
    """Whether a node divides a value by the survival probability, or multiplies by its inverse."""
    numbers = [each for each in node.args if isinstance(each, (int, float))]
    if len(node.args) != 2 or len(numbers) != 1 or node.kwargs:
        return False
    if _name(node) in ("mul", "mul_", "imul", "multiply"):
        # A factor such as 2 may be the block's own.
        return math.isclose(numbers[0] * keep, 1) and not float(numbers[0]).is_integer()
    is_quotient = _name(node) in ("div", "div_", "truediv", "itruediv", "idiv", "divide", "true_divide")
    return is_quotient and node.args[1] is numbers[0] and math.isclose(numbers[0], keep)
