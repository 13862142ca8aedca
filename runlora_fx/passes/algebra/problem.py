"""Problems: the question that the search answers, as data; and the steps that answers consist of.

A *value* is a polynomial up to scalar and transpose, in one of two phases. In a joint graph the
forward phase holds what can be computed without incoming gradients. What the backward needs of it
is either *kept* or computed a second time. Inference graphs have one phase only.

Example: ``Y = X W' + 2 X A' B'`` is a demand, and two products and a sum that the graph takes.

Invariant: a problem has leaf numbers of its own, so that equal layers pose equal problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import sympy

from runlora_fx.passes.algebra.assignments import (
    Assignment,
    GroupedOuter,
    GroupedProduct,
    Pick,
    Picked,
    Scatter,
)
from runlora_fx.passes.algebra.polynomials import (
    Factor,
    Polynomial,
    Scalar,
    divided,
    normalise,
    polynomial,
    without_scalar,
)


@dataclass(frozen=True)
class LeafSpec:
    """What planning has to know of a leaf.

    Attributes:
        rows: Index of the row dimension in :attr:`Problem.dims`.
        cols: Index of the column dimension.
        batch: Index of the batch dimension, or None for a plain matrix.
        kind: ``"matrix"``; ``"ones"`` for the column of ones that broadcasts a bias over rows;
            ``"diagonal"`` for the diagonal matrix of a vector.
        backward: Whether it depends on an incoming gradient.
        held: Whether the backward can use it without more being saved for it.
        picked: What it is picked from, if no tensor holds it.
    """

    rows: int
    cols: int
    batch: int | None = None
    kind: Literal["matrix", "ones", "diagonal"] = "matrix"
    backward: bool = False
    held: bool = True
    picked: Picked | None = None


class Value(NamedTuple):
    """A normalised polynomial, in the phase it is needed in."""

    core: Polynomial
    backward: bool


@dataclass(frozen=True)
class Product:
    """``core = left @ right``, or the diagonal of that where the core is a diagonal part."""

    left: Polynomial
    right: Polynomial


@dataclass(frozen=True)
class Sum:
    """``core = sum(parts)``."""

    parts: tuple[Polynomial, ...]


@dataclass(frozen=True)
class Keep:
    """The backward uses what the forward computed: it is saved."""


Step: TypeAlias = Product | Sum | Keep | Pick | Scatter | GroupedProduct | GroupedOuter


def step_operands(step: Step) -> tuple[Polynomial, ...]:
    """What a step reads; of the same core, kept, nothing else."""
    match step:
        case Keep():
            return ()
        case Sum(parts):
            return parts
        case Pick(whole):
            return (whole,)
        case Scatter(part):
            return (part,)
        case Product(left, right) | GroupedProduct(left, right) | GroupedOuter(left, right):
            return (left, right)


def turned_step(step: Step) -> Step:
    """The step that makes the transpose."""
    match step:
        case Sum(parts):
            return Sum(tuple(p.T for p in parts))
        case Product(left, right):
            return Product(right.T, left.T)
        case Pick(whole, k):
            return Pick(whole.T, k)
        case Scatter(part, k):
            return Scatter(part.T, k)
        case GroupedProduct(left, right, k, picked):
            return GroupedProduct(right.T, left.T, k, "left" if picked == "right" else "right")
        case GroupedOuter(left, right, k):
            return GroupedOuter(right.T, left.T, k)
    return step


def rescaled_step(step: Step, made: Polynomial) -> Step:
    """The step, turned and divided such that it makes the normalised value.

    Args:
        step: A step that makes ``made``.
        made: A polynomial that is a value up to a number and a transpose.
    """
    scalar, transposed, _ = normalise(made)
    match turned_step(step) if transposed else step:
        case Sum(parts):
            return Sum(tuple(divided(p, scalar) for p in parts))
        case Pick(whole, k):
            return Pick(divided(whole, scalar), k)
        case Scatter(part, k):
            return Scatter(divided(part, scalar), k)
        case Product(left, right):
            return Product(*_rescaled(left, right, scalar))
        case GroupedProduct(left, right, k, picked):
            return GroupedProduct(*_rescaled(left, right, scalar), k, picked)
        case GroupedOuter(left, right, k):
            return GroupedOuter(*_rescaled(left, right, scalar), k)
    return step


def _rescaled(left: Polynomial, right: Polynomial, over: Scalar) -> tuple[Polynomial, Polynomial]:
    """The operands of ``left @ right`` over a scalar, all that is left of scalars in the second."""
    by, left = without_scalar(left)
    right = right.scaled(Scalar(by.number / over.number, by.leaves))
    return left, divided(right, Scalar(1.0, over.leaves))


def product_step(left: Polynomial, right: Polynomial, *, diag_part: bool = False) -> Product:
    """The product, or its diagonal, as a step that makes its normalised value."""
    if not diag_part and normalise(left @ right).transposed:
        left, right = right.T, left.T
    (_, left), (_, right) = without_scalar(left), without_scalar(right)
    made = left @ right
    again = normalise(made.diag_part if diag_part else made).scalar.number
    return Product(left, right.scaled(Scalar(1.0 / again)))


def sum_step(parts: Sequence[Polynomial]) -> Sum:
    """The sum as a step that makes its normalised value."""
    total = polynomial(term for p in parts for term in p)
    scalar, transposed, _ = normalise(total)
    turned = (p.T if transposed else p for p in parts)
    return Sum(tuple(divided(p, scalar) for p in turned))


@dataclass(frozen=True)
class Problem:
    """Values that are to be computed together, and how the incoming graph computes them.

    Attributes:
        leaves: By leaf index. Scalar leaves are numbered apart and have no spec.
        dims: Sizes at the hints [elements].
        demands: The values that must exist in the end, in graph order.
        incoming: Every step of the incoming graph, in graph order; always among the candidates.
        kept: Cores that the incoming graph saves for its backward, and sums that could be saved in
            the stead of their addends: keeping them costs nothing new.
        itemsize: Element width [B].
        dtype: Of the elements, as torch names it.
        lasting: Leaves that are the same tensors in every call. What is made of them alone is kept
            from call to call, and costs nothing in most. Empty where nothing is to be kept.
        assignments: By number, the assignments of tokens to experts that leaves are picked by.
        shown: The demands' cores, each with whether the graph shows it transposed in memory.
    """

    leaves: tuple[LeafSpec, ...]
    dims: tuple[int, ...]
    demands: tuple[Value, ...]
    incoming: tuple[tuple[Value, Step], ...]
    kept: frozenset[Polynomial]
    itemsize: int
    dtype: str = "float32"
    lasting: frozenset[int] = frozenset()
    assignments: tuple[Assignment, ...] = ()
    shown: tuple[tuple[Polynomial, bool], ...] = ()

    @cached_property
    def shown_transposed(self) -> Mapping[Polynomial, bool]:
        """By the core of a demand, whether the graph shows it transposed in memory."""
        return dict(self.shown)

    def extent(self, factor: Factor) -> tuple[int, int]:
        """The dimensions of a factor: indices of its rows and columns."""
        spec = self.leaves[factor.leaf]
        return (spec.cols, spec.rows) if factor.transposed else (spec.rows, spec.cols)

    def shape(self, p: Polynomial) -> tuple[int | None, int, int]:
        """The dimensions of a polynomial: indices of batch, rows and columns."""
        factors = p.shown
        scattered = next((w.scattered for w in p.words if w.factors), ())
        batch = self.leaves[factors[0].leaf].batch
        if scattered:
            batch = self.assignments[scattered[0]].experts
        return batch, self.extent(factors[0])[0], self.extent(factors[-1])[1]


Dims: TypeAlias = tuple[int, ...] | tuple[sympy.Expr, ...]


def is_broadcast(leaves: Sequence[LeafSpec], left: Polynomial, right: Polynomial) -> bool:
    """Whether ``left @ right`` only repeats a row (ones @ row) or a column (column @ ones')."""
    row, column = left.leaf, right.leaf
    return (row is not None and not row.transposed and leaves[row.leaf].kind == "ones") or (
        column is not None and column.transposed and leaves[column.leaf].kind == "ones"
    )
