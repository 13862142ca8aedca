"""Notation of the steps that depend on the experts of tokens.

A grouped product of ``X`` with the matrices ``L`` of all experts -> ``X L[k]``

Invariant: ``[k]`` stands behind what is picked: ``(X L)[k]`` multiplies first, ``X L[k]`` does not.
"""

from __future__ import annotations

from runlora_fx.passes.algebra.steps import (
    GroupedOuter,
    GroupedProduct,
    Pick,
    ProductWithAll,
    Scatter,
    Step,
)


def by_expert(step: Step, operands: list[str]) -> str:
    """A step that depends on the experts of tokens, with brackets where they are needed."""
    match step:
        case Pick(_, k):
            return f"{operands[0]}[{assignment_name(k)}]"
        case ProductWithAll(_, _, k):
            return f"({' '.join(operands)})[{assignment_name(k)}]"
        case GroupedProduct(_, _, k, "left"):
            return f"{operands[0]}[{assignment_name(k)}] {operands[1]}"
        case GroupedProduct(_, _, k):
            return f"{operands[0]} {operands[1]}[{assignment_name(k)}]"
        case Scatter(_, k) if operands[0].startswith("("):
            return f"sum_{assignment_name(k)}{operands[0]}"
        case Scatter(_, k) | GroupedOuter(_, _, k):
            return f"sum_{assignment_name(k)}({' '.join(operands)})"
    raise TypeError(f"{step} depends on no assignment")


def assignment_name(k: int) -> str:
    """``k`` for the first assignment, ``k2`` for the second."""
    return f"k{k + 1}" if k else "k"
