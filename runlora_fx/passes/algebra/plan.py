"""Plans: an answer to a problem, as data, and what it runs and costs.

Example: the plan of ``Y = X W' + 2 X A' B'`` that merges has a product for ``B A``, a sum for
``W + 2 B A`` and a product for ``Y``.

Invariant: the orientations that a plan is priced by are those that it is written in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from runlora_fx.cost_model.cost import FREE, Cost
from runlora_fx.cost_model.ops import Operation
from runlora_fx.passes.algebra.implementations import Work, named, usual
from runlora_fx.passes.algebra.orientation import orientations
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Dims, Problem, Value
from runlora_fx.passes.algebra.steps import Step, Unpack


def step_operations(
    problem: Problem,
    core: Polynomial,
    step: Step,
    dims: Dims | None = None,
    implementation: str | None = None,
) -> tuple[Operation, ...]:
    """What a step runs; symbolic where ``dims`` holds expressions.

    Args:
        problem: The problem.
        core: The value that the step makes.
        step: The step.
        dims: The dimensions, if not at the hints.
        implementation: What runs the step, if not what runs it in a graph that takes it.
    """
    work = Work(problem, core, step, problem.dims if dims is None else dims)
    return (usual(work) if implementation is None else named(implementation)).operations(work)


@dataclass(frozen=True)
class Plan:
    """One step for every value that the demands need; leaves need none.

    Attributes:
        steps: By value.
        implementations: By value, the name of what runs its step; where none is named, it runs as
            in a graph that takes the step.
        lies: By value, True if it lies transposed in memory; None while that follows from the
            problem and the steps.
    """

    steps: Mapping[Value, Step]
    implementations: Mapping[Value, str] = field(default_factory=dict)
    lies: Mapping[Polynomial, bool] | None = field(default=None, compare=False)

    def runs_as_in(self, graph: Collection[tuple[Value, Step]]) -> bool:
        """True if a graph that takes some steps takes all of this plan's, and runs them so."""
        are_usual = all(named(name).is_usual for name in self.implementations.values())
        return are_usual and all(pair in graph for pair in self.steps.items())

    @property
    def signature(self) -> frozenset[object]:
        """What runs; equal for two plans that run the same."""
        return frozenset([*self.steps.items(), *self.implementations.items()])

    def implementation(self, problem: Problem, value: Value) -> str:
        """The name of what runs the step towards a value."""
        found = self.implementations.get(value)
        return found or usual(Work(problem, value.core, self.steps[value], problem.dims)).name

    def laid(self, problem: Problem) -> Plan:
        """The same plan, which says how each value lies in memory."""
        return replace(self, lies=orientations(problem, self.steps))

    def operations(self, problem: Problem, dims: Dims | None = None) -> list[Operation]:
        """What runs: shared values once."""
        steps = ((v, step, self.implementations.get(v)) for v, step in self.steps.items())
        return _operations(problem, steps, dims)

    def cost(self, problem: Problem, dims: Dims | None = None) -> Cost:
        """The cost of the plan: shared values once."""
        return total_cost(self.operations(problem, dims))


@lru_cache(maxsize=4096)
def with_unpacking(problem: Problem) -> Problem:
    """The same problem, whose incoming graph also unpacks what its steps read of virtual leaves.

    Equal problems become one object, which later look-ups find without comparing.
    """
    found: dict[tuple[Value, Step], None] = {}
    for value, step in problem.incoming if any(leaf.packed for leaf in problem.leaves) else ():
        work = Work(problem, value.core, step, problem.dims)
        for p in usual(work).reads(work):
            below = problem.value(p, value.backward)
            if below.core.leaf is not None and problem.leaves[below.core.leaf.leaf].packed:
                found[below, Unpack()] = None
    return replace(problem, incoming=(*found, *problem.incoming)) if found else problem


def incoming_operations(problem: Problem, dims: Dims | None = None) -> list[Operation]:
    """What the graph as it came runs."""
    steps = ((value, step, None) for value, step in dict.fromkeys(problem.incoming))
    return _operations(problem, steps, dims)


def incoming_cost(problem: Problem, dims: Dims | None = None) -> Cost:
    """The cost of the graph as it came."""
    return total_cost(incoming_operations(problem, dims))


def total_cost(operations: Iterable[Operation]) -> Cost:
    """The sum of the operations' costs."""
    return sum((operation.cost for operation in operations), FREE)


def _operations(
    problem: Problem, steps: Iterable[tuple[Value, Step, str | None]], dims: Dims | None
) -> list[Operation]:
    return [
        operation
        for value, step, name in steps
        for operation in step_operations(problem, value.core, step, dims, name)
    ]
