"""Work: one step of a problem to run, with its sizes. It is the input of every implementation.

Example: for ``Y = X W'`` of 500 tokens in fp32, ``extents`` is ``(1, 500, o)`` and ``size`` is
``2000 * o``.

Invariant: sizes are integers in the search, and symbols in the formulas of a report.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from runlora_fx.cost_model.cost import Amount
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.algebra.problem import Dims, Problem
from runlora_fx.passes.algebra.steps import Accumulate, Product, Step


@dataclass(frozen=True)
class Work:
    """A step to run: the input of an implementation.

    Attributes:
        problem: The problem.
        core: The value that the step makes.
        step: The step.
        sizes: The dimensions [elements]: integers, or expressions for a symbolic cost.
    """

    problem: Problem
    core: Polynomial
    step: Step
    sizes: Dims

    @cached_property
    def extents(self) -> tuple[Amount, Amount, Amount]:
        """Batch, rows and columns of the value; a vector has one column."""
        b, m, n = self.problem.shape(self.core)
        batch = 1 if b is None else self.sizes[b]
        return batch, self.sizes[m], 1 if self.core.is_diag_part else self.sizes[n]

    @property
    def itemsize(self) -> int:
        """Element width [B]."""
        return self.problem.itemsize

    @property
    def size(self) -> Amount:
        """The size of the value in memory [B]."""
        batch, rows, cols = self.extents
        return batch * rows * cols * self.itemsize

    @property
    def product(self) -> Product | None:
        """The step, if it is a product that makes a matrix."""
        return self.step if isinstance(self.step, Product) and not self.core.is_diag_part else None

    @property
    def inner(self) -> int:
        """The dimension that a product contracts."""
        assert isinstance(self.step, Product | Accumulate)
        return self.problem.shape(self.step.left)[2]
