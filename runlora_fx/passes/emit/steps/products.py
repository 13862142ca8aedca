"""Products: two matrices, or two batches of matrices, are multiplied and scaled.

    2 X A', rank 8      ->      mul(mm(x, permute(a)), 2): the result is the smallest tensor

Invariant: a scalar is applied once: to the smallest of the two operands and the result.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from runlora_fx.passes.algebra.polynomials import ONE, Scalar
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Accumulate, Product
from runlora_fx.passes.emit.steps.scope import Scope, dtype_of, flattened
from runlora_fx.passes.emit.steps.values import Values
from runlora_fx.passes.levels.sizes import equal, is_one, numel, shape_of


class Operands(NamedTuple):
    """``scalar * (a @ b)``, not yet written."""

    a: fx.Node
    b: fx.Node
    scalar: Scalar


class Products:
    """Writes products of matrices."""

    def __init__(self, scope: Scope, values: Values) -> None:
        """Write in a scope. Operands are emitted when they are first asked for."""
        self._scope = scope
        self._values = values

    def product(self, a: fx.Node, b: fx.Node, scalar: Scalar) -> fx.Node:
        """``scalar * (a @ b)``; the smallest of the three tensors is scaled."""
        out = (*shape_of(a)[:-1], shape_of(b)[-1])
        sizes = [self._scope.hint(numel(shape)) for shape in (out, shape_of(a), shape_of(b))]
        if scalar is ONE or scalar.is_one or sizes[0] == min(sizes):
            return self._scope.scaled(self._scope.writer.matmul(a, b), scalar)
        if sizes[1] <= sizes[2]:
            return self._scope.writer.matmul(self._scope.scaled(a, scalar), b)
        return self._scope.writer.matmul(a, self._scope.scaled(b, scalar))

    def operands(self, value: Value, step: Product | Accumulate, transposed: bool) -> Operands:
        """The operands of a product, or of its transpose, in the dtype of the product."""
        left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
        a, by_a = self._values.operand(left, value.backward)
        b, by_b = self._values.operand(right, value.backward)
        b = self._scope.plain(right, b)  # matmul takes unflattened rows on the left only
        dtype = self._scope.dtype(value)
        return Operands(
            self._scope.writer.cast(a, dtype), self._scope.writer.cast(b, dtype), by_a * by_b
        )

    def is_outer_by_token(self, value: Value, step: Product) -> bool:
        """True if a step multiplies a column by a row for each token that an index assigns."""
        matrices = self._scope.leaves.matrices
        last = step.left.shown[-1]
        leaf = matrices[last.leaf]
        inner = leaf.rows if last.transposed else leaf.cols
        by = (a for a in self._scope.leaves.assignments if a.kind == "indexed")
        is_by_token = leaf.batched and any(equal(a.tokens, leaf.batch) for a in by)
        return is_by_token and is_one(inner) and not any(w.scattered for w in value.core.words)

    def accumulated(self, total: fx.Node, product: Operands) -> fx.Node:
        """``total + scalar * (a @ b)``: ``addmm`` if it takes the scalar and the dtypes."""
        a, b, by = product
        if by.leaves or len(shape_of(a)) != 2 or dtype_of(total) != dtype_of(a):
            return self._scope.added(total, self.product(a, b, by))
        if len(shape_of(total)) > 2:  # activations whose rows are not flattened
            total = self._scope.writer.reshape(total, flattened(total))
        return self._scope.writer.addmm(total, a, b, by.number)

    def unshared_product(self, value: Value) -> Product | None:
        """The step of a value that is a plain product with one reader; None for any other."""
        step = self._scope.task.steps.get(value)
        if self._values.is_made(value) or self._scope.task.uses[value] != 1:
            return None
        if not isinstance(step, Product) or self._scope.task.implementations[value] != "matmul":
            return None
        is_batched = self._scope.leaves.matrices[value.core.shown[0].leaf].batched
        return None if is_batched else step
