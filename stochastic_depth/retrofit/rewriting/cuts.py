"""Finds the residual branches in the recording of a block's forward.

A *drop path* is followed forward, through operations that keep zeros (a LayerScale, views, permutations), to the
addition that uses it; the other operand is the shortcut. The branch is everything that only this operand needs. Sizes
do not count as values: the branch reads them again from its own samples.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from stochastic_depth.copies import has_hooks, plain_class
from stochastic_depth.retrofit.errors import CutError, UnusedError
from stochastic_depth.retrofit.recording.sizes import is_size
from stochastic_depth.torch_private import parameter_dict

_ADDITIONS = {operator.add, operator.iadd, torch.add}
_ADDITION_METHODS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply}
_VIEWS = {
    "view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "unsqueeze", "squeeze", "to",
    "type_as", "float", "half", "movedim", "swapaxes", "clone", "type", "view_as", "reshape_as", "chunk", "mT", "T",
}  # fmt: skip
_VIEW_FUNCTIONS = (
    {operator.getitem} | {getattr(torch, name) for name in _VIEWS if hasattr(torch, name)} | {nn.functional.dropout}
)
_KEEPS_ZERO_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class Sum:
    """A residual addition in a recording.

    Attributes:
        add: the node of the addition.
        shortcut: the operand that is kept; None if the branch is added to nothing, which counts as zeros.
        output: the operand that is the branch's output.
        drop_path: the call of the drop path; None without one.
    """

    add: fx.Node
    shortcut: fx.Node | None
    output: fx.Node
    drop_path: fx.Node | None = None

    def after(self, replaced: Mapping[fx.Node, fx.Node]) -> Sum:
        """The same addition after other nodes of the recording were replaced."""
        shortcut = self.shortcut and replaced.get(self.shortcut, self.shortcut)
        output = replaced.get(self.output, self.output)
        return Sum(self.add, shortcut, output, self.drop_path)


@dataclass(frozen=True)
class Branch:
    """The part of a recording that belongs only to a branch.

    Attributes:
        nodes: its nodes, in order.
        inputs: values from outside that it needs.
        sides: other outputs of an attention module in the branch that the block returns, such as attention maps.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...] = ()


def drop_path_sum(drop_path: fx.Node, block: nn.Module) -> Sum:
    """The addition that uses a drop path's output; without one, the output is added to zeros.

    Raises:
        UnusedError: if nothing uses it.
        CutError: if it is added to itself.
    """
    try:
        return _addition(drop_path, block)
    except UnusedError:
        raise
    except CutError:
        return Sum(drop_path, None, cast(fx.Node, drop_path.args[0]))


def _addition(drop_path: fx.Node, block: nn.Module) -> Sum:
    output = drop_path
    while True:
        users = [user for user in output.users if not is_size(user)]
        if not users:
            raise UnusedError("nothing uses the output of the drop path")
        if len(users) != 1:
            names = ", ".join(user.name for user in users)
            raise CutError(f"the output of the drop path is used by {names}, not by one addition")
        (user,) = users
        if user.op == "output":
            raise CutError("the output of the drop path leaves the block without being added to anything")
        operands = added(user)
        if operands is not None:
            others = [operand for operand in operands if operand is not output]
            if len(others) != 1:
                raise CutError(f"{user.name} adds the branch to itself")
            return Sum(user, others[0], output, drop_path)
        if not _keeps_zero(user, output, block):
            raise CutError(f"{_describe(user)} comes between the drop path and the addition")
        output = user


