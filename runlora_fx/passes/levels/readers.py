"""Readers: the forms of common linear-algebra calls, shared by all levels.

Example: ``addmm(b, x, w, 1, 2)`` is the sum of the broadcast ``b`` and twice the product ``x w``.

Invariant: a form describes exactly what the call computes. A reader returns None for any other
call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from runlora_fx.passes.levels.cuts import Cut, last_dim_cut
from runlora_fx.passes.levels.forms import (
    Cast,
    Copy,
    DiagonalMultiple,
    DiagonalOfProduct,
    Form,
    Identity,
    MatrixProduct,
    Operand,
    Permute,
    Reshape,
    ScalarMultiple,
    Shift,
    SumOfProducts,
    WeightedSum,
)
from runlora_fx.passes.levels.forms.products import aligned_factors
from runlora_fx.passes.levels.sizes import all_one, equal, facts_of, is_one, same_shape, shape_of

#: The number of dimensions of a batch of matrices.
_BATCHED = 3


def ndim(node: object) -> int:
    """Rank of a tensor node; -1 for anything else."""
    facts = facts_of(node)
    return -1 if facts is None else len(facts.shape)


def is_scalar(x: object, of: object) -> bool:
    """True if x scales a tensor as one number: a number, a symbol or a tensor of one element."""
    if isinstance(x, bool):
        return False
    if isinstance(x, int | float):
        return True
    if not isinstance(x, fx.Node):
        return False
    val = x.meta.get("val")
    if isinstance(val, int | float | torch.SymInt | torch.SymFloat):
        return True
    facts = facts_of(x)
    return facts is not None and len(facts.shape) <= ndim(of) and all_one(facts.shape)


def product(a: Any, b: Any) -> MatrixProduct | None:
    """``a @ b`` of two matrices, or of two equal batches of matrices."""
    rank = ndim(a)
    if rank not in (2, 3) or ndim(b) != rank:
        return None
    cut = Cut(rank - 2, rank - 1)
    return MatrixProduct(Operand(a, cut), Operand(b, cut), cut)


def matmul(a: Any, b: Any) -> Form | None:
    """``torch.matmul`` where it is a matrix product: (..., k) @ (k, n), or equal batches."""
    na, nb = ndim(a), ndim(b)
    if na >= 2 and nb == 2:
        cut = last_dim_cut(na)
        return MatrixProduct(Operand(a, cut), Operand(b, Cut(0, 1)), cut)
    if na == nb >= 3 and same_shape(shape_of(a)[:-2], shape_of(b)[:-2]):
        cut = Cut(na - 2, na - 1)
        return MatrixProduct(Operand(a, cut), Operand(b, cut), cut)
    return None


def linear(x: Any, weight: Any, bias: Any = None) -> Form | None:
    """``F.linear``: x @ weight.T + bias."""
    if ndim(x) < 1 or ndim(weight) != 2:
        return None
    cut = last_dim_cut(ndim(x))
    result = MatrixProduct(Operand(x, cut), Operand(weight, Cut(0, 1), transposed=True), cut)
    return result if bias is None else WeightedSum.of((result, 1.0), (bias, 1.0))


def addmm(c: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Form | None:
    """``beta * c + alpha * (a @ b)``."""
    ab = product(a, b)
    if ab is None or not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        return None
    return (
        WeightedSum.of((ab, float(alpha)), (c, float(beta)))
        if beta
        else WeightedSum.of((ab, float(alpha)))
    )


def einsum(equation: str, operands: Any) -> Form | None:
    """An einsum of two operands that is one plain matrix product."""
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    if inputs.count(",") != 1:
        return None
    left, right = inputs.split(",")
    for letters, node in ((left, operands[0]), (right, operands[1])):
        if len(set(letters)) != len(letters) or len(letters) != ndim(node):
            return None
    shared = set(left) & set(right)
    if shared & set(out) or set(out) != set(left) ^ set(right) or not shared:
        return None
    free_left = "".join(c for c in left if c not in shared)
    free_right = "".join(c for c in right if c not in shared)
    inner = "".join(c for c in left if c in shared)
    a, b = (
        _matrix(operands[0], left, free_left, inner),
        _matrix(operands[1], right, inner, free_right),
    )
    if a is None or b is None or not free_left or not free_right:
        return None
    if out == free_left + free_right:
        return MatrixProduct(a, b, Cut(0, len(free_left)))
    if out == free_right + free_left:
        return MatrixProduct(b.T, a.T, Cut(0, len(free_right)))
    return None


def summed_rows(equation: str, operands: Any) -> DiagonalOfProduct | None:
    """An einsum that multiplies two tensors elementwise, and adds up each row or each column."""
    inputs, _, out = equation.replace(" ", "").partition("->")
    letters, _, again = inputs.partition(",")
    n = len(letters)
    if letters != again or len(set(letters)) != n or n < 2 or len(operands) != 2:
        return None
    if out not in (letters[:-1], letters[-1]) or any(ndim(node) != n for node in operands):
        return None
    if not same_shape(shape_of(operands[0]), shape_of(operands[1])):
        return None
    return DiagonalOfProduct(
        *aligned_factors(operands[0], operands[1], n, rows=out == letters[:-1])
    )


def sum_of_products(multiplication: fx.Node, a: Any, b: Any, dims: Any) -> SumOfProducts | None:
    """``sum(a * b, dims)`` along the last dimension, or along all others.

    Args:
        multiplication: The node ``a * b``.
        a: One factor.
        b: The other; elementwise, so that the multiplication alone has no form.
        dims: The dimensions that are added up.
    """
    n = ndim(multiplication)
    if n < 2 or not isinstance(dims, list | tuple) or not all(ndim(x) == n for x in (a, b)):
        return None
    is_elementwise = same_shape(shape_of(a), shape_of(b)) and scale(a, b) is None
    summed = {int(d) % n for d in dims}
    if not is_elementwise or summed not in ({n - 1}, set(range(n - 1))):
        return None
    return SumOfProducts(*aligned_factors(a, b, n, rows=summed == {n - 1}), multiplication)


def add(a: Any, b: Any, alpha: Any = 1, sign: float = 1.0) -> Form | None:
    """``a + sign * alpha * b`` of two tensors, or of a tensor and a number."""
    if ndim(a) < 1 or not isinstance(alpha, int | float):
        return None
    if isinstance(b, int | float):
        return Shift(a, sign * float(alpha) * b)
    if ndim(b) < 1:
        return None
    return WeightedSum.of((a, 1.0), (b, sign * float(alpha)))


def scale(a: Any, b: Any) -> Form | None:
    """A product with one side that is a scalar, or a vector that scales columns or rows."""
    one, other = facts_of(a), facts_of(b)
    if one is not None and other is not None and one.shape == other.shape:
        is_elementwise = not all_one(one.shape)  # most multiplications end here
        if is_elementwise:
            return None
    if ndim(b) > 0 and is_scalar(a, b):
        a, b = b, a
    if ndim(a) < 1:
        return None
    if is_scalar(b, a):
        return ScalarMultiple(a, b if isinstance(b, fx.Node) else float(b))
    if ndim(b) < 1:
        return None
    return _stretch(a, b) or _stretch(b, a)


def neg(a: Any) -> Form | None:
    """``-a``."""
    return scale(a, -1.0)


def eye(n: Any, m: Any = None, **_: Any) -> Form | None:
    """The identity matrix, if it is square."""
    return Identity() if m is None or n == m else None


def divide(a: Any, b: Any) -> Form | None:
    """A tensor over a scalar."""
    if ndim(a) < 1 or not is_scalar(b, a) or (not isinstance(b, fx.Node) and b == 0):
        return None
    return (
        ScalarMultiple(a, b, divides=True) if isinstance(b, fx.Node) else ScalarMultiple(a, 1.0 / b)
    )


def permute(a: Any, dims: Any) -> Form | None:
    """Dimensions in another order. If only single elements move, no element does."""
    n = ndim(a)
    order = tuple([int(d) % n for d in dims]) if n > 0 else ()
    if n > _BATCHED:  # einsum gives operands dimensions of one element
        moved = [d for d in order if not is_one(shape_of(a)[d])]
        if moved == sorted(moved):
            return same(a)
    return Permute(a, order) if n > 0 else None


def transpose(a: Any, d0: int, d1: int) -> Form | None:
    """Two dimensions swapped."""
    n = ndim(a)
    if n < 1:
        return None
    dims = list(range(n))
    dims[d0 % n], dims[d1 % n] = d1 % n, d0 % n
    return Permute(a, tuple(dims))


def t(a: Any) -> Form | None:
    """The transpose of a matrix; a vector is its own."""
    return transpose(a, 0, 1) if ndim(a) == 2 else same(a)


def same(a: Any, *_: Any, **__: Any) -> Form | None:
    """The same elements in the same order: views that fold, aliases."""
    return Reshape(a) if ndim(a) >= 1 else None


def cast(a: Any, *_: Any, **__: Any) -> Form | None:
    """A conversion to another dtype."""
    return Cast(a) if ndim(a) >= 1 else None


def copy(a: Any, *_: Any, **__: Any) -> Form | None:
    """The same values in new memory."""
    return Copy(a) if ndim(a) >= 1 else None


def dropout(a: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Form | None:
    """Dropout that drops nothing is a copy."""
    return copy(a) if (training is False or p == 0) and not inplace else None


def _stretch(a: Any, vector: Any) -> DiagonalMultiple | None:
    """A tensor with its rows or columns times the entries of a vector of another shape."""
    shape, size = shape_of(a), shape_of(vector)
    if not len(shape) >= max(len(size), 2):
        return None
    by = (1,) * (len(shape) - len(size)) + size
    if all_one(by[:-1]) and equal(by[-1], shape[-1]):
        return DiagonalMultiple(a, vector, rows=False)
    along_rows = same_shape(by[:-1], shape[:-1]) and is_one(by[-1])
    return DiagonalMultiple(a, vector, rows=True) if along_rows else None


def _matrix(node: fx.Node, letters: str, rows: str, cols: str) -> Operand | None:
    if letters == rows + cols:
        return Operand(node, Cut(0, len(rows)))
    if letters == cols + rows:
        return Operand(node, Cut(0, len(cols)), transposed=True)
    return None
