"""Profiles: the seconds of one unit of each cost term on a device, and measured products.

Example: where a FLOP takes 7 ps, a byte read 33 ps, a byte written 67 ps and a launch 3 us, the
product (512, 768) @ (768, 16) in fp32 takes ::

    12582912 * 7e-12 + 1622016 * 33e-12 + 32768 * 67e-12 + 3e-6  =  147 us

The time is a sum of the terms, not their maximum. So the predicted rate falls smoothly as a
dimension becomes small: operands dominate if the result has few columns, the result dominates if
the inner dimension is short. The sum is linear in every dimension, so sympy can solve it for a
break-even.

Invariant: a measured product has its measured time. Any other operation has the time that its cost
and :attr:`MachineProfile.seconds_per` give. (Correcting the formula by measured products of similar
shape was tried. It spreads the noise of single measurements, and chose worse plans.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import sympy

from runlora_fx.cost_model.cost import TERMS, Cost, Term
from runlora_fx.cost_model.ops import MatMul, Merge, Operation, Shape, UpcastMatMul

#: The dtypes whose products are planned for time.
DTYPES = ("float64", "float32", "bfloat16", "float16")

#: The time of a unit that takes none [s]. A stored time must be positive.
FREE = 1e-18

#: The term of products that run in float32, and those of products that run as they are.
_UPCAST = "flops.upcast"
_AS_THEY_ARE = ("flops.nn", "flops.nt", "flops.tn")

#: A cast of a 16-bit matrix moves three times its bytes.
_CAST = 3

#: The largest share of its time as it is that a product may take in float32, to run there.
_UPCAST_SHARE = 0.8

#: Seconds: a number, or an expression in the graph's symbols.
Seconds: TypeAlias = float | sympy.Expr


@dataclass(frozen=True)
class MachineProfile:
    """The times of one device for one dtype.

    Attributes:
        known: By term, the time of one unit [s]. A missing term has the time of the term in
            :attr:`~runlora_fx.cost_model.cost.Term.like`.
        measured: Measured times of products and merges [s].
    """

    known: Mapping[str, float]
    measured: tuple[tuple[Shape, float], ...] = ()

    @cached_property
    def seconds_per(self) -> Mapping[str, float]:
        """By term, the time of one unit [s], of the faster way to compute products.

        Where products of 16-bit matrices are faster in float32, casts of operands and results take
        time, too. This is an average over products: :meth:`upcasts` decides about each.
        """

        def time(term: Term) -> float:
            if term.name in self.known:
                return self.known[term.name]
            return 0.0 if term.like is None else time(TERMS[term.like])

        times = {term.name: time(term) for term in TERMS.values()}
        slower = [name for name in _AS_THEY_ARE if times[name] > times[_UPCAST]]
        if self.may_upcast and slower:
            times |= dict.fromkeys(slower, times[_UPCAST])
            cast = _CAST * times["elementwise"]
            times |= {name: max(times[name], cast) for name in ("read", "written")}
        return times

    @property
    def may_upcast(self) -> bool:
        """True if products of 16-bit matrices were measured in float32."""
        return _UPCAST in self.known

    @cached_property
    def as_they_are(self) -> MachineProfile:
        """The profile of products that all run in the dtype of their operands."""
        known = {name: time for name, time in self.known.items() if name != _UPCAST}
        return replace(self, known=known)

    def upcasts(self, product: MatMul) -> bool:
        """True if a product of 16-bit matrices is predicted to be faster in float32."""
        if not self.may_upcast:
            return False
        as_it_is = self.as_they_are.of(product.cost)
        return self.of(UpcastMatMul(product).cost) < _UPCAST_SHARE * as_it_is

    @property
    def seconds_per_flop(self) -> float:
        """The time of a FLOP in the fastest layout [s]."""
        return min(self.seconds_per[t.name] for t in TERMS.values() if t.total == "flops")

    @property
    def writes_picks(self) -> bool:
        """True if a pick takes at least half the time of the bytes that it reads and writes."""
        return self.seconds_per["picked"] >= self.seconds_per["elementwise"] / 2

    def seconds(self, operation: Operation) -> float:
        """The time of an operation of known size [s]: measured, or else predicted."""
        known = self.measured_seconds(operation)
        return float(self.formula(operation)) if known is None else known

    def measured_seconds(self, operation: Operation) -> float | None:
        """The measured time of an operation [s]; None if it was not measured.

        Products that run in float32 have predicted times. A fused merge counts as measured only if
        ``addmm`` was measured too, and took longer.
        """
        if self.measured and isinstance(operation, MatMul):
            return None if self.upcasts(operation) else self._times.get(operation.shape)
        if self.measured and isinstance(operation, Merge):
            fused, plain = map(self._times.get, operation.shape.pair)
            return None if fused is None or plain is None or fused >= plain else fused
        return None

    def formula(self, operation: Operation) -> Seconds:
        """The predicted time of an operation [s]; an expression if its dimensions are symbols."""
        return self._of(operation.cost)

    def of(self, cost: Cost) -> float:
        """The predicted time of a cost whose amounts are numbers [s]."""
        return float(self._of(cost))

    def _of(self, cost: Cost) -> Seconds:
        per = self.seconds_per
        return sum(per[term] * amount for term, amount in cost.items())

    @cached_property
    def _times(self) -> Mapping[Shape, float]:
        return dict(self.measured)

    @cached_property
    def _hash(self) -> int:
        return hash((frozenset(self.known.items()), self.measured))

    def __hash__(self) -> int:
        return self._hash


#: A few cores of a current CPU in fp32. Many machines have a similar ratio of FLOPs to bytes.
DEFAULT_PROFILE = MachineProfile(
    {"flops.nn": 1 / 1.5e11, "read": 1 / 3e10, "written": 1 / 1.5e10, "launches": 3e-6}
)
