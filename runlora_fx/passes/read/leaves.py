"""Leaves: tensors that no linear operator made, as the matrices that polynomials are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import fx

from runlora_fx.passes.algebra import polynomials as algebra
from runlora_fx.passes.algebra.polynomials import Factor, Polynomial, Scalar
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.sizes import Shape, is_one, numel, same_shape, shape_of
from runlora_fx.passes.read.value_numbers import ValueNumbers


class LeafWriter(Protocol):
    """What emission offers to an origin that has to write its tensor."""

    def ones(self, rows: Dim) -> fx.Node:
        """A column of ones of shape (rows, 1), in the dtype and on the device of the root."""


class Origin(Protocol):
    """Where the tensor of a leaf comes from: a node holds it, or it is written when needed."""

    @property
    def node(self) -> fx.Node | None:
        """The node that holds the tensor; None if it has to be written."""

    def write(self, writer: LeafWriter) -> fx.Node:
        """The tensor, written where the writer stands if no node holds it."""


@dataclass(frozen=True)
class Held:
    """A node of the graph holds the tensor."""

    node: fx.Node

    def write(self, writer: LeafWriter) -> fx.Node:
        """The node that holds it; nothing is written."""
        return self.node


@dataclass(frozen=True)
class Ones:
    """The column of ones that broadcasts a row over ``rows`` rows; no node holds it."""

    rows: Dim
    node: None = None

    def write(self, writer: LeafWriter) -> fx.Node:
        """A column of ones."""
        return writer.ones(self.rows)


@dataclass(frozen=True)
class Leaf:
    """A tensor that no linear node made, as a matrix (or a batch of them).

    Attributes:
        origin: Where the tensor comes from.
        batch: Matrices in the batch; 1 for a plain matrix.
        rows: Rows of each.
        cols: Columns of each.
        batched: Whether it is a batch of matrices.
        diagonal: Whether it is the diagonal matrix of a vector.
    """

    origin: Origin
    batch: Dim
    rows: Dim
    cols: Dim
    batched: bool
    diagonal: bool = False

    @property
    def node(self) -> fx.Node | None:
        """The node that holds the tensor; None if it has to be written."""
        return self.origin.node

    @property
    def is_ones(self) -> bool:
        """Whether it is the column of ones that broadcasts a row."""
        return isinstance(self.origin, Ones)


class ScalarLeaf(NamedTuple):
    """A 0-d tensor or symbolic number, or its inverse."""

    node: fx.Node
    inverse: bool


@dataclass
class Leaves:
    """The leaves met so far, by value."""

    matrices: list[Leaf] = field(default_factory=list)
    scalars: list[ScalarLeaf] = field(default_factory=list)
    _index: dict[object, int] = field(default_factory=dict)

    def matrix(self, values: ValueNumbers, node: fx.Node, cut: Cut) -> Polynomial:
        """A tensor as a leaf; the same one for equal values seen as equal matrices."""
        number = values.of(node)
        extents, turned = _oriented(shape_of(node), cut)
        batched = not is_one(extents[0])
        key = (number, extents)
        if key not in self._index:
            self._index[key] = len(self.matrices)
            self.matrices.append(Leaf(Held(values.first(number)), *extents, batched))
        found = algebra.leaf(self._index[key])
        return found.T if turned else found

    def find(self, values: ValueNumbers, node: fx.Node, cut: Cut) -> Factor | None:
        """A tensor that is a leaf already."""
        extents, turned = _oriented(shape_of(node), cut)
        index = self._index.get((values.of(node), extents))
        return None if index is None else Factor(index, turned)

    def ones(self, rows: Dim) -> Polynomial:
        """The column of ones that repeats a row: the identity where there is one row."""
        if is_one(rows):
            return algebra.IDENTITY
        key = ("ones", rows)
        if key not in self._index:
            self._index[key] = len(self.matrices)
            self.matrices.append(Leaf(Ones(rows), 1, rows, 1, False))
        return algebra.leaf(self._index[key])

    def diagonal(self, values: ValueNumbers, vector: fx.Node) -> Polynomial:
        """The diagonal matrix of a vector."""
        number, size = values.of(vector), numel(shape_of(vector))
        key = ("diagonal", number)
        if key not in self._index:
            self._index[key] = len(self.matrices)
            self.matrices.append(
                Leaf(Held(values.first(number)), 1, size, size, False, diagonal=True)
            )
        return algebra.leaf(self._index[key], diagonal=True)

    def scalar(self, values: ValueNumbers, node: fx.Node, *, inverse: bool) -> Scalar:
        """A 0-d tensor or symbolic number, or its inverse, as a scalar leaf."""
        number = values.of(node)
        key = ("scalar", number, inverse)
        if key not in self._index:
            self._index[key] = len(self.scalars)
            self.scalars.append(ScalarLeaf(values.first(number), inverse))
        return Scalar(1.0, (self._index[key],))


def _oriented(shape: Shape, cut: Cut) -> tuple[tuple[Dim, Dim, Dim], bool]:
    """A tensor's extents as a matrix, and whether the cut shows the transpose of it.

    A row and a column of the same numbers are read off one tensor by different views. They are one
    leaf: the tensor as it stands, or its transpose.
    """
    batch, rows, cols = extents = cut.extents(shape)
    if len(shape) > 1 and is_one(batch) and (is_one(rows) or is_one(cols)):
        stands = (numel(shape[:-1]), shape[-1])
        if same_shape(stands, (cols, rows)) and not same_shape(stands, (rows, cols)):
            return (1, cols, rows), True
    return extents, False
