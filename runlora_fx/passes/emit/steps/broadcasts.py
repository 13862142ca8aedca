"""Broadcasts: products with the column of ones, which repeat a row.

    1 b'  (+ X W')       ->      a row, added to what has the shape; repeated only if nothing has

Invariant: the ones themselves are written only where a plan multiplies by them twice.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from runlora_fx.passes.algebra.polynomials import ONE, Normalised, Scalar, normalise, of_factors
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, product_step
from runlora_fx.passes.emit.steps.scope import Scope
from runlora_fx.passes.emit.steps.values import Values


class Vector(NamedTuple):
    """One row, or one column, that a matrix repeats; times a scalar."""

    node: fx.Node
    scalar: Scalar
    times: Dim
    is_row: bool


class Lacks(NamedTuple):
    """What a sum of vectors still has to be repeated to, to be a matrix; None for a full side."""

    rows: Dim | None = None
    cols: Dim | None = None
    is_empty: bool = True

    def filled_by(self, vector: Vector) -> Lacks:
        """What it lacks once a vector is added to it: a row and a column fill each other."""
        is_row = vector.is_row
        if self.is_empty:
            return Lacks(vector.times if is_row else None, None if is_row else vector.times, False)
        return Lacks(self.rows if is_row else None, None if is_row else self.cols, False)


#: What a full matrix lacks.
NOTHING = Lacks(is_empty=False)


class Broadcasts:
    """Writes products with ones."""

    def __init__(self, scope: Scope, values: Values) -> None:
        """Write in a scope, of values that are emitted when they are asked for."""
        self._scope = scope
        self._values = values

    def vector(self, part: Normalised, flip: bool, backward: bool) -> Vector:
        """The row that a broadcast part repeats, or the column, as it is laid in the result."""
        step = self.step(self._scope.task.value(part.core, backward))
        assert step is not None
        turned = part.transposed != flip
        left, right = (step.right.T, step.left.T) if turned else (step.left, step.right)
        is_row = self._scope.ones_side(left, right) == "left"
        ones, vector = (left, right) if is_row else (right, left)
        (by, _, bare), (c, transposed, core) = normalise(ones), normalise(vector)
        times = self._scope.leaves.matrices[bare.terms[0][0].factors[0].leaf].rows
        is_as_it_is = is_row and core.leaf is not None and core.leaf.transposed == transposed
        if is_as_it_is and core.leaf is not None and not self._scope.is_ones(core.leaf):
            node = self._scope.leaf_node(core.leaf)
        else:
            node = self._values.matrix(self._scope.task.value(core, backward), transposed)
        return Vector(node, part.scalar * by * c, times, is_row)

    def filled(self, total: fx.Node, lacks: Lacks) -> fx.Node:
        """A sum of vectors, repeated to the matrix that it is."""
        if lacks.rows is not None:
            return self._scope.writer.repeat(total, lacks.rows, rows=True)
        return (
            total
            if lacks.cols is None
            else self._scope.writer.repeat(total, lacks.cols, rows=False)
        )

    def step(self, value: Value) -> Product | None:
        """The step by which a value repeats a row or a column; None if it does not."""
        step, core = self._scope.task.steps.get(value), value.core
        if core.is_diag_part:
            return None
        if step is None and len(core) == 1 and len(core.words[0].factors) == 2:
            first, last = core.words[0].factors
            step = product_step(of_factors((first,)), of_factors((last,)))
            step = Product(step.left, step.right.scaled(Scalar(1.0, core.words[0].scalars)))
        if not isinstance(step, Product) or self._scope.ones_side(step.left, step.right) is None:
            return None
        return step

    def repeated(self, value: Value, transposed: bool) -> fx.Node:
        """A value that repeats a row or a column, as a matrix."""
        vector = self.vector(Normalised(ONE, False, value.core), transposed, value.backward)
        filled = self.filled(vector.node, Lacks().filled_by(vector))
        return self._scope.scaled(filled, vector.scalar)
