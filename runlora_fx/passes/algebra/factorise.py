"""Factorisation: the independent parts of a sum, and every way to write a sum as a product.

Before -> after: ``X W' + X A' B'`` -> ``X (W' + A' B')``, its only complete factorisation.

Invariant: the product of both factors is the sum, up to rounding of coefficients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from math import prod

from runlora_fx.passes.algebra.polynomials import Polynomial, of_factors, polynomial, without_scalar
from runlora_fx.passes.algebra.words import Factor, Word

#: The largest number of ways to cut the other words, for each cut of the first word.
_MAX_CHOICES = 64


def components(p: Polynomial) -> list[Polynomial]:
    """Split a sum into parts between which nothing can be factored out.

    Words from which a common factor can be taken begin or end with it. So words that are connected
    by common first or last factors form a component. The cheapest evaluation of a sum evaluates its
    components separately and adds them.
    """
    if len(p) == 1:
        return [p]
    parent = list(range(len(p)))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    seen: dict[tuple[str, Factor, tuple[int, ...]], int] = {}
    for i, word in enumerate(p.words):
        if not word.factors:
            continue
        for end in (("first", word.factors[0]), ("last", word.factors[-1])):
            parent[find(i)] = find(seen.setdefault((*end, word.scattered), i))
    groups: dict[int, list[tuple[Word, float]]] = {}
    for i, term in enumerate(p.terms):
        groups.setdefault(find(i), []).append(term)
    return [Polynomial(tuple(group)) for group in groups.values()]


def factorisations(p: Polynomial) -> Iterator[tuple[Polynomial, Polynomial]]:
    """All (L, R) of at least one factor each with ``L @ R == p``; the leading number is in R.

    For a diagonal part, ``diag_part(L @ R) == p``. For a scattered polynomial,
    ``(L @ R).scattered(k) == p``.

    Some words of p can be cut in several places: ``X A + X B A`` is ``X (A + B A)`` and
    ``(X + X B) A``. Beyond a fixed number of combinations only the shortest and the longest L are
    tried.
    """
    if p.is_diag_part:
        p = p.matrix
    if p.is_partly_scattered:
        return
    if p.scattering is not None:
        p = p.unscattered
    if len(p) == 1:
        (word, c) = p.terms[0]
        for i in range(1, len(word.factors)):
            right = Polynomial(((Word(word.factors[i:], word.scalars), c),))
            yield of_factors(word.factors[:i]), right
        return
    # The leading word of p is the product of the leading words of L and R. So a cut of it
    # determines the words that L can have (they stand before R's leading word in p), and those of
    # R.
    leading, *others = [word.factors for word in p.words]
    for i in range(1, len(leading)):
        first, last = leading[:i], leading[i:]
        n = len(last)
        lefts = {w[:-n] for w in (leading, *others) if len(w) > n and w[-n:] == last}
        rights = {w[i:] for w in (leading, *others) if len(w) > i and w[:i] == first}
        options = [
            [j for j in range(1, len(w)) if w[:j] in lefts and w[j:] in rights] for w in others
        ]
        for cuts in _choices(options):
            pair = _divided_at(p, (i, *cuts))
            if pair is not None:
                yield pair


def _choices(options: list[list[int]]) -> Iterator[tuple[int, ...]]:
    """Every combination of one option each; if they are too many, only the first and the last."""
    if not all(options):
        return
    if prod(map(len, options)) <= _MAX_CHOICES:
        yield from product(*options)
    else:
        yield tuple(choice[0] for choice in options)
        yield tuple(choice[-1] for choice in options)


def _divided_at(p: Polynomial, cuts: tuple[int, ...]) -> tuple[Polynomial, Polynomial] | None:
    """L and R for a cut of every word; None if p is not their product."""
    leading, i = p.terms[0][0].factors, cuts[0]
    pieces = [
        (w.factors[:j], w.factors[j:], w.scalars, c)
        for (w, c), j in zip(p.terms, cuts, strict=True)
    ]
    _, left = without_scalar(
        polynomial((Word(u, scalars), c) for u, v, scalars, c in pieces if v == leading[i:])
    )
    common = Counter(left.terms[0][0].scalars)
    right = []
    for u, v, scalars, c in pieces:
        if u == leading[:i]:
            rest = Counter(scalars)
            rest.subtract(common)
            if min(rest.values(), default=0) < 0:
                return None
            right.append((Word(v, tuple(sorted(rest.elements()))), c))
    rest_of_p = polynomial(right)
    return (left, rest_of_p) if (left @ rest_of_p).close_to(p, rtol=1e-12) else None
