"""Weights that are stored in 4 bits: a fused operator multiplies by them, or they are unpacked.

    X W'                    ->      gemm_4bit(x, packed, ...), which unpacks inside
    W X'                    ->      permute(gemm_4bit(x, packed, ...))
    W                       ->      dequantize_4bit(packed, ...)

Invariant: the unpacked weight is written only if the plan has a step for it.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.polynomials import Polynomial, normalise
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, Step
from runlora_fx.passes.emit.steps.registry import Emission, writes
from runlora_fx.passes.emit.steps.scope import Scope
from runlora_fx.passes.levels.origins import Computed, FusedProduct


@writes("gemm_4bit")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a product with a packed weight, or its transpose."""
    assert isinstance(step, Product)
    scope, products = emission.scope, emission.products
    for is_turned in (False, True):
        x, weight = (step.right.T, step.left.T) if is_turned else (step.left, step.right)
        operator = _operator(scope, weight, value)
        if operator is not None:
            node, by = emission.values.operand(x, value.backward)
            node = operator.write(scope.writer, scope.writer.cast(node, scope.dtype(value)))
            node = scope.scaled(node, by * normalise(weight).scalar)
            return node if is_turned == transposed else scope.writer.transpose(node)
    return products.product(*products.operands(value, step, transposed))


@writes("unpack")
def unpack(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write the unpacked weight, or its transpose."""
    assert value.core.leaf is not None
    node = emission.scope.leaf(value.core.leaf)
    return emission.scope.writer.transpose(node) if transposed else node


def _operator(scope: Scope, weight: Polynomial, value: Value) -> FusedProduct | None:
    """The operator that multiplies by a packed weight; None if its dtype is another one."""
    factor = weight.leaf
    if factor is None or not factor.transposed:
        return None
    origin = scope.leaves.matrices[factor.leaf].origin
    if not isinstance(origin, Computed) or origin.dtype != scope.dtype(value):
        return None
    return origin.product
