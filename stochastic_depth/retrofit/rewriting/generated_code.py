"""Generates Python code from a graph."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from stochastic_depth.retrofit.errors import TraceError

Code = Callable[..., Any]
"""A function `(block, *arguments)`."""


def compiled(graph: fx.Graph, description: str) -> Code:
    """A function `(block, *arguments)` that runs the graph.

    Raises:
        TraceError: if it contains something that code cannot name.
    """
    constants: dict[str, Any] = {"__builtins__": builtins}
    names: dict[fx.Node, str] = {}
    last_use: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        for used in node.all_input_nodes:
            if not any(used in ends for ends in last_use.values()):
                last_use.setdefault(node, []).append(used)

    def constant(value: Any) -> str:
        name = f"constant_{len(constants)}"
        constants[name] = value
        return name

    def source(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) in (tuple, fx.immutable_collections.immutable_list, list):  # pyright: ignore
            items = "".join(f"{source(item)}, " for item in value)
            return f"({items})" if isinstance(value, tuple) else f"[{items}]"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{constant(type(value))}({', '.join(map(source, cast('tuple[Any]', value)))})"
        if isinstance(value, dict):
            pairs = ", ".join(f"{source(key)}: {source(item)}" for key, item in cast("dict[Any, Any]", value).items())
            return f"{{{pairs}}}"
        if isinstance(value, slice):
            part = cast("slice[Any, Any, Any]", value)
            return f"slice({source(part.start)}, {source(part.stop)}, {source(part.step)})"
        return constant(value)

    def arguments(args: Sequence[Any], kwargs: Mapping[str, Any], first: str = "") -> str:
        given = [source(argument) for argument in args]
        plain = {key: value for key, value in kwargs.items() if key.isidentifier() and not keyword.iskeyword(key)}
        given += [f"{key}={source(value)}" for key, value in plain.items()]
        others = {key: value for key, value in kwargs.items() if key not in plain}
        if others:
            given.append(f"**{source(others)}")
        return ", ".join(filter(None, [first, *given]))

    lines: list[str] = []
    parameters: list[str] = []
    for index, node in enumerate(graph.nodes):
        names[node] = f"v{index}"
        if node.op == "placeholder":
            parameters.append(names[node])
            continue
        if node.op == "output":
            lines.append(f"return {source(node.args[0])}")
            continue
        if node.op == "get_attr":
            lines.append(f"{names[node]} = {_reached('block', node.meta.get('path') or str(node.target).split('.'))}")
        elif node.op == "call_module":
            lines.append(
                f"{names[node]} = {_reached('block', str(node.target).split('.'))}({arguments(node.args, node.kwargs)})"
            )
        elif node.op == "call_method":
            receiver, *others = node.args
            given = arguments(others, node.kwargs)
            lines.append(f"{names[node]} = {source(receiver)}.{node.target}({given})")
        else:
            first = "block" if node.meta.get("takes_block") else ""
            lines.append(f"{names[node]} = {constant(node.target)}({arguments(node.args, node.kwargs, first)})")
        gone = [names[used] for used in last_use.get(node, ()) if used is not node]
        if not node.users:
            gone.append(names[node])
        if gone:
            lines[-1] += f"; {' = '.join(gone)} = None"
    body = "\n    ".join(lines)
    text = f"def forward({', '.join(['block', *parameters])}):\n    {body}\n"
    try:
        exec(compile(text, f"<{description}>", "exec"), constants)
    except SyntaxError as error:
        raise TraceError(f"its code cannot be generated: {error}") from error
    return constants["forward"]


def _reached(owner: str, path: Sequence[Any]) -> str:
    for name in path:
        if isinstance(name, tuple):
            kind, key = cast("tuple[str, Any]", name)
            owner += f"[{key!r}]" if kind == "item" else f".{key}"
        elif isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
            owner += f".{name}"
        elif isinstance(name, str) and name.isdigit():
            owner = f"getattr({owner}, {name!r})"
        else:
            owner += f"[{name!r}]"
    return owner
