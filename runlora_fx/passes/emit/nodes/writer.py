"""Writer: the calls that the steps of plans are made of.

    writer.leaf(origin)                 the node that holds a leaf, or that computes it
    writer.pick(stack, by)              stack[k]

It has one method for every call: those of :mod:`runlora_fx.passes.emit.nodes.matrices`, and here
those of leaves and of matrices that tokens pick.

Invariant: the form of every written node is what the method's docstring says.
"""

from __future__ import annotations

import torch
from torch import fx

from runlora_fx.passes.emit.nodes.matrices import MatrixWriter
from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.levels.forms import Operand, Written
from runlora_fx.passes.levels.forms.assigned import (
    STACK,
    OuterProduct,
    ProductOfBatch,
    SumOfRows,
)
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.origins import Computed, Origin
from runlora_fx.passes.levels.sizes import example_of, is_one, shape_of, strides_of
from runlora_fx.passes.read.reader import GraphReader

_aten = torch.ops.aten


class Writer(MatrixWriter):
    """Writes the calls that the steps of plans are made of.

    Attributes:
        materialised: The nodes that compute virtual leaves.
        picked: The nodes that pick each token's matrix. Such a tensor is large, and cheap to
            recompute in the backward.
    """

    def __init__(self, graph: fx.Graph, reader: GraphReader, dialect: Dialect) -> None:
        """Write into the graph that the reader has read."""
        super().__init__(graph, reader, dialect)
        self.materialised: list[fx.Node] = []
        self.picked: list[fx.Node] = []

    def leaf(self, origin: Origin) -> fx.Node:
        """The node that holds a leaf. For a virtual leaf, nodes are written that compute it."""
        if origin.node is not None:
            return origin.node
        begin = len(self.written)
        node = origin.write(self)
        self.claim(node, Written(origin))
        if isinstance(origin, Computed):
            self.materialised += [node, *self.written[begin:]]
        return node

    def outer(self, column: fx.Node, row: fx.Node) -> fx.Node:
        """Columns (b, m, 1) times rows (b, 1, n), as an elementwise multiplication."""
        node = self.call(self._calls.mul, column, row)
        self.claim(node, OuterProduct(Operand(column, STACK), Operand(row, STACK), STACK))
        return node

    def pick(self, stack: fx.Node, by: TokenAssignment) -> fx.Node:
        """``stack[k]``: for each token the matrix of its expert."""
        node = self.call(_aten.index.Tensor, stack, [by.node])
        self.picked.append(node)
        return node

    def product_with_all(self, rows: fx.Node, stack: fx.Node, by: TokenAssignment) -> fx.Node:
        """Each token's rows times the matrix of its expert, picked from the products with all."""
        (tokens, count, inner), cols = shape_of(rows), shape_of(stack)[2]
        matrices = self.reshape(self.transpose(stack), (by.experts * cols, inner))
        flat = self.reshape(rows, (tokens * count, inner))
        every = self.matmul(flat, self.transpose(matrices))
        every = self.reshape(every, (tokens, count, by.experts, cols))
        like = example_of(by.node)
        assert like is not None
        own = self.call(
            torch.ops.prims.iota.default,
            self._size(tokens),
            start=0,
            step=1,
            dtype=torch.int64,
            device=like.device,
            requires_grad=False,
        )
        node = self.call(_aten.index.Tensor, every, [own, None, by.node])
        # Nothing else in a graph says that two dimensions of a product are picked together.
        self.claim(node, ProductOfBatch(by, Operand(rows, STACK), Operand(stack, STACK)))
        return node

    def summed_by_expert(self, rows: fx.Node, by: TokenAssignment) -> fx.Node:
        """For each expert the sum of its tokens' matrices."""
        zeros = self.zeros((by.experts, *shape_of(rows)[1:]))
        node = self.call(_aten.index_put.default, zeros, [by.node], rows, True)
        self.claim(node, SumOfRows(by, rows, zeros))
        return node

    def grouped_product(self, rows: fx.Node, stack: fx.Node, by: TokenAssignment) -> fx.Node:
        """Each token's row times the matrix of its expert."""
        if by.kind == "aten":
            if not any(map(is_one, strides_of(stack)[-2:])):
                # The operator reads rows or columns that are contiguous. PEFT's adapters of experts
                # lie interleaved.
                stack = self.laid_out(stack, (0, 1, 2))
                # Inductor gives a copy the layout of what it reads, unless it is told otherwise.
                stack.meta["inductor_realize_to_strides"] = True
            return self.call(_aten._grouped_mm.default, rows, stack, by.node)
        operator = torch.ops.transformers.grouped_mm_fallback.default
        return self.call(operator, rows, stack, by.node)

    def grouped_outer(self, columns: fx.Node, rows: fx.Node, by: TokenAssignment) -> fx.Node:
        """For each expert the sum over its tokens of a column times a row.

        Args:
            columns: Each token's column, as a row of a matrix.
            rows: Each token's row.
            by: The assignment of tokens to experts.
        """
        columns = self.call(self._calls.permute, columns, [1, 0])
        return self.call(_aten._grouped_mm.default, columns, rows, by.node)
