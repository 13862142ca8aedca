"""Formulas: what a plan computes in another way than the graph that came, line by line.

    Z = X A'            Y = X (W' + A' B')
    Y = X W' + Z B'     dX = dY W              ->    Y = X (W' + A' B'), and dX as before
    dX = dY W

Invariant: what is said to be as before stands for the same value in both.
"""

from __future__ import annotations

import re

#: The letters that stand for intermediate results: each plan gives them anew.
_OWN = re.compile(r"\b[MZ]\d*\b")


def changes(before: str, after: str) -> tuple[list[str], list[str]]:
    """The lines of a plan that the graph as it came does not have, and the names of the others.

    Args:
        before: How the graph computed its values, a value a line; lines read earlier lines.
        after: The plan.
    """
    came = set(before.splitlines())
    new: list[str] = []
    kept: list[str] = []
    for line in after.splitlines():
        name, _, right = line.partition(" = ")
        if line in came and set(_OWN.findall(right)) <= set(kept):
            kept.append(name)
        else:
            new.append(line)
    return new, kept
