"""Posed problems: a region of a graph as a problem with leaf numbers of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import sympy

from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import Polynomial, normalise, substitute
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Step

#: A size: an integer, or the expression behind a SymInt.
Dim: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class PosedProblem:
    """A region as a problem with leaf numbers of its own, so that equal layers pose equal ones.

    Attributes:
        problem: What to plan.
        dims: Its dimensions: sizes as the graph has them.
        matrices: By leaf number of the problem, the leaf number of the graph.
        scalars: The same for scalar leaves.
        assignments: The same for assignments of tokens to experts.
    """

    problem: Problem
    dims: tuple[Dim, ...]
    matrices: tuple[int, ...]
    scalars: tuple[int, ...]
    assignments: tuple[int, ...] = ()

    @property
    def is_symbolic(self) -> bool:
        """Whether some dimension is a symbol."""
        return not all(isinstance(size, int) for size in self.dims)

    @cached_property
    def _own_numbers(self) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """By number in the graph, the number in the problem."""
        matrices, scalars, assignments = (
            {graph: own for own, graph in enumerate(numbers)}
            for numbers in (self.matrices, self.scalars, self.assignments)
        )
        return matrices, scalars, assignments

    @cached_property
    def _graph_numbers(self) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """By number in the problem, the number in the graph."""
        numbers = (self.matrices, self.scalars, self.assignments)
        matrices, scalars, assignments = (dict(enumerate(given)) for given in numbers)
        return matrices, scalars, assignments

    @cached_property
    def _in_graph(self) -> dict[Polynomial, Polynomial]:
        """Polynomials that were renamed already: the steps of a problem have most in common."""
        return {}

    def own(self, p: Polynomial) -> Polynomial:
        """A polynomial in leaves of the graph, in the problem's own."""
        return substitute(p, *self._own_numbers)

    def step_in_graph(self, value: Value, step: Step) -> tuple[Value, Step]:
        """A step of the problem and what it makes, in leaves of the graph."""
        step = step.renamed(self._renamed, self._graph_numbers[2])
        made = self._renamed(value.core)
        return Value(normalise(made).core, value.backward), step.making(made)

    def in_graph(self, plan: Plan) -> Plan:
        """A plan of the problem, in leaves of the graph: with all that the emitter obeys."""
        steps: dict[Value, Step] = {}
        implementations: dict[Value, str] = {}
        lies: dict[Polynomial, bool] = {}
        for core, is_transposed in (plan.laid(self.problem).lies or {}).items():
            _, turned, core_in_graph = normalise(self._renamed(core))
            lies[core_in_graph] = is_transposed != turned
        for value, step in plan.steps.items():
            whole, renamed = self.step_in_graph(value, step)
            steps[whole] = renamed
            implementations[whole] = plan.implementation(self.problem, value)
        return Plan(steps, implementations, lies)

    def _renamed(self, p: Polynomial) -> Polynomial:
        """A polynomial in the problem's leaves, in those of the graph."""
        found = self._in_graph.get(p)
        if found is None:
            found = self._in_graph[p] = substitute(p, *self._graph_numbers)
        return found
