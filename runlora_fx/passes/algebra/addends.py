"""Addends: a sum as the graph adds it up, before equal words are combined.

Example: ``X W' + 2 (X A') B'`` has the addends ``X W'`` and ``2 X A' B'``, one polynomial each.

Invariant: the sum of the addends is the polynomial of the value.
"""

from __future__ import annotations

from typing import TypeAlias

from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, polynomial

#: One polynomial for each product or leaf that is added up.
Addends: TypeAlias = tuple[Polynomial, ...]


def total(addends: Addends) -> Polynomial:
    """The sum of addends."""
    if len(addends) == 1:
        return addends[0]
    return polynomial(term for p in addends for term in p)


def scaled(addends: Addends, by: Scalar) -> Addends:
    """Every addend times a scalar."""
    return addends if by.is_one else tuple([p.scaled(by) for p in addends])


def transposed(addends: Addends) -> Addends:
    """Every addend transposed."""
    return tuple([p.T for p in addends])


def without_cancelled(addends: Addends) -> Addends:
    """The same sum without words that cancel, and without addends that are zero."""
    if len(addends) == 1:
        return addends
    left_over = set(total(addends).words)
    if left_over.issuperset(word for p in addends for word in p.words):
        kept = addends
    else:
        kept = tuple(polynomial((w, c) for w, c in p.terms if w in left_over) for p in addends)
    return tuple(p for p in kept if p.terms)