def added(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of an addition of two values; None for other nodes."""
    is_addition = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in _ADDITION_METHODS
    )
    if not is_addition or (node.kwargs and node.kwargs != {"alpha": 1}) or len(node.args) != 2 or is_size(node):
        return None
    first, second = node.args
    return (first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None


def spell_out_additions(graph: fx.Graph, block: nn.Module) -> None:
    """Replace other forms of an addition by a plain one: `alpha=`, `addcmul`, a module that adds."""
    for node in list(graph.nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        alpha = node.kwargs.get("alpha")
        if name in ("add", "add_") and alpha is not None and alpha != 1 and len(node.args) == 2:
            _add(node, (node.args[1], alpha), node.args[0])
        elif name in ("addcmul", "addcmul_") and len(node.args) == 3 and not node.kwargs:
            _add(node, (node.args[1], node.args[2]), node.args[0])
        elif node.op == "call_module" and len(node.args) == 2 and not node.kwargs and _adds(node, block):
            node.op, node.target = "call_function", operator.add


def _add(node: fx.Node, factors: tuple[Any, Any], shortcut: Any) -> None:
    with node.graph.inserting_before(node):
        product = node.graph.call_function(operator.mul, factors)
    product.meta.update({key: node.meta[key] for key in ("shape", "dtype", "samples") if key in node.meta})
    node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (shortcut, product), {}


def _adds(node: fx.Node, block: nn.Module) -> bool:
    """Whether a child without parameters adds its two arguments: tried on numbers."""
    if not all(isinstance(argument, fx.Node) for argument in node.args):
        return False
    module = block.get_submodule(cast(str, node.target))
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or has_hooks(module):
        return False
    a, b = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[5.0, 7.0, -11.0]])
    try:
        with torch.no_grad():
            result = plain_class(module).forward(module, a, b)
            again = plain_class(module).forward(module, 2 * a, b)
    except Exception:  # It takes other arguments.
        return False
    return (
        isinstance(result, torch.Tensor)
        and result.shape == a.shape
        and torch.equal(result, a + b)
        and torch.equal(again, 2 * a + b)
    )


def _keeps_zero(node: fx.Node, value: fx.Node, block: nn.Module) -> bool:
    if node.op == "call_module":
        module = block.get_submodule(cast(str, node.target))
        return isinstance(module, _KEEPS_ZERO_MODULES) or "Scale" in type(module).__name__
    if node.op == "call_method":
        return node.args[0] is value and (node.target in _VIEWS or node.target in ("mul", "mul_"))
    return node.op == "call_function" and (node.target in _VIEW_FUNCTIONS or node.target in _PRODUCTS)


def _describe(node: fx.Node) -> str:
    target: Any = node.target
    return f"a call of {target if isinstance(target, str) else getattr(target, '__name__', target)}"


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all nodes that it is computed from; sizes of tensors do not count."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(argument for argument in current.all_input_nodes if not is_size(argument))
    return found


def cut(residual: Sum, block: nn.Module) -> Branch:
    """The nodes that belong only to the branch of a residual addition.

    Raises:
        CutError: if the drop path would not be skipped with it, or it changes a value from outside in place.
    """
    try:
        return _cut(residual, block, ("Attention", "Attn"))
    except CutError:
        if residual.drop_path is not None:
            raise
        # Other values that its children give may be used elsewhere.
        return _cut(residual, block, ("",))


def _cut(residual: Sum, block: nn.Module, names: Sequence[str]) -> Branch:
    """The branch, where children of classes with these names may give more than its output."""
    kept: set[fx.Node] = set() if residual.shortcut is None else ancestors(residual.shortcut)
    nodes = ancestors(residual.output) - kept
    sides = tuple(
        node for node in residual.add.graph.nodes if node not in nodes and _is_side(node, nodes, block, names)
    )
    # From the end to the start: nodes that are used outside the branch do not belong to it, and neither do their
    # inputs.
    for node in reversed(list(residual.add.graph.nodes)):
        if node in nodes and (
            node.op == "placeholder"
            or any(
                user not in nodes and user is not residual.add and user not in sides and not is_size(user)
                for user in node.users
            )
        ):
            nodes.discard(node)
    _leave_containers(nodes)
    if residual.output not in nodes or (residual.drop_path is not None and residual.drop_path not in nodes):
        raise CutError("the branch's output is used outside the sum")
    for node in nodes:
        if any(is_size(user) and _is_used_outside(user, nodes) for user in node.users):
            raise CutError(f"the size of {node.name}, which only the branch computes, is used outside of it")
    ordered = tuple(node for node in residual.add.graph.nodes if node in nodes)
    inputs = dict.fromkeys(source for node in ordered for source in _sources(node) if source not in nodes)
    for node in ordered:
        if _changes_one_of(inputs, node, block):
            raise CutError(f"{_describe(node)} changes the input of the branch in place, which the shortcut sees")
    later = list(residual.add.graph.nodes)
    for node in later[later.index(ordered[0]) : later.index(residual.add)]:
        # The branch runs at the place of the sum.
        if node not in nodes and _changes_one_of(inputs, node, block):
            raise CutError(f"{_describe(node)} changes the input of the branch in place before the sum")
    if not any(_computes(node, block) for node in ordered):
        raise CutError("everything that the branch computes is used outside it too")
    return Branch(ordered, tuple(inputs), tuple(side for side in sides if side.args[0] in nodes))


def _leave_containers(nodes: set[fx.Node]) -> None:
    """Items of a container that is made outside the branch are taken outside too, because inputs must be tensors."""
    for node in reversed(list(next(iter(nodes)).graph.nodes)) if nodes else ():
        if node in nodes and node.target in (operator.getitem, getattr) and _is_container(cast(fx.Node, node.args[0])):
            source = cast(fx.Node, node.args[0])
            if source not in nodes:
                nodes.discard(node)


def _is_container(node: fx.Node) -> bool:
    """Whether the value of a node is known to be a tuple or another container of tensors."""
    if "call" in node.meta:
        return "shape" not in node.meta
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _SPLITS


_SPLITS = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "hsplit", "vsplit", "unsafe_chunk"}


def _is_side(node: fx.Node, nodes: Collection[fx.Node], block: nn.Module, names: Sequence[str]) -> bool:
    if node.target is not operator.getitem:
        return False
    source, index = cast("tuple[fx.Node, Any]", node.args)
    start = index.start if isinstance(index, slice) else index
    if source not in nodes or source.op != "call_module" or not isinstance(start, int) or start < 1:
        return False
    kind = type(block.get_submodule(cast(str, source.target))).__name__
    return any(name in kind for name in names)


def _is_used_outside(size: fx.Node, nodes: Collection[fx.Node]) -> bool:
    return any(_is_used_outside(user, nodes) if is_size(user) else user not in nodes for user in size.users)


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    """The values that a node needs; for a size, the tensors that it is read from."""
    for argument in node.all_input_nodes:
        if is_size(argument):
            yield from _sources(argument)
        else:
            yield argument


def writes_in_place(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(block.get_submodule(cast(str, node.target)), "inplace", False))
    if node.op == "call_method":
        target = cast(str, node.target)
        return target.endswith("_") and not target.endswith("__")
    if node.op != "call_function" or is_size(node):
        return False
    if node.target in _CHANGES:
        return True
    name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "")
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and module != "_operator")


def _changes_one_of(values: Collection[fx.Node], node: fx.Node, block: nn.Module) -> bool:
    """Whether a node changes one of these values in place, itself or through views of it."""
    if "writes" in node.meta:  # It was recorded while running.
        return any(value in values for value in node.meta["writes"])
    if not writes_in_place(node, block) or not node.args:
        return False
    changed = cast(fx.Node, node.args[0])
    while changed not in values:
        name = changed.target if isinstance(changed.target, str) else getattr(changed.target, "__name__", "")
        if changed.op not in ("call_method", "call_function") or name not in _SAME_MEMORY:
            return False
        changed = cast(fx.Node, changed.args[0])
    return True


# Functions that may return a view of their first argument.
_SAME_MEMORY = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes",
    "permute", "movedim", "t", "expand", "expand_as", "narrow", "select", "chunk", "split", "unbind", "getitem",
    "contiguous", "detach", "unfold", "diagonal",
}  # fmt: skip
_CHANGES = {
    operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip


def _computes(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node is worth skipping: a child with parameters, or a function that multiplies."""
    if node.op == "call_module":
        return next(block.get_submodule(cast(str, node.target)).parameters(), None) is not None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _HEAVY


def is_plain(value: fx.Node, block: nn.Module) -> bool:
    """Whether a value is computed without anything worth skipping."""
    return not any(_computes(node, block) for node in ancestors(value))


_HEAVY = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "bmm",
    "mm",
    "addmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
}


