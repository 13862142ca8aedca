"""Replacement: leaves of a polynomial are replaced by polynomials.

Example: ``3 Y V' + X W' V'`` with ``X W'`` for ``Y`` is ``4 X W' V'``.

Invariant: the result has the same value if each leaf equals the polynomial that replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping

from runlora_fx.passes.algebra.polynomials import (
    IDENTITY,
    Polynomial,
    Scalar,
    of_factors,
    polynomial,
)
from runlora_fx.passes.algebra.words import Word


def replaced(p: Polynomial, leaves: Mapping[int, Polynomial]) -> Polynomial:
    """Replace leaves by polynomials. Leaves of diagonal matrices stay.

    Raises:
        NotInNormalForm: If a product with one of them is not in normal form.
    """
    found: list[tuple[Word, float]] = []
    for word, c in p.terms:
        made = IDENTITY
        for factor in word.factors:
            by = leaves.get(factor.leaf)
            if by is None or factor.diagonal:
                made = made @ of_factors((factor,))
            else:
                made = made @ (by.T if factor.transposed else by)
        for w, by_number in made.scaled(Scalar(c, word.scalars)).terms:
            scattered = word.scattered or w.scattered
            is_vector = word.diag_part or w.diag_part
            found.append((w._replace(diag_part=is_vector, scattered=scattered), by_number))
    return polynomial(found)
