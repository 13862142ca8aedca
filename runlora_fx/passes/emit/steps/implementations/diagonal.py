"""The diagonal of a product, as dot products of rows or of columns.

    diagonal of dY' P       ->      sum(mul(dy, p), [0])

The rows of ``L`` and ``R'`` have the same dot products as the columns of ``L'`` and ``R``. The pair
is taken whose left operand is stored as it is, not transposed.

Invariant: the product itself is not written.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, Step
from runlora_fx.passes.emit.steps.registry import Emission, writes


@writes("diagonal")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write the diagonal as a vector, which has no transpose."""
    assert isinstance(step, Product)
    scope, values = emission.scope, emission.values
    _, turned, core = normalise(step.left)
    _, lies = values.laid(scope.task.value(core, value.backward))
    rows = lies == turned
    left, right = (step.left, step.right.T) if rows else (step.left.T, step.right)
    a, by_a = values.operand(left, value.backward)
    b, by_b = values.operand(right, value.backward)
    a, b = scope.plain(left, a), scope.plain(right, b)
    dtype = scope.dtype(value)
    node = scope.writer.row_dots(
        scope.writer.cast(a, dtype), scope.writer.cast(b, dtype), rows=rows
    )
    return scope.scaled(node, by_a * by_b)
