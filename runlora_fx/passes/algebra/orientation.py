"""Orientation: which values lie in memory as their transpose, decided once for price and emission.

Example: a gradient that the graph shows as ``dY' X``, row by row, is computed so, and not as
``(X' dY)'``.

What the graph shows lies as it is shown. What only sums and scalings read lies as their results do.
Any other value lies in the orientation in which its largest leaf stands untransposed: an activation
computed transposed would drag transposed layouts through whatever reads it.

Invariant: what a matrix product reads lies the same way in every plan of a problem. So the search
knows the layouts of a product's operands before it has a plan, and prices what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from runlora_fx.passes.algebra.polynomials import Polynomial, normalise
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Keep, Step
from runlora_fx.passes.algebra.words import Factor


@lru_cache(maxsize=1 << 14)
def lies_transposed(problem: Problem, core: Polynomial) -> bool:
    """True if a value that the graph shows, or that a matrix product reads, lies transposed.

    Args:
        problem: The problem.
        core: The value, normalised.
    """
    shown = problem.shown_transposed.get(core)
    if shown is not None:
        return shown

    def size(factor: Factor) -> int:
        spec = problem.leaves[factor.leaf]
        return problem.dims[spec.rows] * problem.dims[spec.cols]

    factors = [f for word in core.words for f in word.without_diagonals]
    return bool(factors) and max(factors, key=size).transposed


def is_turned(problem: Problem, operand: Polynomial) -> bool:
    """True if an operand of a matrix product is the transpose of what lies in memory."""
    _, transposed, core = normalise(operand)
    return transposed != lies_transposed(problem, core)


def orientations(problem: Problem, steps: Mapping[Value, Step]) -> dict[Polynomial, bool]:
    """By value of a plan, True if it lies transposed.

    Where two sums or scalings read a value, the first of them decides, in the order of the demands.

    Args:
        problem: The problem.
        steps: How every value is computed.
    """
    settled = set(problem.shown_transposed)
    for value, step in steps.items():
        if not value.core.is_diag_part:  # dot products take either
            along = step.along(value.core)
            settled.update(normalise(p).core for p in step.operands if p not in along)
    found: dict[Polynomial, bool] = {}
    # Sums pass their orientation on: those come first whose own does not depend on another's.
    read = [value for value in steps if value.core in settled]
    pending = [*steps, *reversed(read), *reversed(problem.demands)]  # the last is the next
    while pending:
        value = pending.pop()
        core, made_by = value.core, steps.get(value)
        lies = found.setdefault(core, lies_transposed(problem, core))
        if isinstance(made_by, Keep):
            pending.append(Value(core, False))
        elif made_by is not None:
            for p in made_by.along(core):
                _, transposed, below = normalise(p)
                if below not in found:
                    is_read = below in settled
                    found[below] = (
                        lies_transposed(problem, below) if is_read else transposed != lies
                    )
                    phases = (Value(below, True), Value(below, False))
                    pending += [v for v in phases if v in steps]
    return found
