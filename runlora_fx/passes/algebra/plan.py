"""Plans: a step and an implementation for every value of a problem, with their costs.

Example: the plan of ``Y = X W' + 2 X A' B'`` that merges has a product for ``B A``, a sum for
``W + 2 B A`` and a product for ``Y``.

Invariant: a plan is priced in the orientations in which it is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from runlora_fx.cost_model.cost import FREE, Cost
from runlora_fx.cost_model.ops import Elementwise, Launches, Operation
from runlora_fx.passes.algebra.implementations import named, usual
from runlora_fx.passes.algebra.orientation import orientations
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Dims, Problem, Value
from runlora_fx.passes.algebra.steps import Keep, Step, Unpack
from runlora_fx.passes.algebra.work import Work

#: A plan scales low-rank matrices instead of a leaf: at most so many, by a kernel each. ``s dY'``
#: is read for a gradient of A, a gradient of B, and a gradient of X.
_SCALINGS = 3


def step_operations(
    problem: Problem,
    core: Polynomial,
    step: Step,
    dims: Dims | None = None,
    implementation: str | None = None,
) -> tuple[Operation, ...]:
    """The operations of a step; symbolic if ``dims`` has expressions.

    Args:
        problem: The problem.
        core: The value that the step makes.
        step: The step.
        dims: The dimensions; those of the problem if None.
        implementation: The name of the implementation; the usual one if None.
    """
    work = Work(problem, core, step, problem.dims if dims is None else dims)
    return (usual(work) if implementation is None else named(implementation)).operations(work)


@dataclass(frozen=True)
class Plan:
    """One step for every value that the demands need, except for leaves.

    Attributes:
        steps: By value, its step.
        implementations: By value, the name of its implementation; the usual one if there is none.
        lies: By polynomial of a value, True if it is stored transposed; None if that was not
            computed yet.
    """

    steps: Mapping[Value, Step]
    implementations: Mapping[Value, str] = field(default_factory=dict)
    lies: Mapping[Polynomial, bool] | None = field(default=None, compare=False)

    def runs_as_in(self, graph: Collection[tuple[Value, Step]]) -> bool:
        """True if some steps of a graph include all steps of this plan, and it runs them alike."""
        are_usual = all(named(name).is_usual for name in self.implementations.values())
        return are_usual and all(pair in graph for pair in self.steps.items())

    @property
    def signature(self) -> frozenset[object]:
        """A key that is equal for plans with equal steps and implementations."""
        return frozenset([*self.steps.items(), *self.implementations.items()])

    def implementation(self, problem: Problem, value: Value) -> str:
        """The name of the implementation of a value's step."""
        found = self.implementations.get(value)
        return found or usual(Work(problem, value.core, self.steps[value], problem.dims)).name

    def laid(self, problem: Problem) -> Plan:
        """The same plan with the orientations of its values."""
        return replace(self, lies=orientations(problem, self.steps))

    def operations(self, problem: Problem, dims: Dims | None = None) -> list[Operation]:
        """All operations of the plan. A value that several steps read is computed once."""
        steps = ((v, step, self.implementations.get(v)) for v, step in self.steps.items())
        return [*_operations(problem, steps, dims), *self._scalings(problem)]

    def _scalings(self, problem: Problem) -> list[Operation]:
        """The kernels that scale low-rank matrices, if nothing but what is scaled has changed.

        Other plans scale other things: a merged weight is scaled as it is made.
        """
        if not problem.scaled or not self.runs_as_in(problem.incoming):
            return []
        return [Launches(sum(1 if core.leaf is None else _SCALINGS for core, _ in problem.scaled))]

    def cost(self, problem: Problem, dims: Dims | None = None) -> Cost:
        """The cost of all operations of the plan."""
        return total_cost(self.operations(problem, dims))


@lru_cache(maxsize=4096)
def with_unpacking(problem: Problem) -> Problem:
    """The same problem with incoming steps that unpack the packed leaves which steps read.

    Equal problems become one object, so later look-ups need not compare them.
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
    """The operations of the incoming graph."""
    steps = ((value, step, None) for value, step in dict.fromkeys(problem.incoming))
    sizes = problem.dims if dims is None else dims
    written = [core for core, is_written in problem.scaled if is_written]
    scalings = [Elementwise(Work(problem, core, Keep(), sizes).size) for core in written]
    return [*_operations(problem, steps, dims), *scalings]


def incoming_cost(problem: Problem, dims: Dims | None = None) -> Cost:
    """The cost of the incoming graph."""
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
