"""Dimensions: which sizes of a region must be equal, because matrices are multiplied or added.

Example: ``X W' + 2 X A' B'`` has four dimensions: tokens, inputs, outputs and the rank.

Two dimensions may have the same size and still differ: a square weight has an input and an output
side. So the cost of a plan is a formula in tokens, features and ranks.

Invariant: two sides have one dimension only if the region's algebra makes their sizes equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.algebra.words import Factor
from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.read.leaves import Leaf

#: (leaf, 0 for rows, 1 for columns, 2 for batch); (-1 - assignment, 0 for tokens, 1 for experts).
_Side: TypeAlias = tuple[int, int]


class DimClasses:
    """The dimensions of some leaves, unified over polynomials.

    Attributes:
        leaves: The leaves, by number.
        sizes: The size of every dimension, as the graph has it.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        polynomials: Sequence[Polynomial],
        assignments: Sequence[TokenAssignment] = (),
    ) -> None:
        """Unify the sides of leaves that products, sums and picks require to be equal.

        Args:
            leaves: The leaves, by number.
            polynomials: The polynomials that are made of them.
            assignments: The assignments, by number.
        """
        self.leaves = leaves
        self._parent: dict[_Side, _Side] = {}
        for i, leaf in enumerate(leaves):
            if leaf.diagonal:
                self._join((i, 0), (i, 1))
            if leaf.picked is not None:
                base, k = leaf.picked
                self._join((i, 0), (base, 0))
                self._join((i, 1), (base, 1))
                self._join((i, 2), (-1 - k, 0))
                self._join((base, 2), (-1 - k, 1))
        for p in polynomials:
            first = p.shown
            for word in p.words:
                factors = word.factors
                if not factors:  # the identity: what it is added to is square
                    self._join(_start(first[0]), _end(first[-1]))
                    continue
                for left, right in pairwise(factors):
                    self._join(_end(left), _start(right))
                self._join(_start(factors[0]), _start(first[0]))
                self._join(_end(factors[-1]), _end(first[-1]))
                for factor in factors:
                    if word.scattered:
                        self._join((factor.leaf, 2), (-1 - word.scattered[0], 0))
                    elif leaves[factor.leaf].batched:
                        self._join((factor.leaf, 2), _batch(p, first[0]))
        self._index: dict[_Side, int] = {}
        sizes: list[Dim] = []
        for i, leaf in enumerate(leaves):
            for side, size in enumerate((leaf.rows, leaf.cols, leaf.batch)):
                if side == 2 and not leaf.batched:
                    continue
                root = self._find((i, side))
                if root not in self._index:
                    self._index[root] = len(sizes)
                    sizes.append(size)
        for k, assignment in enumerate(assignments):
            for side, size in enumerate((assignment.tokens, assignment.experts)):
                root = self._find((-1 - k, side))
                if root not in self._index:
                    self._index[root] = len(sizes)
                    sizes.append(size)
        self.sizes = tuple(sizes)

    def of(self, leaf: int) -> tuple[int | None, int, int]:
        """Indices of a leaf's batch, rows and columns in :attr:`sizes`."""
        rows, cols = (self._index[self._find((leaf, side))] for side in (0, 1))
        batch = self._index[self._find((leaf, 2))] if self.leaves[leaf].batched else None
        return batch, rows, cols

    def of_assignment(self, k: int) -> tuple[int, int]:
        """Indices of the tokens and the experts of an assignment in :attr:`sizes`."""
        tokens, experts = (self._index[self._find((-1 - k, side))] for side in (0, 1))
        return tokens, experts

    def _find(self, side: _Side) -> _Side:
        while (above := self._parent.get(side, side)) != side:
            side = above
        return side

    def _join(self, a: _Side, b: _Side) -> None:
        self._parent[self._find(a)] = self._find(b)


def _batch(p: Polynomial, first: Factor) -> _Side:
    """The batch of a polynomial that is shown by the given factor."""
    scattered = next((word.scattered for word in p.words if word.factors), ())
    return (-1 - scattered[0], 1) if scattered else (first.leaf, 2)


def _start(factor: Factor) -> _Side:
    return (factor.leaf, 1 if factor.transposed else 0)


def _end(factor: Factor) -> _Side:
    return (factor.leaf, 0 if factor.transposed else 1)
