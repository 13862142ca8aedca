"""One cost with units, in the search and in the report alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import sympy

#: A dimension or an amount: a number where shapes are known, an expression where they are symbols.
Amount: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class Cost:
    """What an operation costs the machine.

    Attributes:
        flops: Floating-point operations of contractions, a multiply-add counted as two [FLOP].
            Elementwise arithmetic is not counted: it is bound by the bytes it moves.
        bytes: Memory read and written [B].
        kernels: Launches.
        saved: Memory held from the forward to the backward [B].
    """

    flops: Amount = 0
    bytes: Amount = 0
    kernels: Amount = 0
    saved: Amount = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            self.saved + other.saved,
        )


FREE = Cost()
