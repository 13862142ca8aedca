"""Posed problems: a region of a graph as a problem with leaf numbers of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import sympy

from runlora_fx.passes.algebra.plan import (
    Plan,
    Problem,
    Product,
    Step,
    Sum,
    Value,
    product_step,
    sum_step,
)
from runlora_fx.passes.algebra.polynomials import Polynomial, normalise, substitute

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
    """

    problem: Problem
    dims: tuple[Dim, ...]
    matrices: tuple[int, ...]
    scalars: tuple[int, ...]

    @property
    def is_symbolic(self) -> bool:
        """Whether some dimension is a symbol."""
        return not all(isinstance(size, int) for size in self.dims)

    def own(self, p: Polynomial) -> Polynomial:
        """A polynomial in leaves of the graph, in the problem's own."""
        matrices = {graph: own for own, graph in enumerate(self.matrices)}
        scalars = {graph: own for own, graph in enumerate(self.scalars)}
        return substitute(p, matrices, scalars)

    def in_graph(self, plan: Plan) -> Plan:
        """A plan of the problem, in leaves of the graph."""
        matrices, scalars = dict(enumerate(self.matrices)), dict(enumerate(self.scalars))

        def renamed(p: Polynomial) -> Polynomial:
            return substitute(p, matrices, scalars)

        steps: dict[Value, Step] = {}
        for value, step in plan.steps.items():
            match step:
                case Product(left, right):
                    dots = value.core.is_dots
                    step = product_step(renamed(left), renamed(right), dots=dots)
                case Sum(parts):
                    step = sum_step([renamed(p) for p in parts])
            steps[Value(normalise(renamed(value.core)).core, value.backward)] = step
        return Plan(steps)
