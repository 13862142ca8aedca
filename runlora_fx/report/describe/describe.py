"""Describe: a region and its decision become a site of the report.

``X W' + s (X A') B'`` and the plan ``X (W + s B A)'`` -> a :class:`Site` with both as text, their
FLOPs and the reason.

Invariant: every region that was changed is a site. A region that was left alone is a site only if
some word has at least three factors, because then there are several orders to evaluate it in. So
plain linear layers are no sites.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import TypeAlias

import sympy

from runlora_fx.cost_model.cost import Amount
from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.plan import Plan, incoming_cost, incoming_operations
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, normalise
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.read.regions import Region
from runlora_fx.passes.search.decide import Decision
from runlora_fx.passes.search.ranges import break_even
from runlora_fx.passes.search.varying import Varying
from runlora_fx.report.data import Candidate, Site
from runlora_fx.report.describe.base import FORMULA, Base
from runlora_fx.report.describe.causes import causes_of
from runlora_fx.report.describe.notation import Names, algebra, first_step
from runlora_fx.report.describe.origin import modules_of
from runlora_fx.report.describe.price_causes import LeftAlone
from runlora_fx.report.figures.plotting import figures_of
from runlora_fx.report.sites import Cause

_log = logging.getLogger("runlora_fx")

#: The sites that were described already, by everything but their modules. The identity of a
#: decision is part of the key. The decision is stored too, so that no other object gets its
#: address.
Known: TypeAlias = dict[Hashable, tuple[Decision, Site]]

#: The largest effort of the search for which a site gets a break-even. The break-even needs a
#: search at several sizes, and each takes about as much work as the one that chose the plan.
MOST_EFFORT = 20_000


def describe(
    region: Region,
    posed: PosedProblem,
    decision: Decision,
    changed: bool,
    objective: Objective,
    known: Known,
    memory: str = "balanced",
    base: Base | None = None,
) -> Site | None:
    """A region as a site; None if it was left alone and has no low-rank word.

    Args:
        region: The region.
        posed: Its problem.
        decision: Its decision.
        changed: True if the plan was emitted.
        objective: The objective that ranked plans.
        known: The sites that were described already. Equal layers are described once.
        memory: The option ``memory``.
        base: The base product that is added to what the region's adapters compute.
    """
    if not changed and not posed.problem.has_products_of_products:
        return None
    # Equal regions have one problem, and so equal demands in its numbers.
    found = known.get((id(posed.problem), id(decision), changed))
    if found is None:
        parts = [normalise(posed.own(part)) for _, part in region.demands]
        scalars = {part.core: part.scalar for part in reversed(parts)}
        same = (posed.problem, posed.dims, tuple(scalars.items()), objective)
        key = (*same, id(decision), changed)
        found = known.get(key)
        if found is None:
            found = decision, _site(posed, scalars, decision, changed, objective, memory)
        known[key] = known[id(posed.problem), id(decision), changed] = found
    site = replace(found[1], modules=modules_of(region))
    if base is not None:
        site = replace(site, base=FORMULA, base_flops=base.flops)
    causes = () if decision.changed else causes_of(region, posed.problem)
    return replace(site, find_causes=partial(tuple, causes)) if causes else site


def _site(
    posed: PosedProblem,
    scalars: Mapping[Polynomial, Scalar],
    decision: Decision,
    changed: bool,
    objective: Objective,
    memory: str,
) -> Site:
    """A region as a site without its modules.

    Args:
        posed: The region's problem.
        scalars: By demand, its scalar in the graph.
        decision: Its decision.
        changed: True if the plan was emitted.
        objective: The objective that ranked plans.
        memory: The option ``memory``.
    """
    problem = posed.problem
    names = Names(problem)
    incoming = Plan(dict(reversed(problem.incoming)))  # the first step of a value counts
    before = algebra(problem, names, scalars, incoming)
    plan = decision.plan if changed else None
    symbols = names.symbols
    is_easy = decision.effort <= MOST_EFFORT
    find_break_even = partial(_break_even, posed, names, objective) if is_easy else str
    alone = LeftAlone(
        *(posed, decision, objective, memory, _token_dims(posed, names)),
        is_easy=is_easy,
        find_break_even=find_break_even,
    )
    runs = decision.after if changed else decision.before
    failed = decision.changed and not changed
    reason = "left alone: the plan could not be applied; see the log" if failed else decision.reason
    cost_before = incoming_cost(problem, symbols).flops
    cost_after = cost_before if plan is None else plan.cost(problem, symbols).flops
    return Site(
        modules=(),
        shapes=", ".join(
            f"{s}={size}" for s, size in zip(symbols, posed.dims, strict=True) if s.is_Symbol
        ),
        before=before,
        after=before if plan is None else algebra(problem, names, scalars, plan),
        flops_before=int(decision.before.flops),
        flops_after=int(runs.flops),
        flops_before_expr=_expr(cost_before),
        flops_after_expr=_expr(cost_after),
        changed=changed,
        is_exact=decision.proof == "exact",
        find_break_even=find_break_even,
        find_causes=tuple if changed else cache(partial(_causes, alone)),
        seconds=_seconds(problem, plan, objective),
        saved=(int(decision.before.saved), int(runs.saved)),
        find_figures=cache(
            partial(figures_of, posed, names, scalars, decision, changed, objective)
        ),
        reason=reason,
        considered=tuple(
            Candidate(first_step(problem, names, problem.demands[0], a.step), int(a.cost.flops))
            for a in decision.alternatives
        ),
    )


def _seconds(
    problem: Problem, plan: Plan | None, objective: Objective
) -> tuple[float, float] | None:
    """The predicted time of a problem's products, before and after [s]; None if FLOPs rank plans.

    Args:
        problem: The problem.
        plan: The plan that was written; None if the graph runs as it came.
        objective: The objective that ranked plans.
    """
    if objective.name != "time":
        return None
    timed = replace(objective, flops_per_saved_byte=0)
    before = float(timed.total(incoming_operations(problem)))
    return before, before if plan is None else float(timed.total(plan.operations(problem)))


def _causes(alone: LeftAlone) -> tuple[Cause, ...]:
    """Why a site was left alone."""
    try:
        return alone.causes()
    except Exception:  # the rest of the report is printed all the same
        _log.warning("runlora could not find a cause (please report this)", exc_info=True)
        return ()


def _token_dims(posed: PosedProblem, names: Names) -> frozenset[int]:
    """The dimensions that are the number of tokens."""
    index = names.tokens
    if index is None:
        return frozenset()
    tokens = posed.dims[index]
    is_symbol = not isinstance(tokens, int)
    same = (i for i, size in enumerate(posed.dims) if is_symbol and size == tokens)
    return frozenset([index, *same])


def _break_even(posed: PosedProblem, names: Names, objective: Objective) -> str:
    """The sizes for which merging pays, in the graph's symbol if the number of tokens has one."""
    dims = _token_dims(posed, names)
    if not dims:
        return ""
    tokens = posed.dims[min(dims)]
    symbol = "N" if isinstance(tokens, int) else str(tokens)
    try:
        return _border(posed.problem, dims, objective, symbol)
    except Exception:  # the rest of the report is printed all the same
        _log.warning("runlora could not compute a break-even (please report this)", exc_info=True)
        return ""


@lru_cache(maxsize=4096)
def _border(problem: Problem, dims: frozenset[int], objective: Objective, symbol: str) -> str:
    """The break-even of a problem; equal layers share it."""
    return break_even(Varying.of(problem, dims, objective), symbol)


def _expr(amount: Amount) -> sympy.Expr:
    return sympy.expand(sympy.sympify(amount))
