"""Products of matrices, diagonals of products, and the identity matrix.

Example: ``mm(x, permute(w))`` is ``MatrixProduct(x, w')``, and both ``einsum("ij,ij->i", dY, P)``
and ``sum(mul(dY, P), [1])`` are the diagonal of ``dY P'``.

Invariant: a product is one addend, however many words its operands have.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.polynomials import IDENTITY
from runlora_fx.passes.levels.cuts import Cut, last_dim_cut, same_matrix, turned_vector
from runlora_fx.passes.levels.forms.form import (
    Cuts,
    Factor,
    Form,
    LinearNodes,
    Operand,
    Reading,
    VirtualOperand,
)
from runlora_fx.passes.levels.origins import Origin
from runlora_fx.passes.levels.sizes import Shape, same_shape


@dataclass(frozen=True)
class _OfTwo(Form):
    """A form of two matrices that are multiplied.

    Attributes:
        left: The first factor.
        right: The second factor.
        out: The cut through which the node shows the result.
    """

    left: Factor
    right: Factor
    out: Cut

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The factors that nodes hold."""
        nodes = (self.left.node, self.right.node)
        return tuple(node for node in nodes if node is not None)

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The origins of the factors that no node holds."""
        return tuple(f.origin for f in (self.left, self.right) if isinstance(f, VirtualOperand))

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut through which it is computed."""
        return self.out

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if each factor that is the source shows it as it was computed."""
        left, right = self.left, self.right
        return left.reads_as_computed(source, linear) and right.reads_as_computed(source, linear)

    def operands(self, reading: Reading) -> tuple[Addends, Addends]:
        """Both factors, as the graph adds them up."""
        return self.left.addends(reading), self.right.addends(reading)

    def factors(self, cut: Cut, reading: Reading) -> list[tuple[Addends, ...]]:
        """Its own factors."""
        return [self.operands(reading)]


@dataclass(frozen=True)
class MatrixProduct(_OfTwo):
    """``left @ right``, seen through ``out`` in the node's own shape."""

    is_product: ClassVar[bool] = True

    @property
    def products(self) -> tuple[MatrixProduct, ...]:
        """Itself."""
        return (self,)

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """One addend, if the cut shows the product, or a row of numbers as a column."""
        is_turned = turned_vector(shape, self.out, cut)
        if not is_turned and not same_matrix(shape, self.out, cut):
            return None
        left, right = self.operands(reading)
        made = reading.multiplied(total(left), total(right))
        return (made.T if is_turned else made,)


@dataclass(frozen=True)
class RepeatedProduct(MatrixProduct):
    """A batch of matrices times one matrix that is repeated over the batch: a plain product.

    Attributes:
        repeats: The nodes that repeat the matrix, which only the product reads.
    """

    repeats: tuple[fx.Node, ...]

    @property
    def absorbed(self) -> tuple[fx.Node, ...]:
        """The nodes that repeat the matrix."""
        return self.repeats


@dataclass(frozen=True)
class DiagonalOfProduct(_OfTwo):
    """The diagonal of ``left @ right``, as a vector: dot products of rows and columns."""

    makes_vector: ClassVar[bool] = True

    @property
    def multiplies(self) -> bool:
        """True: it is a product."""
        return True

    def led_by(self, nodes: Collection[fx.Node]) -> Form:
        """The diagonal of ``right' @ left'``, if only ``right`` is one of the nodes."""
        if self.left.node in nodes or self.right.node not in nodes:
            return self
        return replace(self, left=self.right.T, right=self.left.T)

    def is_vector(self, vectors: Collection[fx.Node]) -> bool:
        """True: it is a vector."""
        return True

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The diagonal part, which is the same as a row and as a column."""
        left, right = self.operands(reading)
        return ((total(left) @ total(right)).diag_part,)


def aligned_factors(
    a: fx.Node, b: fx.Node, rank: int, *, rows: bool
) -> tuple[Operand, Operand, Cut]:
    """The fields of the diagonal that holds the dot products of rows, or of columns.

    Args:
        a: A tensor, seen as a matrix by its last dimension.
        b: Another of its shape.
        rank: Their number of dimensions.
        rows: True if rows are multiplied; else columns.
    """
    cut = last_dim_cut(rank)
    left, right = Operand(a, cut, transposed=not rows), Operand(b, cut, transposed=rows)
    return left, right, Cut(0, rank - 1) if rows else Cut(0, 0)


@dataclass(frozen=True)
class SumOfProducts(DiagonalOfProduct):
    """``sum(a * b)`` along rows or columns: the same diagonal, computed by two nodes.

    It is read only if a factor contains a product. Otherwise it stays elementwise arithmetic, as in
    the backward of a norm.

    Attributes:
        multiplication: The node ``a * b``, which only the sum reads.
    """

    multiplication: fx.Node

    is_leaf_alone: ClassVar[bool] = True

    @property
    def absorbed(self) -> tuple[fx.Node, ...]:
        """The multiplication."""
        return (self.multiplication,)

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut through which it is computed, if a factor contains a product."""
        return self.out if any(map(linear.is_made_of_product, self.sources)) else None


@dataclass(frozen=True)
class Identity(Form):
    """The identity matrix."""

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """The empty word; None if the cut shows no square matrix."""
        return (IDENTITY,) if same_shape(cut.extents(shape), (1, *shape)) else None
