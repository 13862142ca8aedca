"""The Triton programs: what one block of each kernel computes.

    merge_program            out = w + scale * b a
    one_pass_program         z = dy b,  g = dy' s     (dy is read once)
    two_products_program     out = x w' + s b' + bias (one accumulator)

Every matrix is passed with the strides of its rows and columns [elements], so it may lie in any
order. Names in capitals are sizes of blocks [elements] and switches, known when a program is
compiled. Blocks need not divide the matrices.

Invariant: products are accumulated in float32 and rounded once, when they are stored. No program
reads what another block of its launch has written.
"""

import triton
import triton.language as tl


@triton.jit
def _block(matrix, rows, cols, row_stride, col_stride, height, width):
    """A block of a matrix; zeros outside of it."""
    at = rows[:, None].to(tl.int64) * row_stride + cols[None, :].to(tl.int64) * col_stride
    inside = (rows[:, None] < height) & (cols[None, :] < width)
    return tl.load(matrix + at, mask=inside, other=0.0)


@triton.jit
def _multiplied(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``; widened first if Triton cannot multiply the dtype as it is."""
    if PRECISION == "widened":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _put(matrix, rows, cols, height, width, block, ADDS: tl.constexpr):
    """Store a block into a contiguous matrix, or add it there atomically."""
    at = rows[:, None].to(tl.int64) * width + cols[None, :]
    inside = (rows[:, None] < height) & (cols[None, :] < width)
    if ADDS:
        tl.atomic_add(matrix + at, block, mask=inside, sem="relaxed")
    else:
        tl.store(matrix + at, block.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def merge_program(
    w,
    b,
    a,
    out,
    height,
    width,
    rank,
    scale,
    w_row,
    w_col,
    b_row,
    b_col,
    a_row,
    a_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block (ROWS, COLS) of ``w + scale * b a``; w (height, width), b (height, rank)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, rank, RANK):
        inner = start + tl.arange(0, RANK)
        left = _block(b, rows, inner, b_row, b_col, height, rank)
        right = _block(a, inner, cols, a_row, a_col, rank, width)
        total = _multiplied(left, right, total, PRECISION)
    base = _block(w, rows, cols, w_row, w_col, height, width).to(tl.float32)
    _put(out, rows, cols, height, width, base + scale * total, False)


@triton.jit
def one_pass_program(
    dy,
    b,
    s,
    z,
    g,
    tokens,
    outputs,
    rank,
    span,
    dy_row,
    dy_col,
    b_row,
    b_col,
    s_row,
    s_col,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What TOKENS rows and ``span`` columns of dy (tokens, outputs) add to both products.

    With ATOMIC, z (tokens, rank) and g (outputs, rank) are added to. Without it, every block has a
    part of its own: z (spans of columns, tokens, rank) and g (blocks of rows, outputs, rank).
    """
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if not ATOMIC:
        z += part * tokens * rank
        g += block * outputs * rank
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inner = tl.arange(0, RANK)
    down = _block(s, rows, inner, s_row, s_col, tokens, rank)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, min(first + span, outputs), OUTPUTS):
        cols = start + tl.arange(0, OUTPUTS)
        gradient = _block(dy, rows, cols, dy_row, dy_col, tokens, outputs)
        up = _block(b, cols, inner, b_row, b_col, outputs, rank)
        total = _multiplied(gradient, up, total, PRECISION)
        empty = tl.zeros((OUTPUTS, RANK), tl.float32)
        turned = _multiplied(tl.trans(gradient), down, empty, PRECISION)
        _put(g, cols, inner, outputs, rank, turned, ATOMIC)
    _put(z, rows, inner, tokens, rank, total, ATOMIC)


@triton.jit
def two_products_program(
    x,
    w,
    s,
    b,
    bias,
    out,
    tokens,
    outputs,
    inputs,
    rank,
    x_row,
    x_col,
    w_row,
    w_col,
    s_row,
    s_col,
    b_row,
    b_col,
    bias_at,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block (TOKENS, OUTPUTS) of ``x w' + s b' + bias``; x (tokens, inputs), s (tokens, rank).

    Blocks that follow each other share rows of x in groups of GROUP, so that they find them in
    the cache.
    """
    tall, wide = tl.cdiv(tokens, TOKENS), tl.cdiv(outputs, OUTPUTS)
    at = tl.program_id(0)
    group = at // (GROUP * wide)
    size = min(tall - group * GROUP, GROUP)
    rows = (group * GROUP + at % (GROUP * wide) % size) * TOKENS + tl.arange(0, TOKENS)
    cols = (at % (GROUP * wide) // size) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        inner = start + tl.arange(0, INPUTS)
        left = _block(x, rows, inner, x_row, x_col, tokens, inputs)
        right = _block(w, inner, cols, w_col, w_row, inputs, outputs)
        total = _multiplied(left, right, total, PRECISION)
    for start in range(0, rank, RANK):
        inner = start + tl.arange(0, RANK)
        left = _block(s, rows, inner, s_row, s_col, tokens, rank)
        right = _block(b, inner, cols, b_col, b_row, rank, outputs)
        total = _multiplied(left, right, total, PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + cols * bias_at, mask=cols < outputs, other=0.0).to(tl.float32)
    _put(out, rows, cols, tokens, outputs, total, False)
