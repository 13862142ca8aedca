"""Writing: the calls that the steps of plans are made of.

    ``x A'``       ->      permute(a), mm(x, permute)

A call whose form cannot be told from its arguments is given its form here: a column times a column
could be read as an elementwise product.

Invariant: read back, each call is what its method says.
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
from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.levels.cuts import inverse
from runlora_fx.passes.levels.forms import (
    Broadcast,
    Copy,
    DiagonalMultiple,
    DiagonalOfProduct,
    Operand,
    Reshape,
    Total,
    Written,
)
from runlora_fx.passes.levels.forms.assigned import STACK, OuterProduct, SumOfRows
from runlora_fx.passes.levels.forms.products import aligned_factors
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.origins import Computed, Origin
from runlora_fx.passes.levels.sizes import (
    Shape,
    example_of,
    same_shape,
    shape_of,
)
from runlora_fx.passes.read.reader import GraphReader

_aten = torch.ops.aten


class Writer(NodeWriter):
    """Writes the calls that the steps of plans are made of.

    Attributes:
        materialised: What computes virtual leaves that a plan needs.
        picked: What was picked: as cheap to pick again as a view, and as large as all rows.
    """

    def __init__(self, graph: fx.Graph, reader: GraphReader, dialect: Dialect) -> None:
        """Write into the graph that the reader has read."""
        super().__init__(graph, reader, dialect.calls)
        self.materialised: list[fx.Node] = []
        self.picked: list[fx.Node] = []
        self._viewable: dict[Hashable, bool] = {}

    @property
    def flattens(self) -> bool:
        """Whether products take matrices only, so that activations must be flattened."""
        return self._calls.stacked is None

    # -- calls ---------------------------------------------------------------------------------

    def matmul(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """``a @ b`` of matrices or batches of matrices."""
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

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """``a + b``. Never with ``alpha``: Inductor (2.13) loses it where it fuses mm and add."""
        return self.call(self._calls.add, a, b)

    def scale(self, a: fx.Node, by: float | fx.Node) -> fx.Node:
        """``a * by``."""
        return a if by == 1.0 else self.call(self._calls.mul, a, by)

    def shift(self, a: fx.Node, by: float) -> fx.Node:
        """``a + by`` for a number."""
        return a if by == 0.0 else self.call(self._calls.add, a, by)

    def stretch(self, a: fx.Node, vector: fx.Node, *, rows: bool) -> fx.Node:
        """``a * vector``: each row of a matrix, or each column, times an entry of the vector."""
        node = self.call(self._calls.mul, a, vector)
        # A column times a column could as well be read as an elementwise product.
        self._reader.forms[node] = DiagonalMultiple(a, vector, rows)
        return node

    def divide(self, a: fx.Node, by: fx.Node) -> fx.Node:
        """``a / by``."""
        return self.call(self._calls.div, a, by)

    def cast(self, a: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``a`` in another dtype."""
        val = example_of(a)
        assert val is not None
        if val.dtype == dtype:
            return a
        node = self.call(self._calls.cast, a, dtype)
        # Whoever casts here may: also a leaf to a narrower dtype, where the reader would stop.
        self._reader.forms[node] = Reshape(a)
        return node

    def laid_out(self, a: fx.Node, order: Sequence[int]) -> fx.Node:
        """A copy of ``a`` that lies in memory with its dimensions in an order, outermost first."""
        permuted = self._permute(a, order)
        copied = self.call(self._calls.clone, permuted, memory_format=torch.contiguous_format)
        # The reader stops where a copy changes the layout; this one is read through. A cut that
        # flattens two dimensions shows no matrix of the copy while they stand in another order, so
        # the result names what it is a copy of.
        self._reader.forms[copied] = Copy(permuted)
        result = self._permute(copied, inverse(tuple(order)))
        self._reader.forms[result] = Copy(a)
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
        # A view that the graph made may be a leaf: then what it shows is none.
        if a in self.own and a.target is self._calls.view:
            viewed = a.args[0]
            if isinstance(viewed, fx.Node) and same_shape(shape_of(viewed), shape):
                return viewed
        val, sizes = example_of(a), self._sizes(shape)
        assert val is not None
        target = self._calls.view if self._is_viewable(val, sizes) else self._calls.reshape
        return self.call(target, a, sizes)

    def _is_viewable(self, val: torch.Tensor, sizes: list[int | fx.Node]) -> bool:
        """Whether the strides of a tensor allow a view of some sizes; equal ones tried once."""
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

    def leaf(self, origin: Origin) -> fx.Node:
        """The tensor of a leaf: the node that holds it, or one that is written."""
        if origin.node is not None:
            return origin.node
        begin = len(self.written)
        node = origin.write(self)
        self._reader.forms[node] = Written(origin)
        if isinstance(origin, Computed):
            self.materialised += [node, *self.written[begin:]]
        return node

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the root that is written now."""
        like = example_of(self.anchor)
        assert like is not None
        return like.dtype

    def ones(self, rows: Dim) -> fx.Node:
        """A column of ones of shape (rows, 1), in the dtype and on the device of the root."""
        like = example_of(self.anchor)
        assert like is not None
        sizes = [self._size(rows), 1]
        return self.call(self._calls.full, sizes, 1.0, dtype=like.dtype, device=like.device)

    def zeros(self, shape: Shape) -> fx.Node:
        """Zeros of a shape, in the dtype and on the device of the root."""
        like = example_of(self.anchor)
        assert like is not None
        sizes = [self._size(size) for size in shape]
        return self.call(self._calls.full, sizes, 0, dtype=like.dtype, device=like.device)

    def outer(self, column: fx.Node, row: fx.Node) -> fx.Node:
        """A column times a row for each matrix in a batch, elementwise."""
        node = self.call(self._calls.mul, column, row)
        self._reader.forms[node] = OuterProduct(Operand(column, STACK), Operand(row, STACK), STACK)
        return node

    def pick(self, stack: fx.Node, by: TokenAssignment) -> fx.Node:
        """The matrices of the tokens' experts."""
        node = self.call(_aten.index.Tensor, stack, [by.node])
        self.picked.append(node)
        return node

    def summed_by_expert(self, rows: fx.Node, by: TokenAssignment) -> fx.Node:
        """For each expert the sum of the matrices of its tokens."""
        zeros = self.zeros((by.experts, *shape_of(rows)[1:]))
        node = self.call(_aten.index_put.default, zeros, [by.node], rows, True)
        self._reader.forms[node] = SumOfRows(by, rows, zeros)
        return node

    def grouped_product(self, rows: fx.Node, stack: fx.Node, by: TokenAssignment) -> fx.Node:
        """Each row times the matrix of its expert."""
        if by.kind == "aten":
            return self.call(_aten._grouped_mm.default, rows, stack, by.node)
        operator = torch.ops.transformers.grouped_mm_fallback.default
        return self.call(operator, rows, stack, by.node)

    def grouped_outer(self, columns: fx.Node, rows: fx.Node, by: TokenAssignment) -> fx.Node:
        """For each expert the sum of columns times rows of its tokens; both given as rows."""
        columns = self.call(self._calls.permute, columns, [1, 0])
        return self.call(_aten._grouped_mm.default, columns, rows, by.node)

    def repeat(self, a: fx.Node, times: Dim, *, rows: bool) -> fx.Node:
        """One row repeated to a number of rows, or one column to a number of columns."""
        sizes = [self._size(times), -1] if rows else [-1, self._size(times)]
        node = self.call(self._calls.expand, a, sizes)
        self._reader.forms[node] = Broadcast(a)
        return node

    def total(self, a: fx.Node, *, rows: bool) -> fx.Node:
        """The sum of the rows of a matrix as one row, or of its columns as one column."""
        n = len(shape_of(a))
        dims = list(range(n - 1)) if rows else [n - 1]
        node = self.call(self._calls.sum, a, dims, True)
        self._reader.forms[node] = Total(a, rows)
        return self.reshape(node, (1, shape_of(a)[-1])) if rows else node

    def row_dots(self, a: fx.Node, b: fx.Node, *, rows: bool) -> fx.Node:
        """The dot products of the rows of two matrices, or those of their columns."""
        multiplied = self.call(self._calls.mul, a, b)
        node = self.call(self._calls.sum, multiplied, [1 if rows else 0])
        # Also where something else reads the multiplication, or nothing here is a product.
        self._reader.forms[node] = DiagonalOfProduct(*aligned_factors(a, b, 2, rows=rows))
        return node


def _number(x: float) -> int | float:
    return int(x) if x == int(x) else x
