"""The decision for one problem: the cheapest plan, against the graph as it came."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from runlora_fx.cost_model.cost import Cost
from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.plan import Plan, Problem, Step, incoming_cost
from runlora_fx.passes.search import SearchLimitError, Ways, cheapest


@dataclass(frozen=True)
class Alternative:
    """The cheapest plan that begins with a given step: one thing that was considered."""

    step: Step
    cost: Cost


@dataclass(frozen=True)
class Decision:
    """What to do with a problem.

    Attributes:
        plan: The cheapest plan, or None where the search gave up.
        changed: Whether it replaces the graph as it came.
        before: Cost of the graph as it came, at the hints.
        after: Cost of what will run.
        reason: Why the graph is changed or left alone.
        alternatives: By first step, what else the first demand could have cost.
    """

    plan: Plan | None
    changed: bool
    before: Cost
    after: Cost
    reason: str
    alternatives: tuple[Alternative, ...] = ()


@lru_cache(maxsize=4096)
def decide(problem: Problem, objective: Objective) -> Decision:
    """Plan a problem; equal problems (equal layers) are planned once."""
    before = incoming_cost(problem)
    try:
        plan = cheapest(problem, objective)
    except SearchLimitError as error:
        return Decision(None, False, before, before, f"left alone: {error}")
    after = plan.cost(problem)
    if objective.worthwhile(objective.price(before), objective.price(after)):
        saved = float(1 - after.flops / before.flops) if before.flops else 0.0
        reason = f"changed: {saved:.1%} fewer FLOPs"
        return Decision(plan, True, before, after, reason, _alternatives(problem, objective))
    if before.flops == after.flops:
        reason = "left alone: the graph as it came is the cheapest"
    else:
        reason = (
            f"left alone: the cheapest plan saves less than the margin ({objective.margin:.1%})"
        )
    return Decision(plan, False, before, before, reason, _alternatives(problem, objective))


def _alternatives(problem: Problem, objective: Objective) -> tuple[Alternative, ...]:
    """The first demand's possible first steps, each with the cheapest plan that takes it."""
    ways = Ways(problem, objective).of(problem.demands[0])
    if len(ways) < 2:
        return ()
    found = (
        Alternative(way[0], cheapest(problem, objective, way[0]).cost(problem)) for way in ways
    )
    return tuple(sorted(found, key=lambda a: objective.price(a.cost)))
