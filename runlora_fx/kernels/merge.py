"""The merge: ``w + scale * b a``, with w read once and the result written once.

A library's ``addmm`` copies w into the result first, and so moves it twice.

Invariant: the product is accumulated in float32 and added to w before it is rounded.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from runlora_fx.kernels.blocks import merge_blocks
from runlora_fx.kernels.operands import (
    check_dtypes,
    check_matrices,
    check_sizes,
    name_of,
    precision_of,
    runs_triton,
)
from runlora_fx.kernels.programs import merge_program


@triton_op("runlora::fused_merge", mutates_args=())
def merge(w: Tensor, b: Tensor, a: Tensor, scale: float = 1.0) -> Tensor:
    """``w + scale * (b @ a)``, contiguous and in w's dtype.

    Operands may lie in any order in memory. The adapters may have another dtype than w.

    Args:
        w: The weight, shape (out, in).
        b: Shape (out, r).
        a: Shape (r, in); in b's dtype.
        scale: The scaling.

    Raises:
        ValueError: If an operand is not a matrix, or its sizes or device do not fit the others'.
        TypeError: If an operand is not in float32, bfloat16 or float16, or a not in b's dtype.
    """
    _check(w, b, a)
    if not runs_triton(w):
        return _plain(w, b, a, scale)
    (height, width), rank = w.shape, b.shape[1]
    out = w.new_empty((height, width))
    blocks = merge_blocks(rank, name_of(b.dtype))
    grid = (triton.cdiv(height, blocks["ROWS"]), triton.cdiv(width, blocks["COLS"]))
    wrap_triton(merge_program)[grid](
        *(w, b, a, out, height, width, rank, scale),
        *(*w.stride(), *b.stride(), *a.stride()),
        PRECISION=precision_of(b.dtype),
        **blocks.launch,
    )
    return out


@merge.register_fake
def _(w: Tensor, b: Tensor, a: Tensor, scale: float = 1.0) -> Tensor:
    _check(w, b, a)
    return w.new_empty(w.shape)


def _check(w: Tensor, b: Tensor, a: Tensor) -> None:
    check_matrices(w=w, b=b, a=a)
    check_dtypes(b=b, a=a)
    check_sizes("rows, as w has", w.shape[0], b=b.shape[0])
    check_sizes("rows, as b has columns", b.shape[1], a=a.shape[0])
    check_sizes("columns, as w has", w.shape[1], a=a.shape[1])


def _plain(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    if w.dtype == b.dtype:
        return torch.addmm(w, b, a, alpha=scale)
    return (w.float() + scale * (b @ a).float()).to(w.dtype).contiguous()
