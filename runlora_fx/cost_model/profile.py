"""What a machine can do: seconds for one unit of each term, and the products measured on it.

Example: where a FLOP takes 7 ps, a byte read 33 ps, a byte written 67 ps and a launch 3 us, the
product (512, 768) @ (768, 16) in fp32 takes ::

    12582912 * 7e-12 + 1622016 * 33e-12 + 32768 * 67e-12 + 3e-6  =  147 us

It is a sum, not a maximum: so the rate falls off smoothly where a dimension is small. With outputs
of few columns the operands dominate, with a short inner dimension the result does. And it is linear
in every dimension, so that sympy can solve it for a break-even.

Invariant: a product that was measured takes the time it took; everything else takes the product of
its cost and :attr:`MachineProfile.seconds_per`. (Correcting the formula by products of about the
same shape was tried: it carries the noise of single measurements over to others, and chose worse
plans than the formula alone.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import sympy

from runlora_fx.cost_model.cost import TERMS, Cost, Term
from runlora_fx.cost_model.ops import GemmShape, MatMul, Operation

#: The dtypes whose products are planned for time.
DTYPES = ("float64", "float32", "bfloat16", "float16")

#: Seconds: a number, or an expression in the graph's symbols.
Seconds: TypeAlias = float | sympy.Expr


@dataclass(frozen=True)
class MachineProfile:
    """The times of one device for one dtype.

    Attributes:
        known: Times of one unit [s], by term; terms that are missing take as long as those that
            they are :attr:`~runlora_fx.cost_model.cost.Term.like`.
        measured: Times of products [s].
    """

    known: Mapping[str, float]
    measured: tuple[tuple[GemmShape, float], ...] = ()

    @cached_property
    def seconds_per(self) -> Mapping[str, float]:
        """The time of one unit of each term [s]."""

        def time(term: Term) -> float:
            if term.name in self.known:
                return self.known[term.name]
            return 0.0 if term.like is None else time(TERMS[term.like])

        return {term.name: time(term) for term in TERMS.values()}

    @property
    def seconds_per_flop(self) -> float:
        """The time of a FLOP where the operands lie best [s]."""
        return min(self.seconds_per[t.name] for t in TERMS.values() if t.total == "flops")

    def seconds(self, operation: Operation) -> float:
        """The time of an operation of known size [s], measured if it was and predicted if not."""
        known = self.measured_seconds(operation)
        return float(self.formula(operation)) if known is None else known

    def measured_seconds(self, operation: Operation) -> float | None:
        """The time that an operation took [s]; None if it was not measured."""
        if self.measured and isinstance(operation, MatMul):
            return self._times.get(operation.shape)
        return None

    def formula(self, operation: Operation) -> Seconds:
        """The time of an operation as its cost gives it [s]; symbolic if its dimensions are."""
        return self._of(operation.cost)

    def of(self, cost: Cost) -> float:
        """The time of a cost of known amounts [s]."""
        return float(self._of(cost))

    def _of(self, cost: Cost) -> Seconds:
        per = self.seconds_per
        return sum(per[term] * amount for term, amount in cost.items())

    @cached_property
    def _times(self) -> Mapping[GemmShape, float]:
        return dict(self.measured)

    @cached_property
    def _hash(self) -> int:
        return hash((frozenset(self.known.items()), self.measured))

    def __hash__(self) -> int:
        return self._hash


#: A few cores of a current CPU in fp32; a ratio of FLOPs to bytes that most machines resemble.
DEFAULT_PROFILE = MachineProfile(
    {"flops.nn": 1 / 1.5e11, "read": 1 / 3e10, "written": 1 / 1.5e10, "launches": 3e-6}
)
