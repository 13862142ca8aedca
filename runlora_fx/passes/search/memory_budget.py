"""Memory budget: which layers may save more for the backward than Inductor would.

A saved merged weight is not recomputed in the backward. The layers that gain most for each saved
byte come first, until the budget is spent.

Before -> after: 32 equal layers and a budget for ten merged weights -> ten layers save theirs.

Invariant: the additional bytes never exceed the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.decide import Decision, holding_more, price_of


def _kept_bytes(problem: Problem, decision: Decision) -> int:
    """The bytes of the merged weights that a plan keeps between calls [B]."""
    names = decision.plan.implementations if decision.plan is not None else {}
    kept = {value.core for value, name in names.items() if name == "kept"}
    return sum(
        problem.itemsize * prod(problem.dims[dim] for dim in problem.shape(core) if dim is not None)
        for core in kept
    )


@dataclass(frozen=True)
class _Offer:
    """The decision of one problem if it may save more, and what it gains."""

    index: int
    decision: Decision
    saving: float
    held: int


def spend(
    problems: Sequence[Problem | None],
    objectives: Sequence[Objective],
    decisions: Sequence[Decision],
    budget: int,
) -> list[Decision]:
    """The decisions, some of them replaced by ones that save more for the backward.

    Args:
        problems: The problems; None for one that may not save more.
        objectives: The objectives that rank their plans.
        decisions: The decisions about them.
        budget: The bytes that may be saved in addition [B].
    """
    offers = []
    for i, (problem, objective, settled) in enumerate(
        zip(problems, objectives, decisions, strict=True)
    ):
        freer = None if problem is None else holding_more(problem, objective)
        if problem is not None and freer is not None:
            held = int(freer.after.saved) - int(settled.after.saved) + _kept_bytes(problem, freer)
            before = price_of(settled, replace(problem, lasting=frozenset()), objective)
            after = price_of(freer, problem, objective)
            offers.append(_Offer(i, freer, float(before - after), max(held, 0)))
    chosen = list(decisions)
    for offer in sorted(offers, key=lambda offer: -offer.saving / (offer.held or 1)):
        if offer.held <= budget:
            budget -= offer.held
            chosen[offer.index] = offer.decision
    return chosen
