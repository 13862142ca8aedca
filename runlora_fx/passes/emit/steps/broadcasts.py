"""Broadcasts: a row that is repeated for every row of a matrix, or a column for every column.

    1 b' + X W'      ->      addmm(b, x, w'), which broadcasts the vector b
    1 b' + 1 d'      ->      expand(add(b, d), [rows, -1])

In polynomials a repeated row is a product with a column of ones, ``1 b'``. The vector ``b`` itself
is written. Adding it to a matrix broadcasts it. It is expanded only if no addend has the full
shape.

Invariant: a column of ones is written only if it is itself the vector that is repeated.
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
    """A repeated row or column, before it is repeated.

    Attributes:
        node: The row, or the column.
        scalar: What it is still to be multiplied by.
        times: How often it is repeated.
        is_row: True if it is a row.
    """

    node: fx.Node
    scalar: Scalar
    times: Dim
    is_row: bool


class Lacks(NamedTuple):
    """How a sum of vectors must still be expanded to become the full matrix.

    Attributes:
        rows: The number of rows to repeat it to; None if it has them all.
        cols: The number of columns to repeat it to; None if it has them all.
        is_empty: True if nothing was added up yet.
    """

    rows: Dim | None = None
    cols: Dim | None = None
    is_empty: bool = True

    def filled_by(self, vector: Vector) -> Lacks:
        """What the sum lacks once a vector is added: a row plus a column is a full matrix."""
        is_row = vector.is_row
        if self.is_empty:
            return Lacks(vector.times if is_row else None, None if is_row else vector.times, False)
        return Lacks(self.rows if is_row else None, None if is_row else self.cols, False)


#: A sum that contains a full matrix lacks nothing.
NOTHING = Lacks(is_empty=False)


class Broadcasts:
    """Writes repeated rows and columns."""

    def __init__(self, scope: Scope, values: Values) -> None:
        """Write in a scope. Operands are emitted when they are first asked for."""
        self._scope = scope
        self._values = values

    def vector(self, part: Normalised, flip: bool, backward: bool) -> Vector:
        """The row or column that an addend repeats.

        Args:
            part: The addend: a product with ones.
            flip: True if the transpose of the sum is written.
            backward: The phase that the sum is computed in.
        """
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
        """A sum, expanded to the full matrix if it lacks rows or columns."""
        if lacks.rows is not None:
            return self._scope.writer.repeat(total, lacks.rows, rows=True)
        return (
            total
            if lacks.cols is None
            else self._scope.writer.repeat(total, lacks.cols, rows=False)
        )

    def step(self, value: Value) -> Product | None:
        """The product with ones that a value is; None if the value is no repeated vector."""
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
        """A repeated row or column, expanded to the full matrix."""
        vector = self.vector(Normalised(ONE, False, value.core), transposed, value.backward)
        filled = self.filled(vector.node, Lacks().filled_by(vector))
        return self._scope.scaled(filled, vector.scalar)
