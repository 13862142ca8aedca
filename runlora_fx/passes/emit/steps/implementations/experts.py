"""Steps of mixtures of experts: an assignment ``k`` gives every token one expert.

    (W + s L R)[k]           ->      index(addmm, [k])
    sum_k(P)                 ->      index_put(zeros, [k], P, accumulate=True)
    (X L)[k], k by an index  ->      mm(X, L of all experts), index(mm, [iota, None, k])
    X L[k], k by offsets     ->      _grouped_mm(X, L, offs), or the operator of transformers
    sum_k(X' dY)             ->      _grouped_mm(permute(X), dY, offs)

Invariant: a grouped product is written by the operator that the incoming graph uses for its ``k``.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar, normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import (
    GroupedOuter,
    GroupedProduct,
    Pick,
    ProductWithAll,
    Scatter,
    Step,
)
from runlora_fx.passes.emit.steps.registry import Emission, writes
from runlora_fx.passes.levels.sizes import Shape, same_shape, shape_of


@writes("pick")
def pick(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Pick each token's matrix from the stack of all experts, or its transpose."""
    assert isinstance(step, Pick)
    scope, by = emission.scope, emission.scope.leaves.assignments[step.assignment]
    scalar, turned, core = normalise(step.of)
    stack, lies = emission.values.laid(scope.task.value(core, value.backward))
    node = scope.scaled(scope.writer.pick(stack, by), scalar)
    return node if (lies != turned) == transposed else scope.writer.transpose(node)


@writes("scatter")
def scatter(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Add up the matrices of each expert's tokens, or their transposes."""
    assert isinstance(step, Scatter)
    scope, by = emission.scope, emission.scope.leaves.assignments[step.assignment]
    rows, scalar = emission.values.operand(step.of.T if transposed else step.of, value.backward)
    return scope.writer.summed_by_expert(scope.scaled(rows, scalar), by)


@writes("grouped")
def grouped(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Multiply each token's row by the matrix of its expert, or write the transposed columns."""
    assert isinstance(step, GroupedProduct)
    scope, by = emission.scope, emission.scope.leaves.assignments[step.assignment]
    is_turned = step.picked == "left"
    product = step.turned if is_turned else step
    assert isinstance(product, GroupedProduct)
    rows, by_rows = _rows(emission, product.left, value.backward)
    stack, by_stack = emission.values.operand(product.right, value.backward)
    node = scope.scaled(scope.writer.grouped_product(rows, stack, by), by_rows * by_stack)
    tokens, cols = shape_of(node)
    node = scope.writer.reshape(node, (tokens, 1, cols))
    return node if is_turned == transposed else scope.writer.transpose(node)


@writes("with_all")
def with_all(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Multiply each token's rows by the matrices of all experts, and pick those of its own."""
    assert isinstance(step, ProductWithAll)
    scope, by = emission.scope, emission.scope.leaves.assignments[step.assignment]
    is_turned = step.picked == "left"
    product = step.turned if is_turned else step
    assert isinstance(product, ProductWithAll)
    rows, by_rows = emission.values.operand(product.left, value.backward)
    stack, by_stack = emission.values.operand(product.right, value.backward)
    node = scope.writer.product_with_all(rows, stack, by)
    node = scope.scaled(node, by_rows * by_stack)
    return node if is_turned == transposed else scope.writer.transpose(node)


@writes("grouped_outer")
def grouped_outer(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """For each expert, add up a column times a row of its tokens; or write the transposes."""
    assert isinstance(step, GroupedOuter)
    scope, by = emission.scope, emission.scope.leaves.assignments[step.assignment]
    left, right = (step.right.T, step.left.T) if transposed else (step.left, step.right)
    columns, by_columns = _rows(emission, left.T, value.backward)
    rows, by_rows = _rows(emission, right, value.backward)
    columns = scope.scaled(columns, by_columns * by_rows)
    if by.kind == "aten":
        return scope.writer.grouped_outer(columns, rows, by)
    shape = (by.experts, shape_of(columns)[1], shape_of(rows)[1])
    pair = torch.ops.transformers.grouped_mm_fallback_backward.default
    both = scope.writer.call(pair, columns, _like(emission, shape), by.node, rows)
    return scope.writer.call(getitem, both, 1)


def _like(emission: Emission, shape: Shape) -> fx.Node:
    """A tensor of a shape, whose numbers are not read: a leaf, its transpose, or zeros."""
    writer = emission.scope.writer
    experts, rows, cols = shape
    for leaf in emission.scope.leaves.matrices:
        node = leaf.node
        if node is None or not leaf.batched or not writer.is_before(node):
            continue
        if same_shape(shape_of(node), shape):
            return node
        if same_shape(shape_of(node), (experts, cols, rows)):
            return writer.transpose(node)
    return writer.zeros(shape)


def _rows(emission: Emission, p: Polynomial, backward: bool) -> tuple[fx.Node, Scalar]:
    """Each token's row, as a matrix of two dimensions; and the scalar to multiply it by."""
    node, scalar = emission.values.operand(p, backward)
    tokens, _, cols = shape_of(node)
    return emission.scope.writer.reshape(node, (tokens, cols)), scalar
