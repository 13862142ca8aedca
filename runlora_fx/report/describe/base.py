"""Base: the product of a layer's weight that no adapter shares a value with.

    Y = X W' + s D(X) A' B'      ->      two regions: the adapter's, and that of ``X W'``

A dropped-out input or a cast keeps the two apart, so the adapter's algebra has no ``X W'``. It is
found as what is added to the adapter's result.

Invariant: what is found runs as it came. A base product whose region was changed is a site.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import fx

from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.read.regions import Region
from runlora_fx.report.describe.causes import behind, has_base
from runlora_fx.report.describe.origin import modules_of

#: How a base product is written, with the letters of :data:`~runlora_fx.report.text.text.LEGEND`.
FORMULA = "Y0 = X0 W'"


@dataclass(frozen=True)
class Base:
    """A product of an input and a weight, which is added to what an adapter computes.

    Attributes:
        modules: The modules that it comes from.
        flops: What it computes [FLOP].
    """

    modules: tuple[str, ...]
    flops: int


class Bases:
    """The base products of a graph, by the node that they are added up in."""

    def __init__(self, left_alone: Iterable[tuple[Region, PosedProblem]]) -> None:
        """Find them.

        Args:
            left_alone: The regions that run as they came, and their problems.
        """
        self._at: dict[fx.Node, list[Base]] = defaultdict(list)
        for region, posed in left_alone:
            for root, part in region.demands:
                flops = 0 if root.backward else _flops(posed.problem, posed.own(part))
                if flops:
                    self._at[root.node].append(Base(modules_of(region), flops))

    def of(self, region: Region, problem: Problem) -> Base | None:
        """The base product beside the adapters of a region; None if it has one of its own."""
        if has_base(problem):
            return None
        results = [root.node for root, _ in region.demands if not root.backward]
        beside = [base for node in results for base in self._at.get(node, ())]
        if not beside:
            sums = (node for node in self._at if not set(results).isdisjoint(behind(node)))
            beside = [base for node in sums for base in self._at[node]]
        mine = set(modules_of(region))
        of_the_layer = [base for base in beside if mine & set(base.modules)]
        return next(iter(of_the_layer or beside), None)


def _flops(problem: Problem, p: Polynomial) -> int:
    """What a product of two matrices in a sum computes [FLOP]; 0 if there is none."""
    for word in p.words:
        factors = word.without_diagonals
        if len(factors) != 2 or any(problem.leaves[f.leaf].kind == "ones" for f in factors):
            continue
        (rows, inner), (_, cols) = map(problem.extent, factors)
        batch = problem.leaves[factors[0].leaf].batch
        return 2 * prod(problem.dims[d] for d in (batch, rows, inner, cols) if d is not None)
    return 0
