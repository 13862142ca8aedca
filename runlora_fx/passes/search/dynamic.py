"""Dynamic shapes: one plan for a range of sizes, and guards on the range.

Before -> after: layers of ``s0`` tokens, traced with 500 -> the plan for ``s0 >= 77``, and a guard.
For fewer tokens the graph is compiled again.

Invariant: the plan of a range never runs at a size outside of the range.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import sympy

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.plan import incoming_cost, incoming_operations
from runlora_fx.passes.algebra.posed import Dim, PosedProblem
from runlora_fx.passes.search.decide import (
    Decision,
    Priced,
    alternatives,
    decide,
    replaces,
    saving,
)
from runlora_fx.passes.search.ranges import Range, ranges
from runlora_fx.passes.search.varying import Varying

#: The largest number of different sizes with guards. Each can double the number of compilations.
_MAX_SIZES = 3

#: ``guard(size, low, high)`` restricts the compiled code to ``low <= size < high``; False if it
#: cannot.
Guard: TypeAlias = Callable[[sympy.Expr, int, int | None], bool]


def varying_of(
    posed: PosedProblem, objective_of: Callable[[str], Objective]
) -> tuple[sympy.Expr, Varying] | None:
    """The size that varies in a problem; None if there is none, or more than one."""
    sizes = {size for size in posed.dims if not isinstance(size, int)}
    if len(sizes) != 1:
        return None
    size = sizes.pop()
    dims = frozenset(i for i, own in enumerate(posed.dims) if own == size)
    objective = objective_of(posed.problem.dtype)
    return sympy.sympify(size), Varying.of(posed.problem, dims, objective)


def decide_all(
    posed: Sequence[PosedProblem],
    objective_of: Callable[[str], Objective],
    hint: Callable[[Dim], int],
    guard: Guard | None,
) -> list[Decision]:
    """Decide about all problems of a graph.

    Args:
        posed: The problems.
        objective_of: By dtype, the objective that ranks plans.
        hint: The size that a symbolic dimension had when the graph was traced.
        guard: Adds guards on sizes. Without it the plans are those for the traced sizes.
    """
    decisions = [decide(p.problem, objective_of(p.problem.dtype)) for p in posed]
    if guard is None:
        return decisions
    groups: dict[sympy.Expr, dict[int, Varying]] = defaultdict(dict)
    for i, p in enumerate(posed):
        found = varying_of(p, objective_of)
        if found is not None:
            groups[found[0]][i] = found[1]
    heaviest = sorted(
        groups.items(),
        key=lambda group: -sum(int(incoming_cost(posed[i].problem).flops) for i in group[1]),
    )
    for size, varying in heaviest[:_MAX_SIZES]:
        here = hint(size)
        inside = next(r for r in ranges(Counter(varying.values())) if r.contains(here))
        if guard(size, inside.low, inside.high):
            for i, v in varying.items():
                decisions[i] = _in_range(posed[i], v, size, inside)
    return decisions


def _in_range(posed: PosedProblem, varying: Varying, size: sympy.Expr, inside: Range) -> Decision:
    """The decision for a problem by the plan of a range, with the costs at the traced size."""
    problem, objective = posed.problem, varying.objective
    plan = inside.plans[varying]
    considered = alternatives(problem, objective)
    came = Priced.of(incoming_operations(problem), objective)
    named = inside.named(size)
    where = f" where {named}" if named else ""
    if plan is None:
        reason = f"left alone: the graph as it came is the cheapest{where}"
        if not inside.is_best_as_it_came(varying):
            sizes = f"where {named}" if named else "at all sizes"
            reason = f"left alone: no plan is as cheap as the graph as it came {sizes}"
        return Decision(None, False, came.cost, came.cost, reason, considered)
    runs = Priced.of(plan.operations(problem), objective)
    reason = f"changed{where}: {saving(objective, problem, plan)}"
    if not replaces(objective, came, runs):
        reason = f"changed{where}: costs as much at the traced size, and less at others"
    return Decision(plan, True, came.cost, runs.cost, reason, considered)
