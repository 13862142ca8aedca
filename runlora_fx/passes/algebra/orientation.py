"""Orientation: which values are stored transposed; price and emission use the same answer.

Example: a root that the incoming graph stores as ``dY' X``, row by row, is not computed as
``(X' dY)'``.

A root keeps its orientation. A value that only sums and scalings read has the orientation of their
results. Any other value has the orientation in which its largest leaf is not transposed: an
activation that is stored transposed would make the layouts of its readers transposed too.

Invariant: an operand of a matrix product has the same orientation in every plan of a problem. So
the search knows the layouts of a product's operands before it has a plan.
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
    """True if a value is stored transposed: a root, or an operand of a matrix product.

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
    """True if an operand of a matrix product is the transpose of the stored value."""
    _, transposed, core = normalise(operand)
    return transposed != lies_transposed(problem, core)


def orientations(problem: Problem, steps: Mapping[Value, Step]) -> dict[Polynomial, bool]:
    """By value of a plan, True if it is stored transposed.

    If two sums or scalings read a value, the first one in the order of the demands decides.

    Args:
        problem: The problem.
        steps: By value, its step.
    """
    settled = set(problem.shown_transposed)
    for value, step in steps.items():
        if not value.core.is_diag_part:  # dot products take either orientation
            along = step.along(value.core)
            settled.update(normalise(p).core for p in step.operands if p not in along)
    found: dict[Polynomial, bool] = {}
    # Sums pass their orientation to their operands. Values with a settled orientation come first.
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
