"""Cuts: how a tensor of any rank is seen as a batch of matrices.

Example: a linear layer on ``x[b, s, i]`` sees the matrix ``(b s, i)``: ``Cut(0, 2)``.

A cut splits the dimensions of a tensor in three blocks: the leading block is the batch, the middle
block, flattened, the rows, the last block the columns. ``view`` and ``permute`` only move cuts.

A batch of images ``(n, c, h, w)`` is also seen as one matrix ``(n h w, c)``: the positions of all
images are rows, and channels are columns. This is the cut :data:`IMAGES`. It is not moved.

Invariant: a cut that a function here returns shows the same matrix, or its transpose if the
function says so. If that is not known for all values of symbolic sizes, the function returns None.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.sizes import (
    Shape,
    all_one,
    index_of,
    is_one,
    is_zero,
    numel,
    prefix_products,
    same_shape,
)


class Images(NamedTuple):
    """How a cut shows images that are no block of dimensions.

    Attributes:
        folded: None if the matrix has a row for each position, and a column for each channel. Else
            the tensor is the fold of a matrix of these extents: patches are added up where they
            overlap. Only sums and multiples of folds are read.
        by: What a fold depends on besides: folds by different geometries are of different matrices.
    """

    folded: tuple[Dim, Dim] | None = None
    by: Hashable = None

    def extents(self, shape: Shape) -> tuple[Dim, Dim, Dim]:
        """Sizes of batch, rows and columns."""
        return (1, *(self.folded or (numel((shape[0], *shape[2:])), shape[1])))


class Cut(NamedTuple):
    """Where the rows begin and where the columns begin among a tensor's dimensions.

    Attributes:
        rows: The dimension at which the rows begin.
        cols: The dimension at which the columns begin.
        images: How images are shown; None if the blocks of dimensions are shown.
    """

    rows: int
    cols: int
    images: Images | None = None

    def extents(self, shape: Shape) -> tuple[Dim, Dim, Dim]:
        """Sizes of batch, rows and columns."""
        if self.images is not None:
            return self.images.extents(shape)
        return _extents(shape, self.rows, self.cols)


#: Images as one matrix: a row for each position of each image, a column for each channel.
IMAGES = Cut(0, 0, Images())


def fold(rows: Dim, cols: Dim, by: Hashable) -> Cut:
    """The cut that shows the matrix of which images are the fold, by a geometry."""
    return Cut(0, 0, Images((rows, cols), by))


# Equal layers make equal calls, and the results depend on the arguments alone.
_remembered = lru_cache(maxsize=1 << 14)


@_remembered
def _extents(shape: Shape, rows: int, cols: int) -> tuple[Dim, Dim, Dim]:
    return numel(shape[:rows]), numel(shape[rows:cols]), numel(shape[cols:])


def same_matrix(shape: Shape, one: Cut, other: Cut) -> bool:
    """True if two cuts of a tensor are known to show the same batch of matrices."""
    if one == other:
        return True
    is_plain = one.images is other.images is None
    return is_plain and same_shape(one.extents(shape), other.extents(shape))


def turned_vector(shape: Shape, one: Cut, other: Cut) -> bool:
    """True if one cut of a tensor shows a row where the other shows a column, for each matrix."""
    if one.images is not None or other.images is not None:
        return False
    batch, rows, cols = one.extents(shape)
    is_vector = is_one(rows) != is_one(cols)
    return is_vector and same_shape((batch, cols, rows), other.extents(shape))


def last_dim_cut(ndim: int) -> Cut:
    """All dimensions but the last are rows: how linear layers see their input."""
    return Cut(0, ndim - 1)


@_remembered
def recut(shape: Shape, cut: Cut, onto: Shape) -> Cut | None:
    """The cut of a reshaped tensor that leaves the matrix as it is; None if there is none."""
    if cut.images is not None:
        return cut if same_shape(shape, onto) else None
    batch, rows, _ = extents = cut.extents(shape)
    if any(map(is_zero, shape)):
        # Without elements all matrices of equal extents are the same.
        ends = range(len(onto) + 1)
        cuts = (Cut(start, end) for start in ends for end in ends[start:])
        return next((moved for moved in cuts if same_shape(moved.extents(onto), extents)), None)
    products = prefix_products(onto)
    start = index_of(batch, products)
    end = None if start is None else index_of(numel((batch, rows)), products, start)
    return None if start is None or end is None else _cut_behind_ones(onto, start, end)


@_remembered
def permuted_cut(shape: Shape, cut: Cut, dims: tuple[int, ...]) -> tuple[Cut, bool] | None:
    """How ``tensor.permute(dims)`` shows the matrix that ``cut`` shows of ``tensor``.

    Returns:
        The cut of the permuted tensor and whether it shows the transpose, or None where the
        permutation mixes rows, columns or batch. Dimensions of size 1 may stand anywhere.
    """
    if cut.images is not None:
        return None
    blocks = (range(cut.rows), range(cut.rows, cut.cols), range(cut.cols, len(shape)))
    if dims == (*blocks[0], *blocks[2], *blocks[1]) and blocks[1] and blocks[2]:
        # A transpose. For a row or a column, the code below would take it for a reshape.
        return Cut(cut.rows, cut.rows + len(blocks[2])), True
    batch, rows, cols = ([d for d in block if not is_one(shape[d])] for block in blocks)
    order = [d for d in dims if not is_one(shape[d])]
    if order == batch + rows + cols:
        transposed, middle = False, rows
    elif order == batch + cols + rows:
        transposed, middle = True, cols
    else:
        return None
    position = {d: i for i, d in enumerate(dims)}
    start = position[batch[-1]] + 1 if batch else 0
    end = position[middle[-1]] + 1 if middle else start
    return _cut_behind_ones([shape[d] for d in dims], start, end), transposed


def _cut_behind_ones(shape: Sequence[Dim], rows: int, cols: int) -> Cut:
    """A cut that counts the dimensions of size 1 behind the rows as rows; one column is left.

    So a matrix of one row has a dimension for its rows, and its transpose is a permutation.
    """
    while cols + 1 < len(shape) and is_one(shape[cols]):
        cols += 1
    return Cut(rows, cols)


@_remembered
def inverse(dims: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes ``dims``."""
    result = [0] * len(dims)
    for i, d in enumerate(dims):
        result[d] = i
    return tuple(result)


