"""Multiples: a tensor times a number, or with its rows or columns times the entries of a vector.

Example: ``y * g[None, :]`` is ``Y diag(g)``, and ``(g - 1)`` is the vector of ``diag(g) - I``.

Invariant: a scalar is one number; a vector scales rows or columns, never single elements.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, scaled
from runlora_fx.passes.algebra.polynomials import IDENTITY, Polynomial, Scalar
from runlora_fx.passes.levels.cuts import Cut, last_dim_cut
from runlora_fx.passes.levels.forms.form import Cuts, Diagonals, Form, LinearNodes, Reading
from runlora_fx.passes.levels.sizes import Shape, numel, same_shape, shape_of


@dataclass(frozen=True)
class ScalarMultiple(Form):
    """``source * number`` or, with a node, ``source * (0-d tensor or symbolic number)``.

    Attributes:
        source: What is scaled.
        by: What it is scaled by.
        divides: True if it is divided by it instead.
    """

    source: fx.Node
    by: float | fx.Node
    divides: bool = False

    carries_source: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The tensor, and the scalar if a node holds it."""
        return (self.source, *self.scalars)

    @property
    def scalars(self) -> tuple[fx.Node, ...]:
        """The scalar, if a node holds it."""
        return (self.by,) if isinstance(self.by, fx.Node) else ()

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut of the source."""
        return linear.cut_of(self.source)

    def is_vector(self, vectors: Collection[fx.Node]) -> bool:
        """True if the source is one."""
        return self.source in vectors

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True unless the source is the scalar."""
        return self.source is source and self.by is not source

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The source's addends, scaled."""
        by = (
            reading.scalar(self.by, inverse=self.divides)
            if isinstance(self.by, fx.Node)
            else Scalar(self.by)
        )
        return scaled(reading.operand(self.source, cut), by)

    def diagonal(self, vectors: Diagonals) -> Polynomial | None:
        """A number times the source's diagonal matrix."""
        if isinstance(self.by, fx.Node):
            return None
        return vectors.diagonal(self.source).scaled(Scalar(self.by))


@dataclass(frozen=True)
class DiagonalMultiple(Form):
    """``source * vector``: every column scaled by an entry of the vector, or every row.

    Attributes:
        source: A tensor of the result's shape.
        by: The vector, with the other dimensions of the result's missing or 1.
        rows: True if rows are scaled: the vector has the result's dimensions but the last.
    """

    source: fx.Node
    by: fx.Node
    rows: bool

    is_product: ClassVar[bool] = True
    is_leaf_alone: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The tensor and the vector."""
        return (self.source, self.by)

    @property
    def scaling_vector(self) -> fx.Node | None:
        """The vector."""
        return self.by

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut of the source, if the vector scales its rows or columns and is to be read."""
        shape = shape_of(node)
        cut = linear.cut_of(self.source) or last_dim_cut(len(shape))
        if not _runs_along(shape, cut):
            return None
        return cut if linear.may_scale(node, self.source, self.by, rows=self.rows) else None

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if the source is the matrix, seen as it was computed, and not the vector."""
        cut = linear.cut_of(node)
        is_matrix = self.source is source and self.by is not source
        return is_matrix and cut is not None and linear.shows(source, cut)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The product with the diagonal matrix."""
        if not _runs_along(shape, cut):
            return None
        diagonal = reading.diagonal(self.by)
        below = reading.operand(self.source, cut)
        return tuple(diagonal @ p if self.rows else p @ diagonal for p in below)

    def factors(self, cut: Cut, reading: Reading) -> list[tuple[Addends, ...]]:
        """The matrix and the diagonal matrix."""
        source, diagonal = reading.operand(self.source, cut), (reading.diagonal(self.by),)
        return [(diagonal, source) if self.rows else (source, diagonal)]


@dataclass(frozen=True)
class Shift(Form):
    """``source + number``: read where the source is a vector that scales a matrix."""

    source: fx.Node
    by: float

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The tensor."""
        return (self.source,)

    def diagonal(self, vectors: Diagonals) -> Polynomial | None:
        """``diag(g) + c I`` for ``g + c``."""
        diagonal = vectors.diagonal(self.source)
        return diagonal + IDENTITY.scaled(Scalar(self.by)) if self.by else diagonal


def _runs_along(shape: Shape, cut: Cut) -> bool:
    """True if a cut shows the last dimension as columns: a vector scales those, or all rows."""
    return same_shape(cut.extents(shape), (1, numel(shape[:-1]), shape[-1]))
