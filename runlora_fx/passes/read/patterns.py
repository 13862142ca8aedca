"""Patterns: a polynomial with its leaf numbers replaced by places.

Example: ``X A' B'`` with the leaves 7, 3 and 9 is the pattern ``0 1' 2'`` and the leaves (7, 3, 9).

Equal layers have polynomials of one pattern, so whatever follows from the pattern is computed once.

Invariant: two polynomials of one pattern differ only in the numbers of leaves, scalars and
assignments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from itertools import combinations, pairwise
from typing import NamedTuple

from runlora_fx.passes.algebra.polynomials import Polynomial


class Pattern(NamedTuple):
    """A pattern, and the leaves of one polynomial in the order of their first place.

    Attributes:
        number: The number of the pattern, equal for all its polynomials.
        matrices: Leaves.
        scalars: Scalar leaves.
        assignments: Assignments of tokens to experts.
    """

    number: int
    matrices: tuple[int, ...]
    scalars: tuple[int, ...]
    assignments: tuple[int, ...]

    def renamed(
        self, matrices: Mapping[int, int], scalars: Mapping[int, int]
    ) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """A key of the polynomial with other leaf numbers, if it has no assignments."""
        return (
            self.number,
            tuple([matrices[leaf] for leaf in self.matrices]),
            tuple([scalars[leaf] for leaf in self.scalars]) if self.scalars else (),
        )


class Patterns:
    """The patterns of the polynomials of one graph."""

    def __init__(self) -> None:
        """Start without any."""
        self._of: dict[Polynomial, Pattern] = {}
        self._numbers: dict[Hashable, int] = {}
        self._pairs: dict[int, list[tuple[int, int]]] = {}

    def of(self, p: Polynomial) -> Pattern:
        """The pattern of a polynomial, and its leaves."""
        found = self._of.get(p)
        if found is None:
            found = self._of[p] = self._found(p)
        return found

    def _found(self, p: Polynomial) -> Pattern:
        matrices: dict[int, int] = {}
        scalars: dict[int, int] = {}
        assignments: dict[int, int] = {}
        terms: list[Hashable] = []
        for word, c in p.terms:
            factors = tuple(
                [
                    (matrices.setdefault(leaf, len(matrices)), transposed, diagonal)
                    for leaf, transposed, diagonal in word.factors
                ]
            )
            by = tuple([scalars.setdefault(s, len(scalars)) for s in word.scalars])
            to = tuple([assignments.setdefault(k, len(assignments)) for k in word.scattered])
            terms.append((factors, by, word.diag_part, to, c))
        number = self._numbers.setdefault(tuple(terms), len(self._numbers))
        return Pattern(number, tuple(matrices), tuple(scalars), tuple(assignments))

    def pairs(self, p: Polynomial, picked: Callable[[int], int]) -> list[tuple[int, int]]:
        """The pairs of leaves of a polynomial: two polynomials can share a value only with a pair.

        A shared value is a product or a sum. A product has two leaves that are neighbours in a
        word. A sum of leaves has two leaves in the same place of words that are otherwise equal.
        ``X W' + X A' B'`` has the pairs ``X W``, ``X A`` and ``A B``. A single leaf is paired with
        itself, and so is a leaf that the identity is added to: ``X + X W'`` has ``X W`` and ``W
            W``.

        Args:
            p: The polynomial.
            picked: For a picked leaf the leaf that it is picked from; for others the leaf itself.
        """
        number, matrices, _, _ = self.of(p)
        places = self._pairs.get(number)
        if places is None:
            place = {leaf: i for i, leaf in enumerate(matrices)}
            places = self._pairs[number] = [(place[one], place[other]) for one, other in _pairs(p)]
        leaves = [picked(leaf) for leaf in matrices]
        return [(a, b) if (a := leaves[i]) <= (b := leaves[j]) else (b, a) for i, j in places]


def _pairs(p: Polynomial) -> list[tuple[int, int]]:
    found: dict[tuple[int, int], None] = {}
    places: dict[Hashable, list[int]] = defaultdict(list)
    products = {word.factors for word in p.words}
    for word in p.words:
        factors = word.factors
        for left, right in pairwise(factors):
            found[left.leaf, right.leaf] = None
        for i, factor in enumerate(factors):
            before, after = factors[:i], factors[i + 1 :]
            places[before, after].append(factor.leaf)
            if before + after in products:  # the identity stands in the same place
                found[factor.leaf, factor.leaf] = None
    for leaves in places.values():
        for pair in combinations(leaves, 2):
            found[pair] = None
    return list(found) or [(leaf, leaf) for leaf in sorted(p.leaves)]
