"""Formulas: what two plans have in common, line by line.

    Z = X A'            Z = X A'                     both: Z = X A'
    Y = X W' + Z B'     Y = X (W' + A' B')     ->    before: Y = X W' + Z B'
    dA = Z2' X          dA = B' Z                    after: Y = X (W' + A' B')

Invariant: lines that both plans have stand for the same value in both.
"""

from __future__ import annotations

import re

#: The letters that stand for intermediate results: in each plan they are given anew.
_OWN = re.compile(r"\b[MZ]\d*\b")


def in_common(before: str, after: str) -> tuple[list[str], list[str], list[str]]:
    """The lines of the first plan alone, of the second alone, and of both.

    Args:
        before: A plan, a value a line; a line reads values of earlier lines.
        after: Another plan for the same values.
    """
    first, second = before.splitlines(), after.splitlines()
    both: list[str] = []
    known: set[str] = set()
    for line in first:
        name, _, right = line.partition(" = ")
        if line in second and set(_OWN.findall(right)) <= known:
            both.append(line)
            known.add(name)
    return [x for x in first if x not in both], [x for x in second if x not in both], both
