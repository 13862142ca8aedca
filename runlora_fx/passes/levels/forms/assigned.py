"""Products with experts' weights: picked rows, sums over each expert's rows, grouped products.

Example: ``bmm(x, index(w, [k]))`` is ``X W[k]``, and so is ``_grouped_mm(x, w, offs)`` for rows
that are sorted by expert. ``index_put(zeros, [k], P, accumulate=True)`` is ``sum_k(P)``.

Invariant: a token's row is a matrix of one row, so a batch of tokens is a batch of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.steps import GroupedOuter, GroupedProduct, Pick, Scatter, Step
from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.levels.cuts import Cut, same_matrix
from runlora_fx.passes.levels.forms.form import Cuts, Form, LinearNodes, Operand, Reading
from runlora_fx.passes.levels.forms.products import MatrixProduct
from runlora_fx.passes.levels.sizes import Shape

#: A batch of matrices, as three dimensions show it.
STACK = Cut(1, 2)

#: A row for each token, as two dimensions show it.
ROWS = Cut(1, 1)


@dataclass(frozen=True)
class AssignedForm(Form):
    """A form that depends on which expert each token has: one step of a plan.

    Attributes:
        by: The assignment of tokens to experts.
        out: The cut through which a node of this form shows its result.
    """

    by: TokenAssignment

    out: ClassVar[Cut] = STACK

    def as_addends(self, shape: Shape, cut: Cut, reading: Reading) -> Addends | None:
        """One addend, if the cut shows what is made."""
        return (self.step(reading)[1],) if same_matrix(shape, self.out, cut) else None

    def step(self, reading: Reading) -> tuple[Step, Polynomial]:
        """The step that a node of this form takes, and what it makes."""
        raise NotImplementedError


@dataclass(frozen=True)
class _OfRows(AssignedForm):
    """A form of one batch of matrices.

    Attributes:
        source: The batch.
    """

    source: fx.Node

    is_leaf_alone: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The batch."""
        return (self.source,)

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """A batch of matrices, if the source is linear and shown so."""
        is_linear = linear.cut_of(self.source) is not None
        return STACK if is_linear and linear.shows(self.source, STACK) else None

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if the source is shown as a batch of matrices."""
        return self.source is not source or linear.shows(source, STACK)

    def factors(self, cut: Cut, reading: Reading) -> list[tuple[Addends, ...]]:
        """The batch."""
        return [(reading.operand(self.source, STACK),)]


@dataclass(frozen=True)
class PickOfRows(_OfRows):
    """``source[k]``: for each token the matrix of its expert."""

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """A batch of matrices, if the source is linear, or a leaf of which products read picks."""
        if linear.cut_of(self.source) is None:
            return STACK if linear.is_only_multiplied(node) else None
        return super().cut(node, linear)

    def step(self, reading: Reading) -> tuple[Step, Polynomial]:
        """A pick."""
        k, whole = reading.assignment(self.by), total(reading.operand(self.source, STACK))
        return Pick(whole, k), reading.picked(whole, k)


@dataclass(frozen=True)
class SumOfRows(_OfRows):
    """``sum_k(source)``: for each expert the sum over its tokens.

    Attributes:
        zeros: The zeros that the rows are added to. They are absorbed.
    """

    zeros: fx.Node

    @property
    def absorbed(self) -> tuple[fx.Node, ...]:
        """The zeros: ``zeros_like(x)`` reads no element of ``x``, so it is no user of it."""
        return (self.zeros,)

    def step(self, reading: Reading) -> tuple[Step, Polynomial]:
        """A scatter."""
        k, part = reading.assignment(self.by), total(reading.operand(self.source, STACK))
        return Scatter(part, k), part.scattered(k)


@dataclass(frozen=True)
class OuterProduct(MatrixProduct):
    """A column times a row, elementwise. It is read only if it is only added up by expert."""

    is_leaf_alone: ClassVar[bool] = True

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """A batch of matrices, if it is only added up by expert."""
        return self.out if linear.is_only_added_by_expert(node) else None


@dataclass(frozen=True)
class _OfTwo(AssignedForm):
    """A form of two operands.

    Attributes:
        left: The first operand.
        right: The second operand.
        parts: Nodes that are absorbed: a call that computes this result with others, or a view of
            an operand.
    """

    left: Operand
    right: Operand
    parts: tuple[fx.Node, ...] = ()

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """The operands."""
        return (self.left.node, self.right.node)

    @property
    def absorbed(self) -> tuple[fx.Node, ...]:
        """Its parts."""
        return self.parts

    @property
    def multiplies(self) -> bool:
        """True: it is a product."""
        return True

    def factors(self, cut: Cut, reading: Reading) -> list[tuple[Addends, ...]]:
        """The operands."""
        return [(self.left.addends(reading), self.right.addends(reading))]

    def cut(self, node: fx.Node, linear: LinearNodes) -> Cut | None:
        """The cut through which it is computed."""
        return self.out

    def reads_as_computed(self, source: fx.Node, node: fx.Node, linear: Cuts) -> bool:
        """True if each operand shows its matrix as it was computed."""
        return all(f.reads_as_computed(source, linear) for f in (self.left, self.right))


@dataclass(frozen=True)
class ProductOfRows(_OfTwo):
    """``left @ right[k]``: each token's row times the matrix of its expert."""

    out: ClassVar[Cut] = ROWS

    @property
    def products(self) -> tuple[ProductOfRows, ...]:
        """Itself."""
        return (self,)

    def operands(self, reading: Reading) -> tuple[Addends, Addends]:
        """The rows, and the matrix of each."""
        k = reading.assignment(self.by)
        picked = tuple(reading.picked(p, k) for p in self.right.addends(reading))
        return self.left.addends(reading), picked

    def step(self, reading: Reading) -> tuple[Step, Polynomial]:
        """A grouped product."""
        k = reading.assignment(self.by)
        rows, stack = total(self.left.addends(reading)), total(self.right.addends(reading))
        made = reading.multiplied(rows, reading.picked(stack, k))
        return GroupedProduct(rows, stack, k, "right"), made


@dataclass(frozen=True)
class ProductOfBatch(ProductOfRows):
    """``left @ right[k]`` for any number of rows of each token."""

    out: ClassVar[Cut] = STACK


@dataclass(frozen=True)
class OuterProductOfRows(_OfTwo):
    """``sum_k(left' right)``: for each expert the sum over its tokens of a column times a row."""

    def step(self, reading: Reading) -> tuple[Step, Polynomial]:
        """A grouped outer product."""
        k = reading.assignment(self.by)
        left, right = total(self.left.addends(reading)), total(self.right.addends(reading))
        return GroupedOuter(left, right, k), reading.multiplied(left, right).scattered(k)
