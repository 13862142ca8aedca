"""What the kernels move between memory and processor, counted as Inductor counts its own kernels.

    merge_bytes(4096, 14336, 16, 2)  ->  235585536: w and m once each, and the adapters

Every tensor that a kernel reads counts once, and so does every tensor that it writes. Parts of
results that a kernel writes and a sum reads again count twice.

Invariant: a count is exact arithmetic on sizes. Nothing in it is measured.
"""

from __future__ import annotations

from runlora_fx.kernels.blocks import one_pass_blocks, span_of

#: Of the float32 numbers that parts of results are kept in [B].
_PART = 4


def product_bytes(m: int, k: int, n: int, itemsize: int) -> int:
    """A plain product (m, k) @ (k, n): both operands read, the result written [B]."""
    return (m * k + k * n + m * n) * itemsize


def merge_bytes(outputs: int, inputs: int, rank: int, itemsize: int) -> int:
    """``w + s b a``: w (outputs, inputs) read and the result written; the adapters read [B]."""
    return (2 * outputs * inputs + rank * (outputs + inputs)) * itemsize


def gradient_products_bytes(
    tokens: int, outputs: int, rank: int, dtype: str, itemsize: int, *, deterministic: bool
) -> int:
    """``dy b`` and ``dy' s``: dy, b and s read, both results written, and the parts of both [B].

    The atomic variant has one part of each. It is cleared, added to, and read to be rounded.

    Args:
        tokens: Rows of dy.
        outputs: Columns of dy.
        rank: Columns of b and s.
        dtype: Of the operands, as torch names it.
        itemsize: Their width [B].
        deterministic: The variant.
    """
    blocks = one_pass_blocks(rank, dtype)
    tall = wide = 1
    if deterministic:
        tall = -(-tokens // blocks["TOKENS"])
        wide = -(-outputs // span_of(tokens, outputs, blocks))
    passes = 2 if deterministic else 3
    parts = passes * _PART * rank * (wide * tokens + tall * outputs)
    return (tokens * outputs + 2 * rank * (tokens + outputs)) * itemsize + parts


def two_products_bytes(tokens: int, outputs: int, inputs: int, rank: int, itemsize: int) -> int:
    """``x w' + s b'``: all four operands read, the result written [B]."""
    base = product_bytes(tokens, inputs, outputs, itemsize)
    return base + rank * (tokens + outputs) * itemsize
