"""Views, copies and casts: the elements of one tensor, moved or converted.

Example: ``permute(view(x, [6, 8]), [1, 0])`` shows the transpose of the matrix ``(6, 8)`` in ``x``.

Invariant: a view moves cuts and changes no element.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, transposed
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.levels.cuts import Cut, inverse, permuted_cut, recut
from runlora_fx.passes.levels.forms.form import Diagonals, Form, LinearNodes, Reading
from runlora_fx.passes.levels.sizes import Shape, same_strides, shape_of


@dataclass(frozen=True)
class _OfOne(Form):
    """A form of one tensor.

    Attributes:
        source: The tensor.
    """

    source: fx.Node

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The tensor."""
        return (self.source,)


@dataclass(frozen=True)
class Reshape(_OfOne):
    """The same elements in the same order, or simply the same tensor."""

    is_view: ClassVar[bool] = True
    carries_source: ClassVar[bool] = True

    @property
    def same_elements_as(self) -> fx.Node | None:
        """The source."""
        return self.source

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut of the source, moved."""
        cut = linear.cut_of(self.source)
        return None if cut is None else recut(shape_of(self.source), cut, shape_of(node))

    def is_vector(self, vectors: Collection[fx.Node]) -> bool:
        """True if the source is one."""
        return self.source in vectors

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The source, through the cut that shows the same matrix."""
        moved = recut(shape, cut, shape_of(self.source))
        return None if moved is None else reading.operand(self.source, moved)

    def diagonal(self, vectors: Diagonals) -> Polynomial | None:
        """The source's."""
        return vectors.diagonal(self.source)


@dataclass(frozen=True)
class Permute(_OfOne):
    """Dimensions in another order."""

    dims: tuple[int, ...]

    is_view: ClassVar[bool] = True
    carries_source: ClassVar[bool] = True

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The source's, moved."""
        cut = linear.cut_of(self.source)
        seen = None if cut is None else permuted_cut(shape_of(self.source), cut, self.dims)
        return None if seen is None else seen[0]

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The source or its transpose."""
        seen = permuted_cut(shape, cut, inverse(self.dims))
        if seen is None:
            return None
        below = reading.operand(self.source, seen[0])
        return transposed(below) if seen[1] else below


@dataclass(frozen=True)
class Copy(_OfOne):
    """The same values in new memory: dropout in evaluation, ``clone``, ``contiguous``.

    An operand is read through it. The copy itself is no linear node, because a user may rely on its
    layout, unless all users add it to something.
    """

    carries_source: ClassVar[bool] = True

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The source's, if the copy is only added to something."""
        return linear.cut_of(self.source) if linear.is_only_added(node) else None

    def is_readable_at(self, node: fx.Node) -> bool:
        """True if the copy has its source's strides. Users may rely on a change of strides."""
        return same_strides(node, self.source)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The source."""
        return reading.operand(self.source, cut)


@dataclass(frozen=True)
class Cast(_OfOne):
    """The source in another dtype. The reader replaces it where it changes nothing."""
