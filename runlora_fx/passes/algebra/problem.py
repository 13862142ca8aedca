"""Problems: the question that the search answers, as data.

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

from runlora_fx.passes.algebra.assignments import Assignment, Picked
from runlora_fx.passes.algebra.polynomials import Polynomial, normalise
from runlora_fx.passes.algebra.steps import Step
from runlora_fx.passes.algebra.words import Factor


@dataclass(frozen=True)
class LeafSpec:
    """What planning has to know of a leaf.

    Attributes:
        rows: Index of the row dimension in :attr:`Problem.dims`.
        cols: Index of the column dimension.
        batch: Index of the batch dimension, or None for a plain matrix.
        kind: ``"matrix"``; ``"ones"`` for the column of ones that broadcasts a bias over rows;
            ``"diagonal"`` for the diagonal matrix of a vector.
        backward: True if it depends on an incoming gradient.
        held: True if the backward can use it without more being saved for it.
        picked: What it is picked from, if no tensor holds it.
        packed: Bits of an element where the weight is stored packed: a *virtual* leaf M. One
            operator multiplies by M' and makes no M; whatever else reads M needs a step that
            unpacks it. 0 for every other leaf.
    """

    rows: int
    cols: int
    batch: int | None = None
    kind: Literal["matrix", "ones", "diagonal"] = "matrix"
    backward: bool = False
    held: bool = True
    picked: Picked | None = None
    packed: int = 0


class Value(NamedTuple):
    """A normalised polynomial, in the phase it is needed in."""

    core: Polynomial
    backward: bool


@dataclass(frozen=True)
class Problem:
    """Values that are to be computed together, and how the incoming graph computes them.

    Attributes:
        leaves: By leaf index. Scalar leaves are numbered apart and have no spec.
        dims: Sizes at the hints [elements].
        demands: The values that must exist in the end, in graph order.
        incoming: Every step of the incoming graph, in graph order; always among the candidates.
        kept: Values that the backward may use without more memory: those that the incoming graph
            saves, and sums that can be saved instead of their addends.
        itemsize: Element width [B].
        dtype: Of the elements, as torch names it.
        lasting: Leaves that are the same tensors in every call, so that weights merged of them may
            be kept from call to call. Empty where nothing is to be kept.
        assignments: By number, the assignments of tokens to experts that leaves are picked by.
        shown: The demands' cores; with True where the graph holds the transpose in memory.
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

    def __hash__(self) -> int:
        # Stored by hand, as that of polynomials: each layer looks its problem up several times.
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash((self.leaves, self.dims, self.incoming))
        return known

    @cached_property
    def shown_transposed(self) -> Mapping[Polynomial, bool]:
        """By the core of a demand, True if the graph holds its transpose in memory."""
        return dict(self.shown)

    def value(self, p: Polynomial, backward: bool) -> Value:
        """The value behind what a step reads that runs in the given phase."""
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