def put_in_a_row(graph: fx.Graph, block: nn.Module) -> None:
    """Replace `x + (a + b)` by `(x + a) + b` if a and b are parallel branches, so that each has its own sum.

    The metadata of the new sums says which operand of which call in the block's own code their branch is (`operand`,
    `call`).
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    for outer in list(graph.nodes):
        operands = added(outer) or ()
        for shortcut, inner in (operands, operands[::-1]) if operands else ():
            parts = added(inner)
            if parts is None or list(inner.users) != [outer] or not _are_parallel(shortcut, *parts, block):
                continue
            if any(writes_in_place(node, block) for node in (inner, outer)):
                continue
            sums = [outer]
            with graph.inserting_before(outer):
                sums.insert(0, graph.call_function(operator.add))
            for node, part in zip(sums, sorted(parts, key=position.__getitem__), strict=True):
                meta = {**outer.meta, "operand": inner.args.index(part), "call": inner.meta.get("call")}
                node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (shortcut, part), {}
                node.meta = meta
                shortcut = node
            graph.erase_node(inner)
            break


def _are_parallel(shortcut: fx.Node, a: fx.Node, b: fx.Node, block: nn.Module) -> bool:
    """Whether both values are computed from a shortcut, each with its own layers."""
    kept, of_a, of_b = ancestors(shortcut), ancestors(a), ancestors(b)
    if shortcut.op == "get_attr" or shortcut not in of_a & of_b or _starts_at_zeros(a) or _starts_at_zeros(b):
        return False
    own = (of_a - of_b - kept, of_b - of_a - kept)
    return all(any(_computes(node, block) for node in nodes) for nodes in own)


def residual_sums(graph: fx.Graph, block: nn.Module) -> list[Sum]:
    """All residual additions in a recording, in order.

    An addition is one if both operands are computed from a common value, and one of them, the shortcut, is that value
    itself or computed from it by at most half as many children with parameters as the other, without any product of
    two values (a projection). A branch has at least one child with parameters. What was added to a shortcut before, by
    a parallel branch, does not count for it: in `x + attention(y) + mlp(y)` both are branches.
    """
    sums: list[Sum] = []
    bases: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        operands = added(node)
        if operands is None or operands[0] is operands[1]:
            continue
        for shortcut, output in (operands, operands[::-1]):
            base = bases.get(shortcut, shortcut)
            if any(_is_shortcut(each, output, block) for each in dict.fromkeys((shortcut, base))):
                sums.append(Sum(node, shortcut, output))
                bases[node] = base
                break
    return sums


def _is_shortcut(shortcut: fx.Node, output: fx.Node, block: nn.Module) -> bool:
    if _is_modulation(shortcut, output, block):
        return False
    of_shortcut, of_output = ancestors(shortcut), ancestors(output)
    if not any(_computes(node, block) for node in of_output - of_shortcut):
        return False
    if shortcut in of_output:
        return shortcut.op != "get_attr"
    if _starts_at_zeros(shortcut) or _starts_at_zeros(output):
        return False
    common = of_shortcut & of_output
    if not any(node.op != "get_attr" for node in common):
        return False
    projection = of_shortcut - of_output
    if any(node.op == "call_function" and not _is_cheap(node) for node in projection):
        return False
    branch = of_output - of_shortcut
    # Layers, or the children that contain them: a branch may be one child, and so may a projection.
    return 2 * _num_computing(projection, block) <= _num_computing(branch, block) or 2 * _num_layers(
        projection, block
    ) <= _num_layers(branch, block)


# Where sums of experts begin.
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_REDUCTIONS = {"mean", "std", "var", "amax", "amin", "norm", "median", "max", "min", "sum"}


def _starts_at_zeros(node: fx.Node) -> bool:
    """Whether a value is what a loop has added up, such as the outputs of experts."""
    while operands := added(node):
        node = operands[0]
    return _name_of(_seen_through(node)) in _ZEROS


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _seen_through(node: fx.Node) -> fx.Node:
    """The node that another is a view of, or a function with numbers only."""
    while node.op in ("call_function", "call_method"):
        sources = [each for each in node.all_input_nodes if not is_size(each)]
        is_view = node.target is operator.getitem and not isinstance(node.args[1], int)
        if len(sources) != 1 or not (is_view or _name_of(node) in _SAME_MEMORY - {"getitem"} | _WITH_NUMBERS):
            break
        node = sources[0]
    return node


_WITH_NUMBERS = {"add", "sub", "mul", "truediv", "div", "sqrt", "rsqrt", "clamp", "detach", "__radd__", "radd", "exp"}


def _is_modulation(shift: fx.Node, product: fx.Node, block: nn.Module) -> bool:
    """Whether a sum `x * scale + shift` is one of FiLM, AdaLN or RevIN: `scale` comes from where `shift` does.

    Either both are parts of one tensor, or both are statistics of one, or `x` has nothing to do with `shift`.
    """
    product = _seen_through(product)
    factors = [each for each in product.all_input_nodes if not is_size(each)]
    if _name_of(product) not in ("mul", "imul", "multiply", "mul_") or len(factors) != 2:
        return False
    shift = _seen_through(shift)
    of_shift = {node for node in ancestors(shift) if node.op != "get_attr"}
    for x, scale in (factors, factors[::-1]):
        source = _seen_through(scale)
        is_other = source is not shift and source.args[:1] == shift.args[:1]
        is_part = source.target is operator.getitem and shift.target is operator.getitem
        are_statistics = {_name_of(source), _name_of(shift)} <= _REDUCTIONS
        if is_other and (is_part or are_statistics):
            return True
        of_scale, of_x = ancestors(source), ancestors(x)
        is_apart = shift not in of_scale and of_shift & of_scale and not of_shift & of_x
        if is_apart and 0 < _num_computing(of_scale, block) <= _num_computing(of_x, block):
            return True
    return False


def _is_cheap(node: fx.Node) -> bool:
    """Whether a value is still a shortcut after this function: scaling by a number, padding, pooling, a view."""
    name = getattr(node.target, "__name__", "")
    if name in ("mul", "truediv", "div", "multiply", "add", "imul"):
        values = [each for each in node.all_input_nodes if each.op != "get_attr" and not is_size(each)]
        return len(values) <= 1
    if name in ("cat", "concat"):
        # Zeros appended to the shortcut, as in the authors' networks.
        return len([each for each in node.all_input_nodes if not is_size(each)]) <= 2
    return name in _CHEAP or name in _SAME_MEMORY


_CHEAP = {
    "pad", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool1d",
    "max_pool2d", "interpolate", "zeros", "zeros_like", "new_zeros", "dropout", "to", "clone", "getattr", "_after",
    "boolean_dispatch", "adaptive_avg_pool3d", "max_pool3d", "fn", "roll", "flip",
}  # fmt: skip


def _num_computing(nodes: Collection[fx.Node], block: nn.Module) -> int:
    return sum(_computes(node, block) for node in nodes)


def _num_layers(nodes: Collection[fx.Node], block: nn.Module) -> int:
    """Number of modules with parameters of their own that are called; a function that computes counts as one."""
    called = {node for node in nodes if node.op == "call_module"}
    inside = [
        module
        for node in called
        for module in block.get_submodule(cast(str, node.target)).modules()
        if any(value is not None for value in parameter_dict(module).values())
    ]
    return len(inside) + _num_computing([node for node in nodes if node not in called], block)


def move_behind_what_commutes(drop_path: fx.Node, block: nn.Module) -> None:
    """Move a drop path behind the linear maps that follow it, if nothing before it can be skipped.

    timm's ResNeSt drops the input of a block's projection shortcut, which the branch needs too. Dropping before and
    after a linear map of each sample is the same, and after it the map itself can be skipped.
    """
    if drop_path.op != "call_module":
        return
    source = drop_path.args[0]
    calls = [node for node in drop_path.graph.nodes if node.op == "call_module" and node.target == drop_path.target]
    if not isinstance(source, fx.Node) or len(calls) > 1:
        return
    if source.op != "placeholder" and all(user is drop_path or is_size(user) for user in source.users):
        return
    linear: list[fx.Node] = []
    while (user := _only_user(linear[-1] if linear else drop_path)) is not None:
        module = block.get_submodule(user.target) if user.op == "call_module" else None  # pyright: ignore
        if type(module) is nn.Sequential and not has_hooks(module):
            _call_children(user, module)
        elif type(module) in _LINEAR and getattr(module, "bias", None) is None:
            linear.append(user)
        else:
            break
    if any(_computes(node, block) for node in linear):
        last = linear[-1]
        with drop_path.graph.inserting_after(last):
            moved = drop_path.graph.call_module(cast(str, drop_path.target), (last,))
        moved.meta.update({**last.meta, "call": drop_path.meta.get("call")})
        last.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        drop_path.replace_all_uses_with(source)
        drop_path.graph.erase_node(drop_path)


_LINEAR = (
    nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if not is_size(user)]
    return users[0] if len(users) == 1 else None


def _call_children(call: fx.Node, sequential: nn.Sequential) -> None:
    value = cast(fx.Node, call.args[0])
    with call.graph.inserting_before(call):
        for name, _ in sequential.named_children():
            value = call.graph.call_module(f"{call.target}.{name}", (value,))
            # Of the shape only the number of samples is asked for.
            value.meta.update({key: call.meta[key] for key in ("shape", "dtype", "samples") if key in call.meta})
    call.replace_all_uses_with(value)
    call.graph.erase_node(call)


def name_values_changed_in_place(graph: fx.Graph, block: nn.Module) -> None:
    """Let all later users of a value that was changed in place use the result of the change, the same tensor."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _gives_what_it_changes(node, block) and isinstance(node.args[0], fx.Node):
            after = position[node]
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user: position[user] > after)  # noqa: B023  # pyright: ignore


def _gives_what_it_changes(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node changes its first argument and returns it.

    For a module of another library with an attribute `inplace`, it is unknown whether this refers to its input or to a
    step inside.
    """
    if node.op == "call_module" and not type(block.get_submodule(cast(str, node.target))).__module__.startswith(
        "torch.nn."
    ):
        return False
    return bool(node.args) and writes_in_place(node, block)
