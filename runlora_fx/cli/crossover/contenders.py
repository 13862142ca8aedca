"""Contenders: the plans that win somewhere, each with a letter, its steps, and its known names.

    B    M = W + 2 B A; Y = X M'; ...    forward2, backward5 of "Run LoRA Run"

Invariant: plans of equal steps have one letter; A is the graph as it came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase

import sympy

from runlora_fx.cli.crossover.fields import Field
from runlora_fx.cli.crossover.problem import SCALING
from runlora_fx.cli.crossover.variants import is_merged, variants_of
from runlora_fx.passes.algebra.plan import Plan, incoming_cost
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Keep, Product
from runlora_fx.passes.search.decide import Decision
from runlora_fx.report.describe.notation import Names, algebra

#: The number of the demand in each phase that the base weight is part of: Y and dX.
_PHASES = {"forward": 0, "backward": 3}


@dataclass(frozen=True)
class Contender:
    """A plan that wins somewhere.

    Attributes:
        letter: Its name in the picture.
        title: What is special about it.
        plan: The plan; None for the graph as it came.
        variants: The variants of "Run LoRA Run" that it coincides with.
    """

    letter: str
    title: str
    plan: Plan | None
    variants: str

    def steps(self, problem: Problem) -> str:
        """Its steps in the notation of the report, a line for each value."""
        y, db, da, dx = (demand.core for demand in problem.demands)
        one = Scalar(1.0)
        scalars: Mapping[Polynomial, Scalar] = {y: one, db: SCALING, da: SCALING, dx: one}
        return algebra(problem, Names(problem), scalars, self.plan or incoming_plan(problem))

    def flops(self, problem: Problem) -> sympy.Expr:
        """Its FLOPs as a formula in N, i, o and r."""
        symbols = Names(problem).symbols
        if self.plan is None:
            return sympy.expand(incoming_cost(problem, symbols).flops)
        return sympy.expand(self.plan.cost(problem, symbols).flops)


def incoming_plan(problem: Problem) -> Plan:
    """The steps of the incoming graph as a plan; the first step of a value counts."""
    return Plan(dict(reversed(problem.incoming)))


def contenders(fields: Iterable[Field]) -> list[Contender]:
    """All plans that win somewhere, the graph as it came first."""
    fields = list(fields)
    problem = fields[0].layer.problem(fields[0].tokens[0], fields[0].ranks[0])
    found: dict[object, Plan | None] = {key_of(None): None}
    for field in fields:
        for row in field.decisions:
            for decision in row:
                plan = taken(decision)
                found.setdefault(key_of(plan), plan)
    return [
        Contender(letter, _title(problem, plan), plan, variants_of(problem, plan))
        for letter, plan in zip(ascii_uppercase, found.values(), strict=False)
    ]


def winners(field: Field, known: Iterable[Contender]) -> list[str]:
    """By rank, the letters of the winners."""
    letters = {key_of(contender.plan): contender.letter for contender in known}
    return ["".join(letters[key_of(taken(one))] for one in row) for row in field.decisions]


def taken(decision: Decision) -> Plan | None:
    """The plan that will run; None for the graph as it came."""
    return decision.plan if decision.changed else None


def key_of(plan: Plan | None) -> object:
    """Equal for plans of equal steps, each run as often.

    If ``X A'`` is needed only for dB, it costs the same in the forward, saved, as in the backward.
    """
    if plan is None:
        return None
    made = Counter((v.core, s) for v, s in plan.steps.items() if not isinstance(s, Keep))
    return frozenset(made.items())


def _title(problem: Problem, plan: Plan | None) -> str:
    if plan is None:
        return "as it came"
    down = next(iter(problem.kept))
    steps = [plan.steps.get(Value(down, is_backward)) for is_backward in (False, True)]
    is_twice = all(isinstance(step, Product) for step in steps)
    again = "; X A' is computed again in the backward" if is_twice else ""
    if plan.runs_as_in(problem.incoming):
        return "the same products; small matrices are scaled instead of dY"
    demands = {name: problem.demands[number] for name, number in _PHASES.items()}
    merged = [name for name, demand in demands.items() if is_merged(plan.steps[demand])]
    where = f"merged weight in the {' and the '.join(merged)}" if merged else "nothing is merged"
    return where + again
