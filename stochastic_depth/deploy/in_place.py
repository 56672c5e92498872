"""Finds dropped branches that must return a copy of their input because later code may change it in place.

A dropped branch returns its input, which other code may use, such as the shortcut of a sum around it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import fx, nn

from stochastic_depth.copies import plain_class
from stochastic_depth.deploy.blocks import holders, unchanged_outputs
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit.errors import TraceError
from stochastic_depth.retrofit.finding.ways import recordings
from stochastic_depth.retrofit.rewriting.operations import writes_in_place
from stochastic_depth.torch_private import child_dict


def insert_copies_(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Make replacements of dropped branches return copies where needed.

    Args:
        model: the model; it is not changed.
        replacements: replacements of its modules; it is changed.
    """
    returning_input = {module for module, new in replacements.items() if _returns_input(new)}
    if not returning_input or not any(_writes_in_place(module) for module in model.modules()):
        return
    # From the end, so that only one of several in a row copies.
    for module in reversed(list(model.modules())):
        if module in returning_input and _may_be_written_after(model, module, replacements):
            replacements[module] = _copying(replacements[module])


def _returns_input(new: nn.Module) -> bool:
    if isinstance(new, fx.GraphModule):
        return bool(unchanged_outputs(new))
    return type(new) in (nn.Identity, nn.Sequential) and next(new.parameters(), None) is None


def _copying(new: nn.Module) -> nn.Module:
    if type(new) is nn.Sequential:
        return nn.Sequential(OrderedDict([*new.named_children(), ("copy", _copying(nn.Identity()))]))
    if not isinstance(new, fx.GraphModule):
        graph = fx.Graph()
        graph.output(graph.placeholder("input"))
        new = fx.GraphModule(nn.Module(), graph, "Copy")
    end = next(iter(reversed(new.graph.nodes)))
    for node in unchanged_outputs(new):
        with new.graph.inserting_before(end):
            end.replace_input_with(node, new.graph.call_method("clone", (node,)))
    new.recompile()
    return new


def _writes_in_place(module: nn.Module) -> bool:
    """Whether a module's own code changes a value in place; True if unknown."""
    plain = plain_class(module)
    if plain.__module__.startswith("torch.nn."):
        return bool(getattr(module, "inplace", False))
    try:
        graphs = [way.graph for way in recordings(module)]
    except (TraceError, TypeError, ValueError):  # ValueError: a forward without a signature
        return True
    return any(writes_in_place(node, module) for graph in graphs for node in graph.nodes)


def _may_be_written_after(model: nn.Module, module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> bool:
    for parent, name in holders(model, module):
        if plain_class(parent).forward is nn.Sequential.forward:
            children = list(child_dict(parent).items())
            position = [other for other, _ in children].index(name)
            written = _first_writes([child for _, child in children[position + 1 :] if child], replacements)
            if written or (written is None and _may_be_written_after(model, parent, replacements)):
                return True
        elif plain_class(parent).forward is not Residual.forward:  # A sum is a new tensor.
            return True
    return False


def _first_writes(modules: list[nn.Module], replacements: Mapping[nn.Module, nn.Module]) -> bool | None:
    """Whether the first module that does not just return its input may change it; None if all return it."""
    for module in modules:
        new = replacements.get(module, module)
        if plain_class(new).forward is nn.Sequential.forward:
            written = _first_writes(list(new.children()), replacements)
        elif plain_class(new).forward is Residual.forward:
            written = any(_first_writes([child], replacements) for child in new.children())
        else:
            is_own = not _returns_input(new) and (module in replacements or next(new.parameters(), None) is not None)
            written = any(_writes_in_place(part) for part in new.modules()) or (False if is_own else None)
        if written is not None:
            return written
    return None
