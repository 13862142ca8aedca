"""Values: what steps, sums and broadcasts ask of the emitter that calls them.

    ``values.matrix(value, transposed)``      the node that holds a value, emitted if it is new

Invariant: a value is emitted once; its transpose is a view.
"""

from __future__ import annotations

from typing import Protocol

from torch import fx

from runlora_fx.passes.algebra.polynomials import Polynomial, Scalar
from runlora_fx.passes.algebra.problem import Value
from runlora_fx.passes.emit.steps.task import Laid


class Values(Protocol):
    """Emits values, each once."""

    def matrix(self, value: Value, transposed: bool) -> fx.Node:
        """A value or its transpose as a matrix."""

    def operand(self, p: Polynomial, backward: bool) -> tuple[fx.Node, Scalar]:
        """A polynomial as a matrix, and what it still has to be scaled by."""

    def laid(self, value: Value) -> Laid:
        """The node that holds a value, and whether it holds its transpose."""

    def is_made(self, value: Value) -> bool:
        """Whether a value was emitted already."""
