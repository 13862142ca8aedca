"""Any plan can be written and proven, not only the cheapest.

Each value of a problem is made by one of its ways, drawn at random; what is emitted is verified and
compared with eager. So the emitter is tested on steps that the search seldom chooses.
"""

import random
from collections.abc import Callable, Collection
from typing import Any

import pytest

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes import pipeline, planning
from runlora_fx.passes.algebra.plan import Plan, incoming_cost
from runlora_fx.passes.algebra.posed import PosedProblem
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.algebra.sums import accumulated
from runlora_fx.passes.search.decide import Decision
from runlora_fx.passes.search.ways import Ways
from tests.fuzz.generate import random_case
from tests.fuzz.levels import Level
from tests.fuzz.run import outcome_of


def random_plan(problem: Problem, objective: Objective, rng: random.Random) -> Plan:
    """A plan that makes every value by a random way."""
    ways = Ways(problem, objective)
    possible: dict[Value, bool] = {}

    def can_be_made(value: Value) -> bool:
        if value not in possible:
            possible[value] = any(can_all(way.reads) for way in ways.of(value))
        return possible[value]

    def can_all(values: Collection[Value]) -> bool:
        return all(map(can_be_made, values))

    steps: dict[Value, Step] = {}
    names: dict[Value, str] = {}
    pending = {value for value in problem.demands if not ways.is_given(value)}
    while pending:
        value = max(pending, key=ways.rank)
        pending.remove(value)
        drawn = rng.sample(known := ways.of(value), len(known))
        way = next(way for way in drawn if can_all(way.reads))
        steps[value], names[value] = way.step, way.implementation
        pending |= way.reads - steps.keys()
    return accumulated(problem, Plan(steps, names)) if rng.random() < 0.5 else Plan(steps, names)


@pytest.fixture
def _draws_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)

    def decided(posed: PosedProblem, objective: Objective) -> Decision:
        problem = posed.problem
        plan = random_plan(problem, objective, rng)
        return Decision(plan, True, incoming_cost(problem), plan.cost(problem), "drawn")

    def decide_at_random(
        posed: Collection[PosedProblem], objective_of: Callable[[str], Objective], *_: Any
    ) -> list[Decision]:
        return [decided(p, objective_of(p.problem.dtype)) for p in posed]

    monkeypatch.setattr(planning, "decide_all", decide_at_random)
    # The report would search again, for borders between plans.
    monkeypatch.setattr(pipeline, "describe", lambda *_: None)


@pytest.mark.usefixtures("_draws_plans")
@pytest.mark.parametrize(
    ("level", "dynamic", "cases"),
    [("torch", False, 60), ("make_fx", False, 60), ("joint", False, 30), ("joint", True, 8)],
)
def test_random_plans(level: Level, dynamic: bool, cases: int) -> None:
    failures, changed = [], 0
    for seed in range(1000, 1000 + cases):
        outcome = outcome_of(random_case(seed), level, dynamic=dynamic)
        changed += outcome.changed
        # A random plan may well cost more than the graph as it came.
        if outcome.failure is not None and outcome.failure.kind != "dearer":
            failures.append(f"seed {seed}: {outcome.failure.cause}")
    assert not failures, f"{len(failures)} of {cases}:\n" + "\n".join(failures)
    assert changed > cases // 4
