"""Pairs: what two polynomials must have in common to share a value other than a leaf.

Example: ``X W' + X A' B'`` shows the pairs ``X W``, ``X A`` and ``A B``, and ``dY B`` none of them.

Invariant: polynomials with no pair in common share no value but leaves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from itertools import combinations, pairwise

from runlora_fx.passes.algebra.polynomials import Polynomial


def pairs(p: Polynomial, picked: Mapping[int, int]) -> list[Hashable]:
    """What two polynomials must have in common to share a value other than a leaf.

    That is a product, which shows two leaves next to each other in some word; or a sum of leaves,
    that is of such as stand in the same place of words that are otherwise alike. A lone leaf is
    paired with itself.

    Args:
        p: The polynomial.
        picked: By leaf, what it is picked from: it is taken for that.
    """

    def of(leaf: int) -> int:
        return picked.get(leaf, leaf)

    found: dict[Hashable, None] = {}
    places: dict[Hashable, list[int]] = defaultdict(list)
    for word in p.words:
        factors = word.factors
        for left, right in pairwise(factors):
            found[_pair(of(left.leaf), of(right.leaf))] = None
        for i, factor in enumerate(factors):
            places[factors[:i], factors[i + 1 :]].append(of(factor.leaf))
    for leaves in places.values():
        for one, other in combinations(leaves, 2):
            found[_pair(one, other)] = None
    return list(found) or [(of(leaf), of(leaf)) for leaf in sorted(p.leaves)]


def _pair(one: int, other: int) -> tuple[int, int]:
    return (min(one, other), max(one, other))
