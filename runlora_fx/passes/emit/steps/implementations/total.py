"""Products with a row of ones on the left or a column of ones on the right, as sums.

    1' X                    ->      sum(X, rows)

Invariant: the ones are not written.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, Step
from runlora_fx.passes.emit.steps.registry import Emission, writes


@writes("total")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write the sum of rows or columns."""
    assert isinstance(step, Product)
    scope = emission.scope
    left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
    rows = scope.ones_side(left.T, right.T) == "left"
    ones, summed = (left, right) if rows else (right, left)
    node, scalar = emission.values.operand(summed, value.backward)
    return scope.scaled(scope.writer.total(node, rows=rows), scalar * normalise(ones).scalar)
