"""Form: the base of all forms, and the protocols by which a form learns about other nodes.

Example: ``Permute(x, (1, 0)).as_addends((3, 5), Cut(0, 1), reading)`` is the transpose of
``reading.operand(x, Cut(0, 1))``.

Invariant: :meth:`Form.as_addends` is exactly what the node computes, seen through the cut, or None.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeAlias

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, transposed
from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.algebra.posed import Dim
from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.levels.geometry import Geometry, Patches
from runlora_fx.passes.levels.origins import Origin
from runlora_fx.passes.levels.sizes import Shape


class Cuts(Protocol):
    """The cuts of linear nodes."""

    def cut_of(self, node: fx.Node) -> Cut | None:
        """The cut through which a linear node shows its matrix; None if it is not linear."""

    def shows(self, node: fx.Node, cut: Cut) -> bool:
        """True if a cut shows the matrix that a linear node is computed as."""


class LinearNodes(Cuts, Protocol):
    """The linear nodes of a graph, from which a form finds its own cut."""

    def is_only_added(self, node: fx.Node) -> bool:
        """True if every user adds the node to something, so no user relies on its layout."""

    def is_only_added_by_expert(self, node: fx.Node) -> bool:
        """True if every user, behind views, adds the node up by expert."""

    def is_only_multiplied(self, node: fx.Node) -> bool:
        """True if every user, behind views, multiplies the node as a batch of matrices."""

    def is_made_of_product(self, node: fx.Node) -> bool:
        """True if the node is a product, or a sum, multiple, view or cast of one."""

    def may_scale(self, node: fx.Node, source: fx.Node, vector: fx.Node, *, rows: bool) -> bool:
        """True if ``node = source * vector`` is to be read as a product with a diagonal matrix."""


class Diagonals(Protocol):
    """The vectors of a graph as matrices."""

    def diagonal(self, vector: fx.Node) -> Polynomial:
        """The diagonal matrix of a vector."""


class Reading(Diagonals, Protocol):
    """The polynomials of other nodes, from which a form makes its own."""

    def operand(self, node: fx.Node, cut: Cut) -> Addends:
        """A node, seen through a cut."""

    def scalar(self, node: fx.Node, *, inverse: bool) -> Scalar:
        """A 0-d tensor or a symbolic number, or its inverse."""

    def ones(self, rows: Dim) -> Polynomial:
        """The column of ones with a number of rows."""

    def virtual(self, origin: Origin, rows: Dim, cols: Dim) -> Polynomial:
        """A matrix that no node holds, and that emission writes where a plan needs it."""

    def patches(self, origin: Patches, rows: Dim, cols: Dim) -> Polynomial:
        """The patches of images that a convolution multiplies, as rows of a matrix."""

    def kernel(self, p: Polynomial, geometry: Geometry) -> Polynomial:
        """A matrix as a kernel that multiplies patches of a geometry.

        Raises:
            NotInNormalForm: If a last factor is no matrix that a node holds.
        """

    def assignment(self, by: TokenAssignment) -> int:
        """The number of an assignment of tokens to experts."""

    def picked(self, p: Polynomial, k: int) -> Polynomial:
        """``p[k]``: for each token the matrix of its expert.

        Raises:
            NotInNormalForm: If the pick cannot be moved to the leaves.
        """

    def multiplied(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """``left @ right``, by ``sum_k(P) Q = sum_k(P Q[k])`` for scattered words.

        Raises:
            NotInNormalForm: If the product is no polynomial.
        """


class Factors(Protocol):
    """Two matrices that are multiplied."""

    @property
    def left(self) -> Factor:
        """The first factor."""

    @property
    def right(self) -> Factor:
        """The second factor."""

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The nodes that the factors are."""

    def operands(self, reading: Reading) -> tuple[Addends, Addends]:
        """Both factors, as the graph adds them up."""


