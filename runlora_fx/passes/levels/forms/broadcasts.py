"""Broadcasts: a row or column that is repeated over a matrix, and sums over rows or columns.

Example: in ``x @ w' + b`` the bias is ``1 b'``, the column of ones times a row.

Invariant: the number of rows is part of the column of ones, so ``1 b'`` has a shape of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, transposed
from runlora_fx.passes.levels.cuts import Cut, last_dim_cut, repetition
from runlora_fx.passes.levels.forms.form import Cuts, Form, LinearNodes, Reading
from runlora_fx.passes.levels.origins import Origin
from runlora_fx.passes.levels.sizes import Shape, same_shape, shape_of


@dataclass(frozen=True)
class Broadcast(Form):
    """The source, repeated to the node's shape; the source itself where the shapes are equal."""

    source: fx.Node

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """What is repeated."""
        return (self.source,)

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """That of the source, where nothing is repeated."""
        is_same = same_shape(shape_of(self.source), shape_of(node))
        return linear.cut_of(self.source) if is_same else None

    def fits(self, shape: Shape, cut: Cut) -> bool:
        """True if it fills a matrix as it is, or as a row that is repeated."""
        lies = repetition(shape_of(self.source), shape, cut)
        return same_shape(shape_of(self.source), shape) or (lies is not None and lies.rows)

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if the source is seen as it was computed: whole, as a row or as a column."""
        cut = linear.cut_of(node)
        if self.source is not source or cut is None:
            return self.source is not source
        lies = repetition(shape_of(source), shape_of(node), cut)
        return linear.shows(source, cut if lies is None else lies.cut)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The column of ones times a row, or a column times the row of ones."""
        if same_shape(shape_of(self.source), shape):
            return reading.operand(self.source, cut)
        lies = repetition(shape_of(self.source), shape, cut)
        if lies is None:
            return None
        _, rows, cols = cut.extents(shape)
        ones = reading.ones(rows if lies.rows else cols)
        below = reading.operand(self.source, lies.cut)
        return tuple(ones @ p if lies.rows else p @ ones.T for p in below)


@dataclass(frozen=True)
class RepeatedRow(Form):
    """A row that no node holds, repeated for every row of the matrix: the bias of a module.

    Attributes:
        origin: The origin of the row, a vector.
        size: The number of its entries.
    """

    origin: Origin
    size: int

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where the row comes from."""
        return (self.origin,)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The column of ones times the row."""
        batch, rows, cols = cut.extents(shape)
        if not same_shape((batch, cols), (1, self.size)):
            return None
        return (reading.ones(rows) @ reading.virtual(self.origin, 1, self.size),)


@dataclass(frozen=True)
class Total(Form):
    """The sum of the source's rows as one row, ``1' M``, or of its columns, ``M 1``.

    Attributes:
        source: Seen as a matrix by its last dimension.
        rows: True if its rows are added up; else its columns.
    """

    source: fx.Node
    rows: bool

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """What is added up."""
        return (self.source,)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The same vector, whether the cut shows it as a row or as a column."""
        source = shape_of(self.source)
        seen = last_dim_cut(len(source))
        _, rows, cols = seen.extents(source)
        below = reading.operand(self.source, seen)
        size, ones = (cols, reading.ones(rows)) if self.rows else (rows, reading.ones(cols))
        totals = tuple(ones.T @ p if self.rows else p @ ones for p in below)
        row, column = (1, 1, size), (1, size, 1)
        shown = cut.extents(shape)
        if same_shape(shown, row if self.rows else column):
            return totals
        return transposed(totals) if same_shape(shown, column if self.rows else row) else None
