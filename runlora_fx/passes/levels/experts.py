"""Readers of the operators by which mixtures of experts multiply.

Example: ``transformers.grouped_mm_fallback(x, w, offs)`` is ``X W[k]`` for the offsets of k.

Invariant: sizes of weights are known numbers; only the number of tokens may be a symbol.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx

from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.levels.forms import Form, Operand
from runlora_fx.passes.levels.forms.assigned import (
    ROWS,
    STACK,
    OuterProduct,
    OuterProductOfRows,
    PickOfRows,
    ProductOfRows,
    SumOfRows,
)
from runlora_fx.passes.levels.sizes import equal, example_of, facts_of, is_one, same_shape, shape_of

_aten = torch.ops.aten

_BACKWARD = "transformers.grouped_mm_fallback_backward.default"

#: The alignment that ``aten::_grouped_mm`` requires of the rows of its operands [B].
_ALIGNMENT = 16


def index(stack: Any, indices: Any) -> Form | None:
    """``stack[k]`` for one index of numbers on the first dimension."""
    by = _indexed(indices, stack)
    return None if by is None else PickOfRows(by, stack)


def index_select(stack: Any, dim: Any, indices: Any) -> Form | None:
    """``stack[k]`` as a selection along the first dimension."""
    return index(stack, [indices]) if dim == 0 else None


def index_put(zeros: Any, indices: Any, rows: Any, accumulate: Any = False) -> Form | None:
    """``zeros[k] += rows``: for each expert the sum over its tokens."""
    if accumulate is not True or not _is_zero(zeros) or example_of(rows) is None:
        return None
    by = _indexed(indices, zeros)
    is_whole = by is not None and same_shape(shape_of(rows), (by.tokens, *shape_of(zeros)[1:]))
    return SumOfRows(by, rows, zeros) if by is not None and is_whole else None


def outer_product(a: Any, b: Any) -> Form | None:
    """A column times a row for each token, elementwise; in either order."""
    x, y = facts_of(a), facts_of(b)
    if x is None or y is None or not len(x.shape) == len(y.shape) == 3 or x.shape == y.shape:
        return None
    for column, row in ((a, b), (b, a)):
        (tokens, rows, one), (again, other_one, cols) = shape_of(column), shape_of(row)
        is_outer = is_one(one) and is_one(other_one) and equal(tokens, again)
        if is_outer and not is_one(rows) and not is_one(cols) and not is_one(tokens):
            return OuterProduct(Operand(column, STACK), Operand(row, STACK), STACK)
    return None


def grouped_mm(rows: Any, other: Any, offs: Any = None) -> Form | None:
    """``aten::_grouped_mm``: rows times matrices, or columns times rows."""
    x, y = example_of(rows), example_of(other)
    if x is None or y is None or x.dim() != 2 or offs is None:
        return None
    if y.dim() == 3:
        return _product("aten", rows, other, offs)
    left = _untransposed(rows)
    return None if left is None or y.dim() != 2 else _outer("aten", left, other, offs, rows)


def grouped_mm_fallback(rows: Any, stack: Any, offs: Any) -> Form | None:
    """The operator of transformers for devices and dtypes without ``aten::_grouped_mm``."""
    return _product("transformers", rows, stack, offs)


def result(pair: Any, i: Any) -> Form | None:
    """A result of the backward of :func:`grouped_mm_fallback`: ``dY W'[k]`` or ``sum_k(X' dY)``."""
    if not isinstance(pair, fx.Node) or str(pair.target) != _BACKWARD or pair.kwargs:
        return None
    rows, stack, offs, gradient = pair.args
    if i == 1:
        by = _grouped("transformers", rows, stack, offs)
        return None if by is None else _outer("transformers", rows, gradient, offs, pair)
    return _product("transformers", gradient, stack, offs, transposed=True, part=pair)


def _product(
    kind: Literal["aten", "transformers"],
    rows: Any,
    stack: Any,
    offs: Any,
    *,
    transposed: bool = False,
    part: fx.Node | None = None,
) -> Form | None:
    by = _grouped(kind, rows, stack, offs)
    if by is None:
        return None
    parts = () if part is None else (part,)
    return ProductOfRows(by, Operand(rows, ROWS), Operand(stack, STACK, transposed), parts)


def _outer(
    kind: Literal["aten", "transformers"], left: Any, right: Any, offs: Any, part: fx.Node
) -> Form | None:
    by = _grouped(kind, left, None, offs)
    if by is None or not _has_known_width(right):
        return None
    columns = Operand(left, ROWS, transposed=True)
    return OuterProductOfRows(by, columns, Operand(right, ROWS), (part,))


def _grouped(
    kind: Literal["aten", "transformers"], rows: Any, stack: Any, offs: Any
) -> TokenAssignment | None:
    """The assignment of rows that are sorted by expert."""
    ends, x = example_of(offs), example_of(rows)
    if ends is None or ends.dim() != 1 or x is None or not _has_known_width(rows):
        return None
    if stack is not None and (example_of(stack) is None or len(shape_of(stack)) != 3):
        return None
    tokens, (experts,) = shape_of(rows)[0], shape_of(offs)
    widths = () if stack is None else shape_of(stack)[1:]
    if is_one(tokens) or is_one(experts) or not all(isinstance(w, int) for w in widths):
        return None
    multiple = max(_ALIGNMENT // x.itemsize, 1) if kind == "aten" else 1
    return TokenAssignment(kind, offs, tokens, experts, multiple)


def _has_known_width(rows: Any) -> bool:
    val = example_of(rows)
    return val is not None and val.dim() == 2 and isinstance(shape_of(rows)[1], int)


def _indexed(indices: Any, stack: Any) -> TokenAssignment | None:
    """The assignment by one index of numbers on the first dimension of a stack of matrices."""
    if not isinstance(indices, list | tuple) or len(indices) != 1:
        return None
    k, matrices = example_of(indices[0]), example_of(stack)
    if k is None or matrices is None or k.dim() != 1 or matrices.dim() != 3:
        return None
    if k.dtype not in (torch.int32, torch.int64):
        return None
    (tokens,), (experts, *widths) = shape_of(indices[0]), shape_of(stack)
    if is_one(tokens) or is_one(experts) or not all(isinstance(w, int) for w in widths):
        return None
    return TokenAssignment("indexed", indices[0], tokens, experts)


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node) or example_of(node) is None:
        return False
    is_full = node.target is _aten.full.default and bool(node.args[1] == 0)
    return is_full or node.target in (_aten.new_zeros.default, _aten.zeros.default)


def _untransposed(node: fx.Node) -> fx.Node | None:
    """The matrix that a node is the transpose of; None if it is no transpose."""
    args: Any = node.args
    is_transpose = (
        (node.target is _aten.permute.default and [d % 2 for d in args[1]] == [1, 0])
        or (node.target is _aten.transpose.int and {d % 2 for d in args[1:]} == {0, 1})
        or node.target is _aten.t.default
    )
    source = args[0] if is_transpose else None
    return source if isinstance(source, fx.Node) else None
