"""Problems: the values to compute and the steps of the incoming graph, as data for the search.

A *value* is a polynomial up to a scalar and a transpose, in one of two phases. In a joint graph the
forward phase has the values that can be computed without incoming gradients. If the backward needs
one of them, it is saved (:class:`Keep`) or computed a second time. Inference graphs have one phase.

Example: ``Y = X W' + 2 X A' B'`` has the demand ``Y``, and as incoming steps three products and a
sum.

Invariant: a problem has leaf numbers of its own, so that equal layers pose equal problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import sympy

from runlora_fx.passes.algebra.assignments import Assignment, Picked
from runlora_fx.passes.algebra.polynomials import Polynomial, normalise
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.algebra.words import Factor


@dataclass(frozen=True)
class LeafSpec:
    """The facts of a leaf that planning needs.

    Attributes:
        rows: Index of the row dimension in :attr:`Problem.dims`.
        cols: Index of the column dimension.
        batch: Index of the batch dimension, or None for a plain matrix.
        kind: ``"matrix"``; ``"ones"`` for the column of ones that broadcasts a bias over rows;
            ``"diagonal"`` for the diagonal matrix of a vector.
        backward: True if it depends on an incoming gradient.
        held: True if the backward can use it without saving more.
        picked: Its base and assignment, if it is a picked leaf.
        packed: Bits per element of a weight that is stored packed; 0 for any other leaf. One
            operator multiplies by its transpose without unpacking it. Any other step needs a step
            that unpacks it.
        images: True if its rows are the positions of images.
        taps: For patches of images, and for kernels that multiply them: the elements of a patch, or
            kernel, of one channel; 0 for any other leaf.
    """

    rows: int
    cols: int
    batch: int | None = None
    kind: Literal["matrix", "ones", "diagonal"] = "matrix"
    backward: bool = False
    held: bool = True
    picked: Picked | None = None
    packed: int = 0
    images: bool = False
    taps: int = 0


class Value(NamedTuple):
    """A normalised polynomial, in the phase that computes it."""

    core: Polynomial
    backward: bool


@dataclass(frozen=True)
class Problem:
    """Values that are computed together, and how the incoming graph computes them.

    Attributes:
        leaves: By number, the facts of a leaf. Scalar leaves have numbers of their own and no
            facts.
        dims: The sizes of the dimensions in the example tensors [elements].
        demands: The values that every plan must compute, in graph order.
        incoming: Every step of the incoming graph, in graph order. Plans may take all of them.
        kept: Values that the backward may use without more memory: those that the incoming graph
            saves, and sums that can be saved instead of their addends.
        itemsize: Element width [B].
        dtype: The dtype of the elements, as torch names it.
        lasting: Leaves that are the same tensors in every call. Weights that are merged from them
            may be kept between calls. Empty if nothing is to be kept.
        assignments: By number, the assignments of tokens to experts.
        shown: The polynomials of the demands, each with True if it is stored transposed.
        scaled: What the incoming graph multiplies by a number, where a plan scales a small matrix:
            leaves that products read, and products that are added to others. Each with True if it
            is one more tensor in memory.
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
    scaled: tuple[tuple[Polynomial, bool], ...] = ()

    def __hash__(self) -> int:
        # Stored by hand, as for polynomials: each layer looks its problem up several times.
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash((self.leaves, self.dims, self.incoming))
        return known

    @cached_property
    def shown_transposed(self) -> Mapping[Polynomial, bool]:
        """By polynomial of a demand, True if it is stored transposed."""
        return dict(self.shown)

    @cached_property
    def has_products_of_products(self) -> bool:
        """True if some word has three factors or more: what LoRA adds to a layer has."""
        demands = (demand.core for demand in self.demands if not demand.core.is_diag_part)
        return any(len(word.without_diagonals) >= 3 for core in demands for word in core.words)

    def value(self, p: Polynomial, backward: bool) -> Value:
        """The value of an operand of a step that runs in a phase."""
        core = normalise(p).core
        return Value(core, backward or any(self.leaves[i].backward for i in core.leaves))

    def extent(self, factor: Factor) -> tuple[int, int]:
        """The dimensions of a factor: indices of its rows and columns."""
        spec = self.leaves[factor.leaf]
        return (spec.cols, spec.rows) if factor.transposed else (spec.rows, spec.cols)

    def shape(self, p: Polynomial) -> tuple[int | None, int, int]:
        """The dimensions of a polynomial: indices of batch, rows and columns."""
        factors = p.shown
        batch = self.leaves[factors[0].leaf].batch
        if self.assignments:
            scattered = next((w.scattered for w in p.words if w.factors), ())
            if scattered:
                batch = self.assignments[scattered[0]].experts
        return batch, self.extent(factors[0])[0], self.extent(factors[-1])[1]


Dims: TypeAlias = tuple[int, ...] | tuple[sympy.Expr, ...]


def is_broadcast(leaves: Sequence[LeafSpec], left: Polynomial, right: Polynomial) -> bool:
    """True if ``left @ right`` only repeats a row (ones @ row) or a column (column @ ones')."""
    row, column = left.leaf, right.leaf
    return (row is not None and not row.transposed and leaves[row.leaf].kind == "ones") or (
        column is not None and column.transposed and leaves[column.leaf].kind == "ones"
    )
