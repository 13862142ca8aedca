"""Analysis: the linear algebra of a graph, as regions and the problems that they pose.

Example: ``Y = X W' + 2 X A' B'`` and its gradients are one region, and one problem.

Invariant: if a region cannot be posed as a problem, the other regions are planned all the same.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import sympy
from torch import fx

from runlora_fx._torch_compat import fake_mode_of, size_hint
from runlora_fx.passes.algebra.posed import Dim, PosedProblem
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import facts_of
from runlora_fx.passes.read.casts import Casts
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.patterns import Patterns
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.read.posing import Poser
from runlora_fx.passes.read.reader import GraphReader
from runlora_fx.passes.read.regions import Region, Regions

#: Assumed size of a dimension that only the run knows (unbacked symbols) [elements].
UNKNOWN_SIZE = 4096


class Analysis:
    """Everything that was read from one incoming graph.

    Attributes:
        graph: The graph.
        dialect: Its level.
        effects: What its nodes do besides computing a value.
        reader: Its linear algebra.
        phases: The phase of its nodes.
        patterns: The patterns of its polynomials.
        regions: What is planned together.
        posed: The problem of each region.
        failures: The regions that cannot be posed as a problem, and why. They stay as they came.
    """

    def __init__(self, graph: fx.Graph, dialect: Dialect, *, casts: Casts = "joined") -> None:
        """Read a graph.

        Args:
            graph: Every tensor node has an example tensor in ``meta["val"]``.
            dialect: The level of the graph.
            casts: How casts between floats are read.
        """
        self.graph = graph
        self.dialect = dialect
        self._mode = fake_mode_of(node.meta.get("val") for node in graph.nodes)
        self.effects = Effects(graph)
        self.reader = GraphReader(graph, dialect, self.effects, casts=casts)
        self.phases = Phases(graph, self.reader.gradients, self.effects)
        self.patterns = Patterns()
        self.regions = Regions(self.reader, self.phases, self.patterns)
        # No method of this object: Python keeps objects that refer to each other until it looks for
        # garbage.
        hint = partial(hint_of, mode=self._mode)
        self._poser = Poser(self.reader, self.phases, self.regions.incoming, self.patterns, hint)
        self.failures: list[tuple[Region, Exception]] = []
        self.posed = self._posed()

    def _posed(self) -> list[PosedProblem]:
        """The problem of each region; a region that cannot be posed is no longer among them."""
        posed: dict[int, PosedProblem] = {}
        for i, region in enumerate(self.regions.regions):
            try:
                posed[i] = self._poser.pose(region)
            except Exception as error:  # one region's failure costs that region only
                self.failures.append((region, error))
        self.regions.regions = [self.regions.regions[i] for i in posed]
        return list(posed.values())

    def hint(self, size: Dim) -> int:
        """The size that a dimension had when the graph was traced."""
        return hint_of(size, self._mode)

    def leaves_of(self, region: int, nodes: Collection[fx.Node]) -> frozenset[int]:
        """The matrices of a region's problem that are held by some nodes, as they are.

        Tensors of more dimensions are left out: a plan would show them through views.
        """
        leaves = self.reader.leaves.matrices
        facts = ((node, facts_of(node)) for node in nodes)
        found = {node for node, known in facts if known is not None and len(known.shape) < 3}
        return frozenset(
            own
            for own, leaf in enumerate(self.posed[region].matrices)
            if leaves[leaf].node in found
        )


def hint_of(size: Dim, mode: Any) -> int:
    """The size that a dimension had when the graph was traced in a fake mode."""
    return size if isinstance(size, int) else size_hint(sympy.sympify(size), mode, UNKNOWN_SIZE)
