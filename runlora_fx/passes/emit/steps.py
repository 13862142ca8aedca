"""Steps: how one step of a plan is written, given its operands.

    left @ right                     ->      mm, bmm, matmul; scaled where that costs least
    diag(g) P,  P diag(g)            ->      mul, broadcast over rows or columns
    x W', W a virtual leaf           ->      the operator that makes no W, if there is one
    diagonal of left @ right         ->      mul, sum: dot products of rows or columns

Invariant: a step decides nothing about the algebra. It obeys the plan.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from runlora_fx.passes.algebra.plan import Product, Value
from runlora_fx.passes.algebra.polynomials import ONE, Polynomial, Scalar, normalise
from runlora_fx.passes.emit.scope import Scope
from runlora_fx.passes.emit.values import Values
from runlora_fx.passes.emit.writer import EmissionError
from runlora_fx.passes.levels.sizes import numel, shape_of


class Operands(NamedTuple):
    """``scalar * (a @ b)``, not yet written."""

    a: fx.Node
    b: fx.Node
    scalar: Scalar


class Steps:
    """Writes products of all kinds."""

    def __init__(self, scope: Scope, values: Values) -> None:
        """Write in a scope, of values that are emitted when they are asked for."""
        self._scope = scope
        self._values = values

    def product(self, a: fx.Node, b: fx.Node, scalar: Scalar) -> fx.Node:
        """``scalar * (a @ b)``, scaled where it costs least: at the smallest of the three."""
        out = (*shape_of(a)[:-1], shape_of(b)[-1])
        sizes = [self._scope.hint(numel(shape)) for shape in (out, shape_of(a), shape_of(b))]
        if scalar is ONE or scalar.is_one or sizes[0] == min(sizes):
            return self._scope.scaled(self._scope.writer.matmul(a, b), scalar)
        if sizes[1] <= sizes[2]:
            return self._scope.writer.matmul(self._scope.scaled(a, scalar), b)
        return self._scope.writer.matmul(a, self._scope.scaled(b, scalar))

    def operands(self, value: Value, step: Product, transposed: bool) -> Operands:
        """The operands of a product, or those of its transpose."""
        left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
        a, by_a = self._values.operand(left, value.backward)
        b, by_b = self._values.operand(right, value.backward)
        dtype = self._scope.dtype(value)
        return Operands(
            self._scope.writer.cast(a, dtype), self._scope.writer.cast(b, dtype), by_a * by_b
        )

    def fused_product(self, value: Value, step: Product, transposed: bool) -> fx.Node | None:
        """A product with a virtual leaf by the operator that does not make it; None if none is."""
        for turned in (False, True):
            left, right = (step.right.T, step.left.T) if turned else (step.left, step.right)
            operator = self._scope.fused_operator(right, value)
            if operator is None:
                continue
            x, by = self._values.operand(left, value.backward)
            x = self._scope.writer.cast(x, self._scope.dtype(value))
            node = operator.write(self._scope.writer, x)
            node = self._scope.scaled(node, by * normalise(right).scalar)
            return node if turned == transposed else self._scope.writer.transpose(node)
        return None

    def unshared_product(self, value: Value) -> Product | None:
        """The step of a matrix product that nothing else reads; None if it is no such value."""
        step = self._scope.task.steps.get(value)
        if self._values.is_made(value) or self._scope.task.uses[value] != 1:
            return None
        if not isinstance(step, Product) or value.core.is_dots:
            return None
        if step.left.is_diagonal or step.right.is_diagonal:
            return None
        if self._scope.ones_side(step.left.T, step.right.T) is not None:
            return None
        if any(self._scope.fused_operator(p, value) for p in (step.right, step.left.T)):
            return None
        is_batched = self._scope.leaves.matrices[value.core.shown[0].leaf].batched
        return None if is_batched else step

    def dots(self, value: Value, step: Product) -> fx.Node:
        """The diagonal of a product: it multiplies rows or columns, as the left operand lies."""
        _, transposed, core = normalise(step.left)
        _, lies = self._values.laid(self._scope.task.value(core, value.backward))
        rows = lies == transposed
        left, right = (step.left, step.right.T) if rows else (step.left.T, step.right)
        a, by_a = self._values.operand(left, value.backward)
        b, by_b = self._values.operand(right, value.backward)
        dtype = self._scope.dtype(value)
        node = self._scope.writer.dots(
            self._scope.writer.cast(a, dtype), self._scope.writer.cast(b, dtype), rows=rows
        )
        return self._scope.scaled(node, by_a * by_b)

    def stretched(self, value: Value, step: Product, transposed: bool) -> fx.Node:
        """A product with a diagonal matrix: rows or columns scaled by its vector."""
        left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
        diagonal, scaled = (left, right) if left.is_diagonal else (right, left)
        # Scaling is elementwise: its result lies in memory as its operand does.
        scalar, turned, core = normalise(scaled)
        node = self._values.matrix(
            self._scope.task.value(core, value.backward), turned, prefer=turned
        )
        vector, by = self._vector(diagonal)
        size = numel(shape_of(vector))
        shape = (*shape_of(node)[:-1], 1) if left is diagonal else (size,)
        vector = self._scope.writer.reshape(vector, shape)
        stretched = self._scope.writer.stretch(node, vector, rows=left is diagonal)
        return self._scope.scaled(stretched, scalar * by)

    def _vector(self, diagonal: Polynomial) -> tuple[fx.Node, Scalar]:
        """The vector of a diagonal matrix: a leaf, or a leaf ``g`` in ``c (I + a diag(g))``."""
        by, _, core = normalise(diagonal)
        vector, shift = None, 0.0
        for word, c in core.terms:
            if word.factors and not word.scalars and vector is None and len(word.factors) == 1:
                vector = self._scope.writer.scale(self._scope.leaf_node(word.factors[0]), c)
            elif not word.factors and not word.scalars:
                shift = c
            else:
                raise EmissionError("a plan makes a diagonal matrix of several vectors")
        assert vector is not None, "the identity is no step"
        return self._scope.writer.shift(vector, shift), by
