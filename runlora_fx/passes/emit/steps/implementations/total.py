"""The sum over the rows or the columns of a matrix: the product ``1' X`` or ``X 1`` with ones.

    1' X                    ->      sum(x, [0])

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
    """Write the sum over rows or columns, or its transpose."""
    assert isinstance(step, Product)
    scope = emission.scope
    left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
    rows = scope.ones_side(left.T, right.T) == "left"
    ones, summed = (left, right) if rows else (right, left)
    node, scalar = emission.values.operand(summed, value.backward)
    return scope.scaled(scope.writer.total(node, rows=rows), scalar * normalise(ones).scalar)
