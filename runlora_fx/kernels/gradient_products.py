"""The products of a gradient: ``dy b`` and ``dy' s``, with dy read once.

    Y = X W' + S B',  S = X A'      ->      dS = dY B,  dB = dY' S

The deterministic variant gives every block of dy a part of both results of its own, and adds the
parts up in a fixed order. The other one adds atomically, in the order in which blocks come to it.

Invariant: the deterministic variant gives equal bits on every call with equal operands.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from runlora_fx.kernels.blocks import MAX_ONE_PASS_RANK, one_pass_blocks, span_of
from runlora_fx.kernels.operands import (
    check_dtypes,
    check_matrices,
    check_sizes,
    name_of,
    precision_of,
    runs_triton,
)
from runlora_fx.kernels.programs import one_pass_program


@triton_op("runlora::gradient_products", mutates_args=())
def gradient_products(
    dy: Tensor, b: Tensor, s: Tensor, deterministic: bool = True
) -> tuple[Tensor, Tensor]:
    """``dy @ b`` and ``dy' @ s``, both contiguous and in dy's dtype.

    Operands may lie in any order in memory. Above a rank of 128 dy is read twice, by torch's own
    products, as two accumulators of that size do not fit into registers.

    Args:
        dy: The gradient, shape (tokens, out).
        b: Shape (out, r); in dy's dtype.
        s: Shape (tokens, r); in dy's dtype.
        deterministic: Whether equal operands have to give equal bits. That takes memory for the
            parts of the results in float32.

    Returns:
        Shapes (tokens, r) and (out, r).

    Raises:
        ValueError: If an operand is not a matrix, or its sizes or device do not fit the others'.
        TypeError: If an operand is not in float32, bfloat16 or float16, or not in dy's dtype.
    """
    _check(dy, b, s)
    (tokens, outputs), rank = dy.shape, b.shape[1]
    if not runs_triton(dy) or rank > MAX_ONE_PASS_RANK:
        return dy @ b, dy.mT @ s
    blocks = one_pass_blocks(rank, name_of(dy.dtype))
    span = span_of(tokens, outputs, blocks)
    grid = (triton.cdiv(tokens, blocks["TOKENS"]), triton.cdiv(outputs, span))
    parts = grid if deterministic else (1, 1)
    make = torch.empty if deterministic else torch.zeros
    z = make((parts[1], tokens, rank), dtype=torch.float32, device=dy.device)
    g = make((parts[0], outputs, rank), dtype=torch.float32, device=dy.device)
    wrap_triton(one_pass_program)[grid](
        *(dy, b, s, z, g, tokens, outputs, rank, span),
        *(*dy.stride(), *b.stride(), *s.stride()),
        ATOMIC=not deterministic,
        PRECISION=precision_of(dy.dtype),
        **blocks.launch,
    )
    return z.sum(0).to(dy.dtype), g.sum(0).to(dy.dtype)


@gradient_products.register_fake
def _(dy: Tensor, b: Tensor, s: Tensor, deterministic: bool = True) -> tuple[Tensor, Tensor]:
    _check(dy, b, s)
    return dy.new_empty(s.shape), dy.new_empty(b.shape)


def _check(dy: Tensor, b: Tensor, s: Tensor) -> None:
    check_matrices(dy=dy, b=b, s=s)
    check_dtypes(dy=dy, b=b, s=s)
    check_sizes("rows, as dy has columns", dy.shape[1], b=b.shape[0])
    check_sizes("rows, as dy has", dy.shape[0], s=s.shape[0])
    check_sizes("columns, as b has", b.shape[1], s=s.shape[1])
