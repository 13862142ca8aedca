"""Products with a diagonal matrix: every row or column times one entry of a vector.

    diag(g) P               ->      mul(p, view(g, [o, 1]))

Invariant: the result has the orientation of its operand, because scaling is elementwise.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, Step
from runlora_fx.passes.emit.nodes.node_writer import EmissionError
from runlora_fx.passes.emit.steps.registry import Emission, writes
from runlora_fx.passes.emit.steps.scope import Scope
from runlora_fx.passes.levels.sizes import numel, shape_of


@writes("scale")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a product with a diagonal matrix, or its transpose."""
    assert isinstance(step, Product)
    scope = emission.scope
    left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
    diagonal, scaled = (left, right) if left.is_diagonal else (right, left)
    scalar, turned, core = normalise(scaled)
    node = emission.values.matrix(scope.task.value(core, value.backward), turned)
    vector, by = _vector(scope, diagonal)
    size = numel(shape_of(vector))
    shape = (*shape_of(node)[:-1], 1) if left is diagonal else (size,)
    vector = scope.writer.reshape(vector, shape)
    stretched = scope.writer.stretch(node, vector, rows=left is diagonal)
    return scope.scaled(stretched, scalar * by)


def _vector(scope: Scope, diagonal: Polynomial) -> tuple[fx.Node, Scalar]:
    """The vector of a diagonal matrix: a leaf, or a leaf ``g`` in ``c (I + a diag(g))``."""
    by, _, core = normalise(diagonal)
    vector, shift = None, 0.0
    for word, c in core.terms:
        if word.factors and not word.scalars and vector is None and len(word.factors) == 1:
            vector = scope.writer.scale(scope.leaf_node(word.factors[0]), c)
        elif not word.factors and not word.scalars:
            shift = c
        else:
            raise EmissionError("a plan makes a diagonal matrix of several vectors")
    assert vector is not None, "the identity is no step"
    return scope.writer.shift(vector, shift), by
