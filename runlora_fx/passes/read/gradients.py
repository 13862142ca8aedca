"""Gradients: which nodes of a joint graph depend on the gradients that come into its backward.

AOTAutograd names the placeholders of these gradients ``tangents_1``, ``tangents_2``, ...:

    primals_1, tangents_1            primals_1 and mm run without a gradient
    mm = primals_1 @ w        ->     mm_1 needs one
    mm_1 = tangents_1 @ w'

Invariant: a graph without a backward has no such nodes.
"""

from __future__ import annotations

from torch import fx


def gradient_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that an incoming gradient reaches."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if "tangents" in str(node.target):
                found.add(node)
        elif found and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
