"""Values: the part of the emitter that steps, sums and broadcasts call for their operands.

    values.matrix(M, transposed=True)      ->      permute(addmm(w, b, a)), where the ``addmm`` is
                                                   written at the first call only

The emitter imports these modules, so they know it by this protocol.

Invariant: a value is emitted once. Its transpose is a view of that node.
"""

from __future__ import annotations

from typing import Protocol

from torch import fx

from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.emit.steps.task import Laid


class Values(Protocol):
    """Returns the nodes of values, and emits each value when it is first asked for."""

    def matrix(self, value: Value, transposed: bool) -> fx.Node:
        """A value or its transpose as a matrix."""

    def operand(self, p: Polynomial, backward: bool) -> tuple[fx.Node, Scalar]:
        """A polynomial as a matrix, and the scalar that it is still to be multiplied by."""

    def laid(self, value: Value) -> Laid:
        """The node that holds a value or its transpose."""

    def is_made(self, value: Value) -> bool:
        """True if a value was emitted already."""
