"""Quantised weights: operators of other libraries that dequantise a weight and multiply by it.

    gemm_4bit(x, packed, [o, i], absmax, ...)   ->   X W', with W = dequantize_4bit(packed, ...)

Read as a product, a 4-bit weight can be merged with its adapter. ``W`` is a virtual leaf, which is
written only if a plan needs it. A plan that multiplies by ``W`` alone uses the fused operator.

Invariant: the call that dequantises the weight equals that of the library's own backward, so both
are one leaf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from runlora_fx.passes.levels.cuts import last_dim_cut
from runlora_fx.passes.levels.forms import Form, MatrixProduct, Operand, VirtualOperand, WeightedSum
from runlora_fx.passes.levels.origins import Computed, FusedProduct
from runlora_fx.passes.levels.sizes import example_of

#: The block size with which bitsandbytes quantises scales [elements].
_BLOCK_OF_SCALES = 256


def gemm_4bit(
    x: fx.Node,
    packed: fx.Node,
    shape: Any,
    absmax: fx.Node,
    blocksize: int,
    kind: str,
    bias: fx.Node | None = None,
    absmax_8bit: fx.Node | None = None,
    absmax_code: fx.Node | None = None,
    absmax_offset: fx.Node | None = None,
) -> Form | None:
    """The product of bitsandbytes with a 4-bit weight of shape (out, in), and a bias.

    The scales of the blocks may themselves be quantised in 8 bits.
    """
    value = example_of(x)
    if value is None or value.dim() < 1:
        return None
    operators = torch.ops.bitsandbytes
    scales: Computed | fx.Node = absmax
    if absmax_8bit is not None:
        scales = Computed(
            operators.dequantize_blockwise.default,
            (absmax_8bit, absmax, absmax_code, _BLOCK_OF_SCALES, torch.float32),
            torch.float32,
        )
        scales = Computed(torch.ops.aten.add.Tensor, (scales, absmax_offset), torch.float32)
    weight = Computed(
        operators.dequantize_4bit.default,
        (packed, scales, blocksize, kind, tuple(shape), value.dtype),
        value.dtype,
        FusedProduct(
            operators.gemm_4bit.default,
            (packed, tuple(shape), absmax, blocksize, kind)
            + (() if absmax_8bit is None else (None, absmax_8bit, absmax_code, absmax_offset)),
            bits=4,
        ),
    )
    cut = last_dim_cut(value.dim())
    rows, cols = shape
    product = MatrixProduct(Operand(x, cut), VirtualOperand(weight, rows, cols).T, cut)
    return product if bias is None else WeightedSum.of((product, 1.0), (bias, 1.0))
