"""Symbolic costs of the operations that a plan is made of.

Every function takes integers (the search, at the hints) or sympy expressions (the report).
"""

from __future__ import annotations

from runlora_fx.cost_model.cost import Amount, Cost


def matmul(b: Amount, m: Amount, k: Amount, n: Amount, itemsize: int) -> Cost:
    """Cost of b products (m, k) @ (k, n) -> (m, n).

    Args:
        b: Batch [products].
        m: Rows of the result [elements].
        k: Contracted dimension [elements].
        n: Columns of the result [elements].
        itemsize: Element width [B].

    Returns:
        flops = 2 b m k n [FLOP]; bytes = b (m k + k n + m n) itemsize [B]; kernels = 1.
    """
    return Cost(2 * b * m * k * n, b * (m * k + k * n + m * n) * itemsize, 1)


def add(b: Amount, m: Amount, n: Amount, operands: int, itemsize: int) -> Cost:
    """Cost of adding ``operands`` matrices (b, m, n) elementwise.

    The compiler fuses such a sum into its neighbours (or into a product's accumulator), so it costs
    no launch. Every addition is priced alike, so that nested sums cost what the flat one does: the
    search need not tell them apart, and emission flattens them.

    Returns:
        flops = 0; bytes = 3 b m n (operands - 1) itemsize [B]; kernels = 0.
    """
    return Cost(0, 3 * b * m * n * (operands - 1) * itemsize, 0)
