"""Decision: is the cheapest plan of a problem worth replacing the incoming graph.

Before -> after: a LoRA layer of 500 tokens -> ``changed: 18.1% fewer FLOPs``, and a plan; the same
layer of 8 tokens -> ``left alone: the graph as it came is the cheapest``.

Invariant: a plan that ties with the incoming graph does not replace it, unless it saves fewer bytes
for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from runlora_fx.cost_model.cost import Amount, Cost
from runlora_fx.cost_model.objective import Objective, Price
from runlora_fx.cost_model.ops import Operation
from runlora_fx.passes.algebra.plan import Plan, incoming_operations, total_cost
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.search.assigned import refusal
from runlora_fx.passes.search.frontiers import Proof, effort_limit, first_steps, search

#: The width of the search for an alternative. Most alternatives are only shown in the report.
_WIDTHS = (16,)

#: Amounts that differ by less than this share are reported as equal.
_TIE = 1e-9

#: What settled a decision: predicted prices, measured times, or an error.
SettledBy: TypeAlias = Literal["prediction", "measurement", "failure"]


@dataclass(frozen=True)
class Alternative:
    """The cheapest plan that begins with a given step, for the list of what was considered."""

    step: Step
    plan: Plan
    cost: Cost


@dataclass(frozen=True)
class Decision:
    """What to do with a problem.

    Attributes:
        plan: The cheapest plan; None if no plan was compared with the incoming graph.
        changed: True if the plan replaces the incoming graph.
        before: The cost of the incoming graph, at the sizes of the example tensors.
        after: The cost of the plan or graph that will run.
        reason: Why the graph is changed or left alone.
        alternatives: For each possible first step of the first demand, the cheapest plan.
        proof: ``"exact"`` if the plan is the cheapest; ``"best found"`` otherwise.
        effort: The number of ways that the search tried; equal on every machine.
        settled_by: What settled it.
    """

    plan: Plan | None
    changed: bool
    before: Cost
    after: Cost
    reason: str
    alternatives: tuple[Alternative, ...] = ()
    proof: Proof = "exact"
    effort: int = 0
    settled_by: SettledBy = "prediction"


class Priced(NamedTuple):
    """The price and the cost of a plan, or of the incoming graph."""

    price: Price
    cost: Cost

    @classmethod
    def of(cls, operations: Sequence[Operation], objective: Objective) -> Priced:
        """The price and the cost of some operations together."""
        return cls(objective.total(operations), total_cost(operations))


def replaces(objective: Objective, came: Priced, plan: Priced) -> bool:
    """True if a plan replaces the incoming graph. This is the only rule for it in the package.

    A plan that ties does not, unless it needs as many FLOPs and saves fewer bytes.
    """
    is_worth = objective.worthwhile(came.price, plan.price)
    return is_worth or objective.holds_less(came.cost, plan.cost)


@lru_cache(maxsize=4096)
def decide(problem: Problem, objective: Objective) -> Decision:
    """Plan a problem. Equal problems, as of equal layers, are planned once."""
    found = search(problem, objective)
    considered = alternatives(problem, objective)
    plan = found.plan
    if considered and problem.scaled:
        # The search does not see the kernels that scale low-rank matrices: a plan has them only as
        # a whole. Where they make it dearer than another one, the other one is taken.
        second = considered[0].plan
        first_price, price = (objective.total(p.operations(problem)) for p in (plan, second))
        plan = second if objective.is_less(price, first_price) else plan
    decision = judge(problem, objective, plan, considered, found.proof)
    return replace(decision, effort=found.effort)


def judge(
    problem: Problem,
    objective: Objective,
    plan: Plan,
    considered: tuple[Alternative, ...] = (),
    proof: Proof = "exact",
) -> Decision:
    """Decide if a plan replaces the incoming graph, and say why."""
    came = Priced.of(incoming_operations(problem), objective)
    runs = Priced.of(plan.operations(problem), objective)
    before, after = came.cost, runs.cost
    if replaces(objective, came, runs):
        reason = f"changed: {saving(objective, problem, plan)}"
        if proof != "exact":
            reason += " (the best plan found; not all were compared)"
        return Decision(plan, True, before, after, reason, considered, proof)
    if objective.is_less(runs.price, came.price):
        reason = (
            f"left alone: the cheapest plan saves less than the margin ({objective.margin:.1%})"
        )
    else:
        reason = "left alone: the graph as it came is the cheapest"
        if proof != "exact":
            reason = "left alone: no cheaper plan was found (not all were compared)"
        refused = refusal(problem)
        if refused is not None:
            reason += f" ({refused})"
    return Decision(plan, False, before, before, reason, considered, proof=proof)


@lru_cache(maxsize=4096)
def alternatives(problem: Problem, objective: Objective) -> tuple[Alternative, ...]:
    """The possible steps of the first demand, each with the cheapest plan that takes it.

    Together they may take about as much work as the decision itself. Beyond that, the less
    promising steps are left out.
    """
    steps = first_steps(problem, objective)
    if len(steps) < 2:
        return ()
    left = effort_limit(problem)
    plans: list[tuple[Step, Plan]] = []
    for step in steps:
        if left <= 0:
            break
        found = search(problem, objective, step, _WIDTHS)
        left -= found.effort
        plans.append((step, found.plan))
    plans.sort(key=lambda pair: objective.total(pair[1].operations(problem)))
    return tuple(Alternative(step, plan, plan.cost(problem)) for step, plan in plans)


def saving(objective: Objective, problem: Problem, plan: Plan) -> str:
    """The savings of a plan against the incoming graph, as a text."""
    before, after = incoming_operations(problem), plan.operations(problem)
    saved = []
    if objective.name == "time":
        old, new = objective.total(before), objective.total(after)
        saved.append(f"{_change(old, new, 'time')} predicted")
    cost, new_cost = total_cost(before), total_cost(after)
    saved.append(_change(cost.flops, new_cost.flops, "FLOPs"))
    if cost.saved != new_cost.saved:
        saved.append(_change(cost.saved, new_cost.saved, "bytes saved for the backward"))
    if "kept" in plan.implementations.values():
        saved.append("merged weights are kept from call to call")
    return ", ".join(saved)


def _change(before: Amount | float, after: Amount | float, of: str) -> str:
    before, after = float(before), float(after)
    if not before:
        return f"{after:.4g} {of}"
    much, less = ("much", "less") if of == "time" else ("many", "fewer")
    share = abs(1 - after / before)
    if share < _TIE:
        return f"as {much} {of}"
    digits = f"{share:.1%}" if share >= 0.0005 else f"{100 * share:.1g}%"
    return f"{digits} {less if after < before else 'more'} {of}"


def holding_more(problem: Problem, objective: Objective) -> Decision | None:
    """The decision if more may be saved for the backward; None if that gains nothing.

    The backward may then use every value that the forward computes, and weights that are merged
    from :attr:`Problem.lasting` may be kept between calls.
    """
    plain = replace(problem, lasting=frozenset())
    settled = decide(plain, objective)
    plans = [a.plan for a in settled.alternatives] + ([settled.plan] if settled.plan else [])
    computed = {
        value.core
        for plan in plans
        for value in plan.steps
        if not value.backward and value.core.leaf is None
    }
    freer = decide(replace(problem, kept=problem.kept | computed), objective)
    if freer.plan is None or not freer.changed:
        return None
    now, then = price_of(settled, plain, objective), price_of(freer, problem, objective)
    return freer if objective.is_less(then, now) else None


def price_of(decision: Decision, problem: Problem, objective: Objective) -> Price:
    """The price of the plan or graph that will run."""
    if decision.changed and decision.plan is not None:
        return objective.total(decision.plan.operations(problem))
    return objective.total(incoming_operations(problem))
