"""Posed problems: a region of a graph as a problem with leaf numbers of its own.

Before -> after: leaves 12, 31 and 32 of the graph -> leaves 0, 1 and 2 of the problem, and back.

Invariant: equal layers pose equal problems, so they are planned once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
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
    """A region as a problem with leaf numbers of its own.

    Attributes:
        problem: The problem.
        dims: The sizes of its dimensions in the graph.
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
        """True if some dimension is a symbol."""
        return not all(isinstance(size, int) for size in self.dims)

    @cached_property
    def _graph_numbers(self) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """By number in the problem, the number in the graph."""
        numbers = (self.matrices, self.scalars, self.assignments)
        matrices, scalars, assignments = (dict(enumerate(given)) for given in numbers)
        return matrices, scalars, assignments

    @cached_property
    def _keeps_order(self) -> bool:
        """True if both numberings have the same order. Then normal forms stay normal forms."""
        numbers = (self.matrices, self.scalars, self.assignments)
        return all(before < after for given in numbers for before, after in pairwise(given))

    @cached_property
    def _in_graph(self) -> dict[Polynomial, Polynomial]:
        """By polynomial, the renamed one. The steps of a problem share most polynomials."""
        return {}

    def own(self, p: Polynomial) -> Polynomial:
        """A polynomial of the graph's leaves, renamed to the problem's leaves."""
        numbers = (self.matrices, self.scalars, self.assignments)
        return substitute(p, *({graph: i for i, graph in enumerate(given)} for given in numbers))

    def step_in_graph(self, value: Value, step: Step) -> tuple[Value, Step]:
        """A value of the problem and its step, renamed to the graph's leaves."""
        step = step.renamed(self._renamed, self._graph_numbers[2])
        made = self._renamed(value.core)
        if self._keeps_order:
            return Value(made, value.backward), step
        return Value(normalise(made).core, value.backward), step.making(made)

    def in_graph(self, plan: Plan) -> Plan:
        """A plan of the problem, renamed to the graph's leaves, with all implementations named."""
        steps: dict[Value, Step] = {}
        implementations: dict[Value, str] = {}
        lies: dict[Polynomial, bool] = {}
        laid = plan if plan.lies is not None else plan.laid(self.problem)
        for core, is_transposed in (laid.lies or {}).items():
            _, turned, core_in_graph = normalise(self._renamed(core))
            lies[core_in_graph] = is_transposed != turned
        for value, step in plan.steps.items():
            whole, renamed = self.step_in_graph(value, step)
            steps[whole] = renamed
            implementations[whole] = plan.implementation(self.problem, value)
        return Plan(steps, implementations, lies)

    def _renamed(self, p: Polynomial) -> Polynomial:
        """A polynomial of the problem's leaves, renamed to the graph's leaves."""
        found = self._in_graph.get(p)
        if found is None:
            found = substitute(p, *self._graph_numbers, keeps_order=self._keeps_order)
            self._in_graph[p] = found
        return found
