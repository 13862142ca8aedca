"""Products of two matrices, or of two batches of matrices.

    2 X A'                  ->      mul(mm(x, permute(a)), 2)
    x' dY for each token    ->      mul(permute(x), dy), which Inductor fuses with its reader

Invariant: both operands have the dtype of the product.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.steps import Product, Step
from runlora_fx.passes.emit.steps.registry import Emission, writes


@writes("matmul")
def write(emission: Emission, value: Value, step: Step, transposed: bool) -> fx.Node:
    """Write a product, or its transpose."""
    assert isinstance(step, Product)
    products = emission.products
    if products.is_outer_by_token(value, step):
        a, b, scalar = products.operands(value, step, transposed)
        return emission.scope.scaled(emission.scope.writer.outer(a, b), scalar)
    return products.product(*products.operands(value, step, transposed))
