"""Matrices: one method for every call that computes matrices of matrices.

    writer.matmul(x, writer.transpose(a))       ->      permute(a), mm(x, permute)

Most calls are read back by the readers of their level. Some are ambiguous: a column times a column
could be a scaling or an elementwise product. The writer says the form of such a call itself.

Invariant: the form of every written node is what the method's docstring says.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import fx

from runlora_fx._torch_compat import in_fake_mode
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.emit.nodes.example_results import values_of
from runlora_fx.passes.emit.nodes.node_writer import NodeWriter
from runlora_fx.passes.levels.cuts import inverse
from runlora_fx.passes.levels.forms import (
    Broadcast,
    Copy,
    DiagonalMultiple,
    DiagonalOfProduct,
    Reshape,
    Total,
)
from runlora_fx.passes.levels.forms.products import aligned_factors
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import Shape, example_of, same_shape, shape_of
from runlora_fx.passes.read.reader import GraphReader

_aten = torch.ops.aten


class MatrixWriter(NodeWriter):
    """Writes products, sums, scalings, views and reductions."""

    def __init__(self, graph: fx.Graph, reader: GraphReader, dialect: Dialect) -> None:
        """Write into the graph that the reader has read."""
        super().__init__(graph, reader, dialect.calls)
        self._viewable: dict[Hashable, bool] = {}

    @property
    def flattens(self) -> bool:
        """True if products take matrices only, so that activations must be flattened."""
        return self._calls.stacked is None

    # -- calls ---------------------------------------------------------------------------------

    def matmul(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """``a @ b`` of two matrices, two batches of matrices, or stacked rows and a matrix."""
        calls, ranks = self._calls, (len(shape_of(a)), len(shape_of(b)))
        if ranks == (2, 2):
            return self.call(calls.mm, a, b)
        if calls.stacked is not None and ranks[1] == 2:
            return self.call(calls.stacked, a, b)
        return self.call(calls.bmm, a, b)

    def addmm(self, c: fx.Node, a: fx.Node, b: fx.Node, alpha: float) -> fx.Node:
        """``c + alpha * (a @ b)`` in one kernel."""
        kwargs = {} if alpha == 1.0 else {"alpha": _number(alpha)}
        return self.call(self._calls.addmm, c, a, b, **kwargs)

    def merged_weight(self, c: fx.Node, a: fx.Node, b: fx.Node, alpha: float) -> fx.Node:
        """``c + alpha * (a @ b)``, kept from call to call."""
        assert self._calls.merged_weight is not None
        return self.call(self._calls.merged_weight, c, a, b, float(alpha))

    @property
    def merges_fused(self) -> bool:
        """True if the fused merge can be written: Triton is there, and nothing differentiates."""
        if self._calls.merged_weight is None:
            return False
        from runlora_fx import kernels  # only here: it imports Triton

        return bool(kernels.__all__)

    def merged_fused(self, c: fx.Node, a: fx.Node, b: fx.Node, alpha: float) -> fx.Node:
        """``c + alpha * (a @ b)`` by the fused kernel."""
        return self.call(torch.ops.runlora.fused_merge.default, c, a, b, float(alpha))

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """``a + b``, without ``alpha``: Inductor 2.13 drops it when it fuses ``mm`` and ``add``."""
        return self.call(self._calls.add, a, b)

    def add_to_channels(self, images: fx.Node, vector: fx.Node) -> fx.Node:
        """Images plus a number for each channel, which is the bias of a convolution that was new.

        Before -> after: ``convolution(x, w, None, ...)`` -> ``convolution(x, w, vector, ...)``.
        """
        channels = shape_of(images)[1]
        is_new = images in self.own and not images.users
        if is_new and images.target is _aten.convolution.default and not images.args[6]:
            x, weight, bias, *moves = images.args
            if bias is None:
                vector = self.reshape(vector, (channels,))
                return self.call(_aten.convolution.default, x, weight, vector, *moves)
        spread = (channels, *[1] * (len(shape_of(images)) - 2))
        return self.add(images, self.reshape(vector, spread))

    def scale(self, a: fx.Node, by: float | fx.Node) -> fx.Node:
        """``a * by`` for a number or a scalar node; ``a`` itself if the number is 1."""
        return a if by == 1.0 else self.call(self._calls.mul, a, by)

    def shift(self, a: fx.Node, by: float) -> fx.Node:
        """``a + by`` for a number; ``a`` itself if it is 0."""
        return a if by == 0.0 else self.call(self._calls.add, a, by)

    def stretch(self, a: fx.Node, vector: fx.Node, *, rows: bool) -> fx.Node:
        """``a * vector``: every row of a matrix, or every column, times one entry of the vector."""
        node = self.call(self._calls.mul, a, vector)
        # The reader could take a column times a column for an elementwise product.
        self.claim(node, DiagonalMultiple(a, vector, rows))
        return node

    def divide(self, a: fx.Node, by: fx.Node) -> fx.Node:
        """``a / by``."""
        return self.call(self._calls.div, a, by)

    def cast(self, a: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``a`` converted to a dtype; ``a`` itself if it has that dtype."""
        val = example_of(a)
        assert val is not None
        if val.dtype == dtype:
            return a
        node = self.call(self._calls.cast, a, dtype)
        # The reader does not read through a cast of a leaf to a narrower dtype. This one is part of
        # the plan, so it is read through.
        self.claim(node, Reshape(a))
        return node

    def laid_out(self, a: fx.Node, order: Sequence[int]) -> fx.Node:
        """A copy of ``a`` that lies in memory with its dimensions in an order, outermost first."""
        permuted = self._permute(a, order)
        copied = self.call(self._calls.clone, permuted, memory_format=torch.contiguous_format)
        # The reader does not read through a copy that changes the layout, so both forms are stored.
        # The result is a copy of ``a`` itself: a cut of ``a`` that flattens two dimensions has no
        # counterpart in the permuted copy.
        self.claim(copied, Copy(permuted))
        result = self._permute(copied, inverse(tuple(order)))
        self.claim(result, Copy(a))
        return result

    def _permute(self, a: fx.Node, dims: Sequence[int]) -> fx.Node:
        is_trivial = list(dims) == list(range(len(dims)))
        return a if is_trivial else self.call(self._calls.permute, a, list(dims))

    def transpose(self, a: fx.Node) -> fx.Node:
        """The transpose of a matrix, or of each in a batch."""
        n = len(shape_of(a))
        swapped = [*range(n - 2), n - 1, n - 2]
        if a in self.own and a.target is self._calls.permute and a.args[1] == swapped:
            return cast(fx.Node, a.args[0])
        return self.call(self._calls.permute, a, swapped)

    def reshape(self, a: fx.Node, shape: Shape) -> fx.Node:
        """The same elements in another shape."""
        if same_shape(shape_of(a), shape):
            return a
        # Only views that were written here are undone: one of the graph's own may be a leaf.
        if a in self.own and a.target is self._calls.view:
            viewed = a.args[0]
            if isinstance(viewed, fx.Node) and same_shape(shape_of(viewed), shape):
                return viewed
        val, sizes = example_of(a), self._sizes(shape)
        assert val is not None
        target = self._calls.view if self._is_viewable(val, sizes) else self._calls.reshape
        return self.call(target, a, sizes)

    def _is_viewable(self, val: torch.Tensor, sizes: list[int | fx.Node]) -> bool:
        """True if the strides of a tensor allow a view of some sizes."""
        key = (*val.shape, None, *val.stride(), None, *sizes)
        is_static = all(size is None or isinstance(size, int) for size in key)
        if not is_static or key not in self._viewable:
            try:
                with in_fake_mode(self.mode), torch.no_grad():
                    val.view(values_of(sizes))
            except (RuntimeError, ValueError):
                is_viewable = False
            else:
                is_viewable = True
            if not is_static:
                return is_viewable
            self._viewable[key] = is_viewable
        return self._viewable[key]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the anchor, the root that is being replaced."""
        like = example_of(self.anchor)
        assert like is not None
        return like.dtype

    def ones(self, rows: Dim) -> fx.Node:
        """A column of ones of shape (rows, 1), in the root's dtype and on its device."""
        like = example_of(self.anchor)
        assert like is not None
        sizes = [self._size(rows), 1]
        return self.call(self._calls.full, sizes, 1.0, dtype=like.dtype, device=like.device)

    def zeros(self, shape: Shape) -> fx.Node:
        """Zeros of a shape, in the root's dtype and on its device."""
        like = example_of(self.anchor)
        assert like is not None
        sizes = [self._size(size) for size in shape]
        return self.call(self._calls.full, sizes, 0, dtype=like.dtype, device=like.device)

    def repeat(self, a: fx.Node, times: Dim, *, rows: bool) -> fx.Node:
        """One row repeated ``times`` times, or one column."""
        sizes = [self._size(times), -1] if rows else [-1, self._size(times)]
        node = self.call(self._calls.expand, a, sizes)
        self.claim(node, Broadcast(a))
        return node

    def total(self, a: fx.Node, *, rows: bool) -> fx.Node:
        """The sum of a matrix over its rows, as one row; or over its columns, as one column."""
        n = len(shape_of(a))
        dims = list(range(n - 1)) if rows else [n - 1]
        node = self.call(self._calls.sum, a, dims, True)
        self.claim(node, Total(a, rows))
        return self.reshape(node, (1, shape_of(a)[-1])) if rows else node

    def row_dots(self, a: fx.Node, b: fx.Node, *, rows: bool) -> fx.Node:
        """The dot products of the rows of two matrices, or of their columns, as a vector."""
        multiplied = self.call(self._calls.mul, a, b)
        node = self.call(self._calls.sum, multiplied, [1 if rows else 0])
        # The reader reads such a sum only if nothing else reads the multiplication, and if a factor
        # is made of a product.
        self.claim(node, DiagonalOfProduct(*aligned_factors(a, b, 2, rows=rows)))
        return node


def _number(x: float) -> int | float:
    return int(x) if x == int(x) else x
