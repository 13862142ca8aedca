"""Opaque nodes: what must be computed exactly where and when the graph computes it."""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.read.modes import switched_nodes
from runlora_fx.passes.read.mutation import unstable_nodes


def opaque_nodes(graph: fx.Graph, dialect: Dialect) -> set[fx.Node]:
    """The nodes that are neither read nor taken for equal to another.

    They see a tensor that is modified in place, before or after, or run under a mode of their own.
    """
    unstable = unstable_nodes(graph, dialect)
    seeing = {node for node in graph.nodes if not unstable.isdisjoint(node.all_input_nodes)}
    return unstable | seeing | switched_nodes(graph)
