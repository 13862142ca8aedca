"""Tangents: what of a joint graph depends on the incoming gradients."""

from __future__ import annotations

from torch import fx


def tangent_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that need a tangent; none in an inference graph."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found
