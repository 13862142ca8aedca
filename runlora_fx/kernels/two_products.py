"""Two products with one accumulator: ``x w' + s b' + bias``.

    forward     Y = X W' + S B',   S = X A'
    backward    dX = dY W + Z A,   Z = dY B       ->      two_products(dY, W', Z, A')

Their inner dimensions differ: one is the width of x, the other the rank.

Invariant: both products and the bias are added up in float32 before the result is rounded.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from runlora_fx.kernels.blocks import two_products_blocks
from runlora_fx.kernels.operands import (
    check_dtypes,
    check_matrices,
    check_sizes,
    name_of,
    precision_of,
    runs_triton,
)
from runlora_fx.kernels.programs import two_products_program


@triton_op("runlora::two_products", mutates_args=())
def two_products(x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ w' + s @ b' + bias``, contiguous and in x's dtype.

    Operands may lie in any order in memory.

    Args:
        x: Shape (tokens, in).
        w: Shape (out, in); in x's dtype.
        s: Shape (tokens, r); in x's dtype.
        b: Shape (out, r); in x's dtype.
        bias: Shape (out,), on x's device.

    Raises:
        ValueError: If an operand is not a matrix, or its sizes or device do not fit the others'.
        TypeError: If an operand is not in float32, bfloat16 or float16, or not in x's dtype.
    """
    _check(x, w, s, b, bias)
    if not runs_triton(x):
        return _plain(x, w, s, b, bias)
    (tokens, inputs), (outputs, rank) = x.shape, b.shape
    out = x.new_empty((tokens, outputs))
    blocks = two_products_blocks(rank, name_of(x.dtype))
    grid = (triton.cdiv(tokens, blocks["TOKENS"]) * triton.cdiv(outputs, blocks["OUTPUTS"]),)
    wrap_triton(two_products_program)[grid](
        *(x, w, s, b, out if bias is None else bias, out, tokens, outputs, inputs, rank),
        *(*x.stride(), *w.stride(), *s.stride(), *b.stride()),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        PRECISION=precision_of(x.dtype),
        **blocks.launch,
    )
    return out


@two_products.register_fake
def _(x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, w, s, b, bias)
    return x.new_empty((x.shape[0], w.shape[0]))


def _check(x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None) -> None:
    check_matrices(x=x, w=w, s=s, b=b)
    check_dtypes(x=x, w=w, s=s, b=b)
    check_sizes("columns, as x has", x.shape[1], w=w.shape[1])
    check_sizes("rows, as x has", x.shape[0], s=s.shape[0])
    check_sizes("rows, as w has", w.shape[0], b=b.shape[0])
    check_sizes("columns, as s has", s.shape[1], b=b.shape[1])
    if bias is None:
        return
    if bias.dim() != 1:
        raise ValueError(f"bias must be a vector, not of {bias.dim()} dimensions")
    if bias.device != x.device:
        raise ValueError(f"bias must be on {x.device}, as x is, not {bias.device}")
    check_sizes("elements, as w has rows", w.shape[0], bias=bias.shape[0])


def _plain(x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.addmm(x @ w.mT, s, b.mT)
    return y if bias is None else (y + bias).to(x.dtype)
