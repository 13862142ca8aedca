"""Analysis: what a graph computes, as problems to plan."""

from __future__ import annotations

from collections.abc import Collection

import sympy
import torch
from torch import fx

from runlora_fx._torch_compat import fake_mode_of, guard_range, size_hint
from runlora_fx.cost_model.devices.registry import computing
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import value_of
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.read.reader import Casts, GraphReader
from runlora_fx.passes.read.regions import Regions

#: Assumed size of a dimension that only the run knows (unbacked symbols) [elements].
_UNKNOWN_SIZE = 4096


class Analysis:
    """One graph as it came.

    Attributes:
        graph: The graph.
        dialect: Its level.
        effects: What its nodes do besides computing a value.
        reader: Its linear algebra.
        phases: What of it is forward, what backward.
        regions: What is planned together.
        posed: The problem of each region.
    """

    def __init__(self, graph: fx.Graph, dialect: Dialect, *, casts: Casts = "joined") -> None:
        """Read a graph.

        Args:
            graph: Every tensor node has an example tensor in ``meta["val"]``.
            dialect: The level of the graph.
            casts: What casts between floats are taken for.
        """
        self.graph = graph
        self.dialect = dialect
        self._mode = fake_mode_of(node.meta.get("val") for node in graph.nodes)
        self.effects = Effects(graph)
        self.reader = GraphReader(graph, dialect, self.effects, casts=casts)
        self.phases = Phases(graph)
        self.regions = Regions(self.reader, self.phases, self.hint)
        self.posed = [self.regions.pose(region) for region in self.regions.regions]

    def hint(self, size: Dim) -> int:
        """The size that a dimension had when the graph was traced."""
        if isinstance(size, int):
            return size
        return size_hint(sympy.sympify(size), self._mode, _UNKNOWN_SIZE)

    def leaves_of(self, region: int, nodes: Collection[fx.Node]) -> frozenset[int]:
        """The leaves of a region's problem that are some nodes."""
        matrices = self.reader.leaves.matrices
        return frozenset(
            own
            for own, leaf in enumerate(self.posed[region].matrices)
            if matrices[leaf].node in nodes
        )

    def nodes_of(self, region: int, leaves: Collection[int]) -> list[fx.Node]:
        """The nodes that some leaves of a region's problem are."""
        matrices, own = self.reader.leaves.matrices, self.posed[region].matrices
        nodes = (matrices[own[leaf]].node for leaf in leaves)
        return [node for node in nodes if node is not None]

    def guard(self, size: sympy.Expr, low: int, high: int | None) -> bool:
        """Have Dynamo check ``low <= size < high`` before every call; whether that is possible."""
        return guard_range(size, low, high, self._mode)


def device_of(graph: fx.Graph) -> torch.device:
    """Where a graph computes: the accelerator, if any of its tensors is on one."""
    values = (value_of(node) for node in graph.nodes)
    devices = dict.fromkeys(value.device for value in values if value is not None)
    return computing(devices)