class Repetition(NamedTuple):
    """How a smaller tensor is repeated to fill a matrix.

    Attributes:
        cut: Shows the smaller tensor as one row, or as one column.
        rows: True if it is a row, repeated for every row of the matrix; else a column.
    """

    cut: Cut
    rows: bool


@_remembered
def repetition(term: Shape, shape: Shape, cut: Cut) -> Repetition | None:
    """How a tensor of one shape broadcasts over the matrix that a cut shows of another.

    Returns:
        None if the shapes are equal, or if the tensor is neither one row nor one column.
    """
    lead = len(shape) - len(term)
    if cut.rows != 0 or lead < 0 or same_shape(term, shape):
        return None
    filled = (1,) * lead + tuple(term)
    if cut.images is not None:
        is_row = cut == IMAGES and lead < 2 and same_shape(filled[1:2], shape[1:2])
        is_alone = all_one(filled[:1]) and all_one(filled[2:])
        return Repetition(Cut(0, 1 - lead), rows=True) if is_row and is_alone else None
    above, behind = filled[: cut.cols], filled[cut.cols :]
    seen = Cut(0, max(cut.cols - lead, 0))
    if same_shape(behind, shape[cut.cols :]) and all_one(above):
        return Repetition(seen, rows=True)
    if same_shape(above, shape[: cut.cols]) and all_one(behind):
        return Repetition(seen, rows=False)
    return None
