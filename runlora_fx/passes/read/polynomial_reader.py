"""Polynomial reader: from the forms of nodes to polynomials of leaves.

Example: ``add(mm(x, w), mul(mm(h, b), 2))`` has the addends ``X W`` and ``2 H B``.

It is the base of the reader, which stops at roots, and of the verifier, which reads an emitted root
back down to the leaves of the expected polynomial. They differ in :meth:`PolynomialReader.operand`.

Invariant: the sum of the addends of a node is what the node computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import fx

from runlora_fx.passes.algebra.addends import Addends
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.forms import Form
from runlora_fx.passes.levels.geometry import Geometry, Patches
from runlora_fx.passes.levels.origins import Origin
from runlora_fx.passes.levels.sizes import example_of, same_shape, shape_of
from runlora_fx.passes.read.leaves import Leaves
from runlora_fx.passes.read.value_numbers import ValueNumbers


class Tables:
    """The value numbers, leaves and forms of one graph, which several readers share."""

    def __init__(self, values: ValueNumbers, leaves: Leaves, forms: dict[fx.Node, Form]) -> None:
        """Share the tables of one graph."""
        self.values = values
        self.leaves = leaves
        self.forms = forms

    def diagonal(self, vector: fx.Node) -> Polynomial:
        """The diagonal matrix of a vector: ``g - 1`` is ``diag(g) - I``."""
        form = self.forms.get(vector)
        found = None if form is None else form.diagonal(self)
        return self.leaves.diagonal(self.values, vector) if found is None else found

    def scalar(self, node: fx.Node, *, inverse: bool) -> Scalar:
        """A 0-d tensor or a symbolic number, whatever view shows it, or its inverse."""
        form = self.forms.get(node)
        while form is not None and form.same_elements_as is not None:
            node = form.same_elements_as
            form = self.forms.get(node)
        return self.leaves.scalar(self.values, node, inverse=inverse)

    def ones(self, rows: Dim) -> Polynomial:
        """The column of ones with a number of rows."""
        return self.leaves.ones(rows)

    def virtual(self, origin: Origin, rows: Dim, cols: Dim) -> Polynomial:
        """A matrix that no node holds, and that emission writes where a plan needs it."""
        return self.leaves.virtual(self.values, origin, rows, cols)

    def patches(self, origin: Patches, rows: Dim, cols: Dim) -> Polynomial:
        """The patches of images that a convolution multiplies, as rows of a matrix.

        Casts that are read through are left out, as they are for other leaves.
        """
        image = origin.image
        while (source := self._cast_of(image)) is not None:
            image = source
        return self.leaves.patches(self.values, Patches(image, origin.geometry), rows, cols)

    def _cast_of(self, node: fx.Node) -> fx.Node | None:
        """What a node casts, if the cast is read through; None if it is anything else."""
        form = self.forms.get(node)
        source = None if form is None else form.same_elements_as
        here, there = example_of(node), example_of(source)
        if source is None or here is None or there is None or here.dtype == there.dtype:
            return None
        return source if same_shape(shape_of(node), shape_of(source)) else None

    def kernel(self, p: Polynomial, geometry: Geometry) -> Polynomial:
        """A matrix as a kernel that multiplies patches of a geometry."""
        return self.leaves.kernel(p, geometry)

    def assignment(self, by: TokenAssignment) -> int:
        """The number of an assignment of tokens to experts."""
        return self.leaves.assignment(self.values, by)

    def picked(self, p: Polynomial, k: int) -> Polynomial:
        """``p[k]``: for each token the matrix of its expert."""
        return self.leaves.picked(p, k)

    def multiplied(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """``left @ right``, by ``sum_k(P) Q = sum_k(P Q[k])`` for scattered words."""
        return self.leaves.multiplied(left, right)


class PolynomialReader(Tables, ABC):
    """Reads nodes as sums of addends; :meth:`operand` decides where to stop."""

    @abstractmethod
    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        """Any tensor, seen through a cut, as an operand of its users."""

    def as_addends(self, node: fx.Node, cut: Cut) -> Addends | None:
        """What a node computes, seen through a cut; None if its form shows no such matrix."""
        form = self.forms.get(node)
        return None if form is None else form.as_addends(shape_of(node), cut, self)