class Form:
    """What a node computes from other nodes.

    Attributes:
        is_product: True if a node of this form is exactly one product of matrices.
        makes_vector: True if it makes the diagonal of a product, which is no matrix.
        adds: True if it adds up terms, so that its polynomial may grow.
        is_view: True if it shows the elements of its only source in another shape or order.
        carries_source: True if the source need not be saved when the result is.
        is_leaf_alone: True if a node of this form is a leaf unless it is linear. Otherwise a tensor
            that exists anyway would be computed again.
    """

    is_product: ClassVar[bool] = False
    makes_vector: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    is_view: ClassVar[bool] = False
    carries_source: ClassVar[bool] = False
    is_leaf_alone: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The nodes that it reads, in order."""
        return ()

    @property
    def scalars(self) -> tuple[fx.Node, ...]:
        """The sources that are one number, of whatever dtype."""
        return ()

    @property
    def absorbed(self) -> tuple[fx.Node, ...]:
        """The nodes that are read as a part of this one. They have no form of their own."""
        return ()

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The origins of the virtual leaves that it reads."""
        return ()

    @property
    def products(self) -> tuple[Factors, ...]:
        """The matrix products in it."""
        return ()

    @property
    def multiplies(self) -> bool:
        """True if its polynomial has more words than those of its sources together."""
        return bool(self.products)

    @property
    def scaling_vector(self) -> fx.Node | None:
        """The vector that scales the rows or columns of its first source; None if none does."""
        return None

    @property
    def same_elements_as(self) -> fx.Node | None:
        """The node that has the same elements in the same order; None if there is none."""
        return None

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut through which a node of this form shows a matrix; None if it is not linear."""
        return None

    def is_vector(self, vectors: Collection[fx.Node]) -> bool:
        """True if it makes a vector that is no matrix: the diagonal of a product, or of a sum.

        Args:
            vectors: The nodes before it that are such vectors.
        """
        return False

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if a node of this form reads a source through the cut it was computed with."""
        return True

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """What a node of this form computes, as addends.

        Args:
            shape: The shape of the node.
            cut: How the node is seen.
            reading: The polynomials of its sources.

        Returns:
            None if the cut shows no matrix that the form knows.
        """
        return None

    def factors(self, cut: Cut, reading: Reading) -> list[tuple[Addends, ...]]:
        """The operands of every product that a node of this form computes.

        Args:
            cut: The cut through which the node shows its matrix.
            reading: The polynomials of its sources.
        """
        return [product.operands(reading) for product in self.products]

    def diagonal(self, vectors: Diagonals) -> Polynomial | None:
        """The diagonal matrix of the vector that it makes; None if that vector is a leaf."""
        return None

    def is_readable_at(self, node: fx.Node) -> bool:
        """False if the node does more than the form says, such as changing the layout."""
        return True

    def led_by(self, nodes: Collection[fx.Node]) -> Form:
        """The same form, with one of some nodes as first operand if the order does not matter."""
        return self


@dataclass(frozen=True)
class Operand:
    """A node as a matrix, maybe transposed."""

    node: fx.Node
    cut: Cut
    transposed: bool = False

    @property
    def T(self) -> Operand:
        """The transposed operand."""
        return replace(self, transposed=not self.transposed)

    def reads_as_computed(self, source: fx.Node, linear: Cuts) -> bool:
        """True unless it is the source, seen through another cut than it was computed with."""
        return self.node is not source or linear.shows(source, self.cut)

    def addends(self, reading: Reading) -> Addends:
        """The operand as addends."""
        found = reading.operand(self.node, self.cut)
        return transposed(found) if self.transposed else found


@dataclass(frozen=True)
class VirtualOperand:
    """A matrix that no node holds, maybe transposed.

    Attributes:
        origin: The origin of the matrix.
        rows: Its rows, untransposed.
        cols: Its columns.
        transposed: True if the operand is the transpose.
    """

    origin: Origin
    rows: Dim
    cols: Dim
    transposed: bool = False

    node: ClassVar[None] = None

    @property
    def T(self) -> VirtualOperand:
        """The transposed operand."""
        return replace(self, transposed=not self.transposed)

    def reads_as_computed(self, source: fx.Node, linear: Cuts) -> bool:
        """True: it is no node."""
        return True

    def addends(self, reading: Reading) -> Addends:
        """The leaf."""
        leaf = reading.virtual(self.origin, self.rows, self.cols)
        return (leaf.T if self.transposed else leaf,)


#: What is multiplied.
Factor: TypeAlias = Operand | VirtualOperand
