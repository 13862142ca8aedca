"""Forms: what a node computes, in the few terms that all graph levels share.

A tensor is seen as a batch of matrices by two cuts through its dimensions (:class:`Cut`): the
leading block is the batch, the middle block, flattened, the rows, the last block the columns. A
linear layer on ``x[b, s, i]`` sees the matrix ``(b s, i)``; a transpose of it may be ``(i, b s)``.

Dialects translate nodes into forms; the reader turns forms into polynomials.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import NamedTuple, TypeAlias

import sympy
import torch
from torch import fx

from runlora_fx.passes.algebra.posed import Dim

Shape: TypeAlias = tuple[Dim, ...]


class Cut(NamedTuple):
    """Where the rows begin and where the columns begin among a tensor's dimensions."""

    rows: int
    cols: int

    def extents(self, shape: Shape) -> tuple[Dim, Dim, Dim]:
        """Sizes of batch, rows and columns."""
        return (
            numel(shape[: self.rows]),
            numel(shape[self.rows : self.cols]),
            numel(shape[self.cols :]),
        )


@dataclass(frozen=True)
class Operand:
    """A node as a matrix, maybe transposed."""

    node: fx.Node
    cut: Cut
    transposed: bool = False


@dataclass(frozen=True)
class Product:
    """``left @ right``, seen through ``out`` in the node's own shape."""

    left: Operand
    right: Operand
    out: Cut


@dataclass(frozen=True)
class Dots:
    """The diagonal of ``left @ right``: the dot products of rows and columns, as a vector."""

    left: Operand
    right: Operand
    out: Cut


@dataclass(frozen=True)
class Sum:
    """``sum(c * term)``; terms may be of lower rank and broadcast."""

    terms: tuple[tuple[fx.Node | Product, float], ...]


@dataclass(frozen=True)
class Scale:
    """``source * number`` or, with a node, ``source * (0-d tensor or symbolic number)``.

    Attributes:
        source: What is scaled.
        by: What it is scaled by.
        divides: Whether it is divided by it instead.
    """

    source: fx.Node
    by: float | fx.Node
    divides: bool = False


@dataclass(frozen=True)
class Stretch:
    """``source * vector``: every column scaled by an entry of the vector, or every row.

    Attributes:
        source: A tensor of the result's shape.
        by: The vector, with the other dimensions of the result's missing or 1.
        rows: Whether rows are scaled: the vector has the result's dimensions but the last.
    """

    source: fx.Node
    by: fx.Node
    rows: bool


@dataclass(frozen=True)
class Shift:
    """``source + number``."""

    source: fx.Node
    by: float


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same order, or simply the same tensor."""

    source: fx.Node


@dataclass(frozen=True)
class Copy:
    """The same values in new memory: dropout in evaluation, ``clone``, ``contiguous``.

    Read through where the values are an operand. What is copied stays a root, for whoever asked for
    the copy may rely on its layout; unless the copy is only added to something.
    """

    source: fx.Node


@dataclass(frozen=True)
class Permute:
    """Dimensions in another order."""

    source: fx.Node
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """The identity matrix."""


@dataclass(frozen=True)
class Cast:
    """The source in another dtype: a border of the region, unless it changes nothing."""

    source: fx.Node


Form: TypeAlias = (
    Product | Dots | Sum | Scale | Stretch | Shift | Reshape | Copy | Permute | Identity | Cast
)


#: Every stage asks for shapes many times, and symbolic ones are slow to look up. The keys are
#: identities: a tensor's own equality means something else.
_shapes: dict[int, tuple[weakref.ref[torch.Tensor], Shape]] = {}


def products(form: Form) -> list[Product]:
    """The matrix products in a form."""
    terms = [term for term, _ in form.terms] if isinstance(form, Sum) else [form]
    return [term for term in terms if isinstance(term, Product)]


def value_of(node: object) -> torch.Tensor | None:
    """The example tensor of a node, or None."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def shape_of(node: fx.Node) -> Shape:
    """Sizes of a tensor node, SymInts as sympy expressions."""
    val = value_of(node)
    if val is None:
        raise TypeError(f"{node.name} holds no tensor")
    key = id(val)
    known = _shapes.get(key)
    if known is not None and known[0]() is val:
        return known[1]
    shape = tuple(dim_of(size) for size in val.shape)
    _shapes[key] = (weakref.ref(val, lambda _: _shapes.pop(key, None)), shape)
    return shape


def dim_of(size: int | torch.SymInt) -> Dim:
    """A size as an integer or a sympy expression."""
    if isinstance(size, int):
        return size
    expr: sympy.Expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def numel(shape: Sequence[Dim]) -> Dim:
    """The product of the sizes."""
    total: Dim = 1
    for size in shape:
        total = total * size
    return total


def last_dim_cut(ndim: int) -> Cut:
    """All dimensions but the last are rows: how linear layers see their input."""
    return Cut(0, ndim - 1)


def recut(shape: Shape, cut: Cut, onto: Shape) -> Cut | None:
    """The cut of a reshaped tensor that leaves the matrix as it is; None if there is none."""
    batch, rows, _ = cut.extents(shape)
    if batch == 0 or rows == 0:
        return None
    prefix: list[Dim] = [1, *accumulate(onto, mul)]
    if batch not in prefix:
        return None
    start = prefix.index(batch)
    if batch * rows not in prefix[start:]:
        return None
    return Cut(start, prefix.index(batch * rows, start))


def permuted_cut(shape: Shape, cut: Cut, dims: tuple[int, ...]) -> tuple[Cut, bool] | None:
    """How ``tensor.permute(dims)`` shows the matrix that ``cut`` shows of ``tensor``.

    Returns:
        The cut of the permuted tensor and whether it shows the transpose, or None where the
        permutation mixes rows, columns or batch. Dimensions of size 1 may stand anywhere.
    """
    blocks = (range(cut.rows), range(cut.rows, cut.cols), range(cut.cols, len(shape)))
    if dims == (*blocks[0], *blocks[2], *blocks[1]) and blocks[1] and blocks[2]:
        # Plainly the transpose, also of a row or a column, which could be taken for a reshape.
        return Cut(cut.rows, cut.rows + len(blocks[2])), True
    batch, rows, cols = ([d for d in block if shape[d] != 1] for block in blocks)
    order = [d for d in dims if shape[d] != 1]
    if order == batch + rows + cols:
        transposed, middle = False, rows
    elif order == batch + cols + rows:
        transposed, middle = True, cols
    else:
        return None
    position = {d: i for i, d in enumerate(dims)}
    start = position[batch[-1]] + 1 if batch else 0
    end = position[middle[-1]] + 1 if middle else start
    return Cut(start, end), transposed


def inverse(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes ``dims``."""
    result = [0] * len(dims)
    for i, d in enumerate(dims):
        result[d] = i
    return tuple(result)
