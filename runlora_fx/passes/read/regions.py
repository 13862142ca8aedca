"""Regions: the parts of roots that must be planned together.

Example: the projections to queries, keys and values read one activation, whose gradient adds up
products of all three: they are one region. The projection of the output is another.

A root is a sum of independent parts, from which no common factor can be taken. Two parts of any
roots belong to one region if some value that is no leaf could be used for both.

Invariant: parts of two regions have no pair of leaves in common (:meth:`Patterns.pairs`). So no
plan shares a value between regions, and their costs are added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import fx

from runlora_fx.passes.algebra.factorise import components
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.steps import Pick
from runlora_fx.passes.read.incoming import Incoming
from runlora_fx.passes.read.made import Made
from runlora_fx.passes.read.patterns import Patterns
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.read.reader import GraphReader


@dataclass(frozen=True)
class Root:
    """A tensor that every plan must compute.

    Attributes:
        node: The node that holds it.
        polynomial: What it is, in leaves of the graph.
        parts: The independent parts of the sum that it is.
        backward: The phase it is computed in.
    """

    node: fx.Node
    polynomial: Polynomial
    parts: tuple[Polynomial, ...]
    backward: bool


@dataclass
class Region:
    """The parts of roots that are planned together, and the incoming steps that make them.

    Attributes:
        demands: The parts, each with its root.
        incoming: The steps of the incoming graph.
    """

    demands: list[tuple[Root, Polynomial]] = field(default_factory=list)
    incoming: list[Made] = field(default_factory=list)


class Regions:
    """All roots of a graph and the regions they fall into.

    Attributes:
        roots: In graph order.
        incoming: The steps of the incoming graph.
        regions: The regions that have demands.
    """

    def __init__(self, reader: GraphReader, phases: Phases, patterns: Patterns) -> None:
        """Group the roots of a graph.

        Args:
            reader: The linear algebra of the graph.
            phases: The phase of its nodes.
            patterns: The patterns of its polynomials.
        """
        self._leaves = reader.leaves.matrices
        self._patterns = patterns
        self._above: dict[Hashable, Hashable] = {}
        self.roots = [_root(reader, phases, node) for node in reader.roots]
        self.incoming = Incoming(reader, phases, {root.node: root.parts for root in self.roots})
        self.regions = self._grouped()

    def _grouped(self) -> list[Region]:
        """The regions that have demands."""
        parts = [(root, part) for root in self.roots for part in root.parts]
        demanded = [(self._pairs(part), root, part) for root, part in parts]
        made = [(self._pairs(step.polynomial), step) for step in self.incoming.steps]
        for pairs in [found[0] for found in demanded] + [found[0] for found in made]:
            for first, other in pairwise(pairs):
                self._above[self._find(other)] = self._find(first)
        regions: dict[Hashable, Region] = defaultdict(Region)
        for pairs, root, part in demanded:
            if not self._is_trivial(part):
                regions[self._find(pairs[0])].demands.append((root, part))
        homes = self._homes_of_picks([step for _, step in made])
        for pairs, step in made:
            key = homes.get(_of_pick(step)) or self._find(pairs[0])
            regions[key].incoming.append(step)
        return [region for region in regions.values() if region.demands]

    def _homes_of_picks(self, steps: Sequence[Made]) -> dict[int | None, Hashable]:
        """By leaf that a step picks, the region whose steps read it, if there is only one.

        A picked leaf has no pairs with other leaves, but it belongs to its products. If several
        regions read it, no plan of one of them can spare the pick.
        """
        readers: dict[int | None, set[Hashable]] = {
            leaf: set() for leaf in map(_of_pick, steps) if leaf is not None
        }
        for step in steps if readers else ():
            for leaf in [operand.leaf for operand in step.operands]:
                if leaf is not None and leaf.leaf in readers:
                    readers[leaf.leaf].add(self._find(self._pairs(step.polynomial)[0]))
        return {leaf: next(iter(keys)) for leaf, keys in readers.items() if len(keys) == 1}

    def _is_trivial(self, part: Polynomial) -> bool:
        """True if a part needs no computation of its own: a leaf, or a bias to broadcast."""
        if len(part) != 1:
            return False
        return sum([not self._leaves[f.leaf].is_ones for f in part.terms[0][0].factors]) <= 1

    def _pairs(self, p: Polynomial) -> list[tuple[int, int]]:
        """The pairs of leaves of a polynomial, with picked leaves replaced by their base."""
        return self._patterns.pairs(p, self._picked_from)

    def _picked_from(self, leaf: int) -> int:
        picked = self._leaves[leaf].picked
        return leaf if picked is None else picked.base

    def _find(self, key: Hashable) -> Hashable:
        while (above := self._above.setdefault(key, key)) != key:
            key = above
        return key


def _of_pick(step: Made) -> int | None:
    """The picked leaf that a step makes; None if it makes something else."""
    made = step.polynomial.leaf if isinstance(step.step, Pick) else None
    return None if made is None else made.leaf


def _root(reader: GraphReader, phases: Phases, node: fx.Node) -> Root:
    p = reader.expression(node)
    return Root(node, p, tuple(components(p)), phases.runs_backward(node))
