"""Scope: what every step needs: leaves as matrices, sizes, dtypes, scaling and adding.

    leaf x of shape (2, 5, 64), transposed      ->      permute(view(x, [10, 64]), [1, 0])

Invariant: the answers do not depend on which values were emitted before.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from runlora_fx.passes.algebra.images import are_images
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.algebra.words import Factor
from runlora_fx.passes.emit.nodes.writer import Writer
from runlora_fx.passes.emit.steps.task import Task
from runlora_fx.passes.levels.sizes import equal, example_of, is_one, numel, shape_of


class Scope:
    """The task that is emitted, the writer, and the leaves of the graph.

    Attributes:
        task: What is emitted.
        writer: Writes the nodes.
        reader: The linear algebra of the graph.
        leaves: The leaves of the graph.
    """

    def __init__(self, task: Task, writer: Writer) -> None:
        """Collect what the steps of a task need."""
        self.task = task
        self.writer = writer
        self.reader = task.analysis.reader
        self.leaves = task.analysis.reader.leaves

    # -- sizes and dtypes ----------------------------------------------------------------------

    def hint(self, size: Dim) -> int:
        """The size that a dimension had when the graph was traced."""
        return self.task.analysis.hint(size)

    def dtype(self, value: Value) -> torch.dtype:
        """The dtype that a value is computed in: the narrowest of its leaves'.

        Leaves have several dtypes only under ``numerics="relaxed"``. A product of fp32 adapters is
        then computed in fp32, and rounded once when it is added to a bf16 weight.
        """
        origins = (self.leaves.matrices[i].origin for i in sorted(value.core.leaves))
        dtypes = [origin.dtype for origin in origins if origin.dtype is not None]
        return min(dtypes or [self.writer.dtype], key=lambda dtype: dtype.itemsize)

    # -- leaves --------------------------------------------------------------------------------

    def is_ones(self, factor: Factor) -> bool:
        """True if a leaf is the column of ones that broadcasts a bias."""
        return self.leaves.matrices[factor.leaf].is_ones

    def is_picked(self, factor: Factor) -> bool:
        """True if a leaf is picked: for each token the matrix of its expert."""
        return self.leaves.matrices[factor.leaf].picked is not None

    def leaf_node(self, factor: Factor) -> fx.Node:
        """The node that holds a leaf, in its own shape."""
        return self.writer.leaf(self.leaves.matrices[factor.leaf].origin)

    def leaf(self, factor: Factor) -> fx.Node:
        """A leaf as a matrix; activations keep their shape if products take it."""
        leaf, node = self.leaves.matrices[factor.leaf], self.leaf_node(factor)
        if leaf.images:
            return node
        as_it_is = (
            not self.writer.flattens
            and len(shape_of(node)) > 1
            and equal(shape_of(node)[-1], leaf.cols)
        )
        if not as_it_is or factor.transposed or leaf.batched:
            node = self.flat(factor.leaf, node)
        return self.writer.transpose(node) if factor.transposed else node

    def plain(self, p: Polynomial, node: fx.Node) -> fx.Node:
        """A node of a polynomial with its rows flattened; batches and images are left alone."""
        is_batch = any(self.leaves.matrices[leaf].batched for leaf in p.leaves)
        is_plain = is_batch or len(shape_of(node)) == 2 or self.are_images(p)
        return node if is_plain else self.writer.reshape(node, flattened(node))

    def are_images(self, p: Polynomial) -> bool:
        """True if a node of a polynomial, or of its transpose, is a batch of images."""
        return are_images(self.leaves.matrices, p)

    def flat(self, leaf: int, node: fx.Node) -> fx.Node:
        """The node of a leaf, reshaped to a matrix or a batch of matrices."""
        spec = self.leaves.matrices[leaf]
        return self.writer.reshape(node, matrix_shape(spec.batch, spec.rows, spec.cols))

    def ones_side(self, left: Polynomial, right: Polynomial) -> Literal["left", "right"] | None:
        """The operand that is a column of ones on the left, or a row of ones on the right."""
        first, last = left.leaf, right.leaf
        if first is not None and not first.transposed and self.is_ones(first):
            return "left"
        if last is not None and last.transposed and self.is_ones(last):
            return "right"
        return None

    def scaled(self, node: fx.Node, scalar: Scalar) -> fx.Node:
        """A node times a scalar: a number and scalar leaves."""
        node = self.writer.scale(node, scalar.number)
        for i in scalar.leaves:
            by, inverse = self.leaves.scalars[i]
            if example_of(by) is not None:
                by = self.writer.reshape(by, ())
            node = self.writer.divide(node, by) if inverse else self.writer.scale(node, by)
        return node

    def added(self, total: fx.Node | None, node: fx.Node) -> fx.Node:
        """``total + node``; if only one of them is flattened, the other is flattened too."""
        if total is None:
            return node
        if 1 < len(shape_of(total)) != len(shape_of(node)) > 1:
            total, node = (self.writer.reshape(x, flattened(x)) for x in (total, node))
        return self.writer.add(total, node)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    val = example_of(node)
    assert val is not None
    return val.dtype


def matrix_shape(batch: Dim, rows: Dim, cols: Dim) -> tuple[Dim, ...]:
    """The shape of a matrix, or of a batch of matrices."""
    return (rows, cols) if is_one(batch) else (batch, rows, cols)


def flattened(node: fx.Node) -> tuple[Dim, ...]:
    """The shape of a tensor as a matrix of its last dimension."""
    shape = shape_of(node)
    return (numel(shape[:-1]), shape[-1])
