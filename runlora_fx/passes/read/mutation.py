"""Mutation: which tensors of a graph are modified in place.

Functional graphs have none but the final write-backs to their inputs. At the torch level
``x += 1`` or ``F.relu(x, inplace=True)`` change what later nodes read, so nothing that shares
memory with ``x``, or reads it, may be moved or be taken for equal to a twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from runlora_fx.passes.levels.forms import Product, Scale, Sum
from runlora_fx.passes.levels.level import Dialect

_IN_PLACE_OPERATORS = {
    *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow"),
    *("irshift", "isub", "itruediv", "ixor", "setitem"),
}


def unstable_nodes(graph: fx.Graph, dialect: Dialect) -> set[fx.Node]:
    """The tensors that are modified in place while the graph may still read them; their views."""
    nodes = list(graph.nodes)
    tail = len(nodes)
    # Write-backs at the very end come after every read.
    while tail and (nodes[tail - 1].op == "output" or _writes(nodes[tail - 1])):
        tail -= 1
    written = [target for node in nodes[:tail] for target in _writes(node)]
    if not written:
        return set()
    memory = _memory(nodes, dialect)
    touched = {memory[node] for node in written}
    return {node for node in nodes if memory[node] in touched}


def _writes(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node modifies."""
    target = node.target
    written: list[object]
    if isinstance(target, torch._ops.OpOverload):
        named = zip(target._schema.arguments, node.args, strict=False)
        written = [value for argument, value in named if _is_written(argument)]
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        in_place = (
            (node.op == "call_method" and name.endswith("_") and not name.endswith("__"))
            or (node.op == "call_function" and _is_in_place_function(target, name))
            or bool(node.kwargs.get("inplace"))
            or (node.op == "call_module" and getattr(_module_of(node), "inplace", False))
        )
        written = [node.kwargs.get("out"), *(node.args[:1] if in_place else ())]
    return [value for value in written if isinstance(value, fx.Node)]


def _is_written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_in_place_function(target: Any, name: str) -> bool:
    if getattr(target, "__module__", "") == "_operator":
        return name in _IN_PLACE_OPERATORS
    return name.endswith("_") and not name.endswith("__")


def _module_of(node: fx.Node) -> object:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def _memory(nodes: list[fx.Node], dialect: Dialect) -> dict[fx.Node, fx.Node]:
    """By node, the node whose memory it may share: its own, or that of its first argument."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.args[0] if node.args else None
        shares = isinstance(source, fx.Node) and not _is_fresh(node, dialect)
        owner[node] = owner[source] if shares and isinstance(source, fx.Node) else node
    return owner


def _is_fresh(node: fx.Node, dialect: Dialect) -> bool:
    """Whether a node's result is new memory for sure; else it may be a view of its argument."""
    if isinstance(node.target, torch._ops.OpOverload):
        return all(result.alias_info is None for result in node.target._schema.returns)
    return isinstance(dialect.read(node), Product | Sum | Scale)
