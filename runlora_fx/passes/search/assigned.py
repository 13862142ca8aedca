"""Assigned: the steps towards values that depend on the expert of each token.

Before -> after: ``X[t] (W[k] + s L[k] R[k])`` -> a grouped product with ``W + s L R``, or the sum
of ``X W[k]`` and ``s (X L[k]) R[k]``, a grouped product each. With an index k, also
``(X M)[k]`` for ``X M[k]``: a product with the matrices of all experts, and then the pick.

Invariant: a matrix that is picked by offsets is never written. Grouped products that the operator
would refuse are not proposed; :func:`refusal` gives the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from runlora_fx.passes.algebra.assignments import picking, unpicked
from runlora_fx.passes.algebra.factorise import factorisations
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.algebra.steps import (
    GroupedOuter,
    GroupedProduct,
    Pick,
    Product,
    ProductWithAll,
    Scatter,
    Step,
)


def is_assigned(problem: Problem, core: Polynomial) -> bool:
    """True if a value depends on the experts of tokens, so this module lists its steps."""
    if not problem.assignments:
        return False
    is_scattered = any(word.scattered for word in core.words)
    return is_scattered or any(problem.leaves[leaf].picked is not None for leaf in core.leaves)


def assigned_steps(problem: Problem, core: Polynomial) -> Iterator[Step]:
    """The steps towards a value, without sums."""
    if core.is_partly_scattered:
        return
    if core.scattering is not None:
        yield from _scattered_steps(problem, core, core.scattering)
        return
    k = picking(problem.leaves, core)
    if k is not None:
        if problem.assignments[k].kind == "grouped":
            return
        yield Pick(unpicked(problem.leaves, core), k)
    for left, right in factorisations(core):
        by = [picking(problem.leaves, p) for p in (left, right)]
        grouped = [k is not None and problem.assignments[k].kind == "grouped" for k in by]
        match by, grouped:
            case _, [False, False]:
                yield Product(left, right)
                yield from _products_with_all(problem, left, right, by)
            case [_, int(k)], [False, True] if _is_served(problem, k, left, right, 0):
                yield GroupedProduct(left, unpicked(problem.leaves, right), k, "right")
            case [int(k), _], [True, False] if _is_served(problem, k, left, right, 2):
                yield GroupedProduct(unpicked(problem.leaves, left), right, k, "left")


def _products_with_all(
    problem: Problem, left: Polynomial, right: Polynomial, by: Sequence[int | None]
) -> Iterator[Step]:
    """The product of all tokens with a stack, instead of with the matrices picked from it."""
    if (left @ right).is_diag_part:
        return
    match by:
        case [None, int(k)] if problem.shape(left)[0] == problem.assignments[k].tokens:
            yield ProductWithAll(left, unpicked(problem.leaves, right), k, "right")
        case [int(k), None] if problem.shape(right)[0] == problem.assignments[k].tokens:
            yield ProductWithAll(unpicked(problem.leaves, left), right, k, "left")


def refusal(problem: Problem) -> str | None:
    """Why grouped products with some matrices of a problem are not proposed; None if all are."""
    for leaf in problem.leaves:
        if leaf.picked is None:
            continue
        assignment = problem.assignments[leaf.picked.assignment]
        for width in sorted(problem.dims[d] for d in (leaf.rows, leaf.cols)):
            if assignment.kind == "grouped" and width % assignment.multiple:
                return (
                    f"grouped products take widths that are multiples of {assignment.multiple}, "
                    f"not {width}"
                )
    return None


def _scattered_steps(problem: Problem, core: Polynomial, k: int) -> Iterator[Step]:
    """The steps towards sums over the tokens of each expert."""
    leaves, is_indexed = problem.leaves, problem.assignments[k].kind == "indexed"
    if is_indexed:
        yield Scatter(core.unscattered, k)
    for left, right in factorisations(core):
        if picking(leaves, right) == k:
            yield Product(left.scattered(k), unpicked(leaves, right))
        if picking(leaves, left) == k:
            yield Product(unpicked(leaves, left), right.scattered(k))
        if not is_indexed and _is_served(problem, k, left, right, 1):
            yield GroupedOuter(left, right, k)


def _is_served(
    problem: Problem, k: int, left: Polynomial, right: Polynomial, one: Literal[0, 1, 2]
) -> bool:
    """True if one operator multiplies: each token has one vector, and both widths are aligned.

    Args:
        problem: The problem.
        k: The assignment.
        left: The left operand, for each token.
        right: The right operand, for each token.
        one: Which of rows, inner dimension and columns has to be 1; the others are the widths.
    """
    assignment = problem.assignments[k]
    batch, rows, inner = problem.shape(left)
    sizes = [problem.dims[d] for d in (rows, inner, problem.shape(right)[2])]
    is_one = sizes.pop(one) == 1
    return (
        batch == assignment.tokens
        and is_one
        and not any(width % assignment.multiple for width in sizes)
    )
