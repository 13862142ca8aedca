"""Made: one step that a node of the incoming graph takes, and the polynomial that it makes.

Example: ``addmm(b, x, w)`` takes two: the product ``X W``, and its sum with the repeated ``b``.

Invariant: a step has the operands that the node reads. It makes the polynomial up to a number and a
transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.polynomials import Polynomial, normalise
from runlora_fx.passes.algebra.steps import Product, Step, Sum


@dataclass(frozen=True)
class Made:
    """One computation of the incoming graph.

    Attributes:
        step: The step, up to a number and a transpose.
        polynomial: The polynomial that it makes.
        backward: The phase that it runs in.
        node: The node that takes it.
    """

    step: Step
    polynomial: Polynomial
    backward: bool
    node: fx.Node

    @classmethod
    def sum_of(cls, addends: Addends, backward: bool, node: fx.Node) -> Made:
        """The sum of addends."""
        return cls(Sum(addends), total(addends), backward, node)

    @property
    def operands(self) -> Addends:
        """What it reads."""
        return self.step.operands

    @property
    def is_product(self) -> bool:
        """True if two matrices are multiplied."""
        return isinstance(self.step, Product)

    @property
    def diag_part(self) -> bool:
        """True if only the diagonal of the product is computed."""
        return self.is_product and self.polynomial.is_diag_part

    @property
    def reads_itself(self) -> bool:
        """True if the graph adds a value to itself: ``X A + X A`` is no way to make ``X A``."""
        core = normalise(self.polynomial).core
        return any(normalise(operand).core == core for operand in self.operands)
