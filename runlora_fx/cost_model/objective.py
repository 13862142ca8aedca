"""The objective: how operations are priced, and when a plan is worth changing a graph for.

Example: under ``"time"`` two small products that share a launch cost more than one large product of
more FLOPs; under ``"flops"`` they cost less.

Invariant: the price of an operation is the sum over the terms of its cost, each times the weight
that the objective gives it; under ``"flops"`` it is an exact integer. One exception: a product that
was measured takes, under ``"time"``, the time that it took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from runlora_fx.cost_model.cost import TERMS, Cost
from runlora_fx.cost_model.ops import Operation
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile

ObjectiveName: TypeAlias = Literal["time", "flops"]

#: Prices add up and are compared, nothing else; integers where the ranking must be exact.
Price: TypeAlias = int | float

#: Larger than any byte count, so that ``flops * _BYTES + bytes`` ranks by FLOPs first, exactly.
_BYTES = 1 << 80

#: Predicted times closer than this share are equal: sums of floats in another order.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Objective:
    """Ranks plans.

    Attributes:
        name: ``"time"`` ranks by the seconds that the machine profile predicts; ``"flops"`` by the
            FLOPs of contractions, and breaks ties by bytes moved and held.
        margin: The share of the incoming graph's price that a plan must save to replace it.
        profile: The machine that ``"time"`` is predicted for.
        flops_per_saved_byte: What it may cost to compute a byte again in the backward rather than
            to hold it from the forward [FLOP/B].
        adds_rounding: True if plans for dtypes of less than 32 bits may materialise, and so round,
            values that the graph as it came does not.
    """

    name: ObjectiveName = "flops"
    margin: float = 0.0
    profile: MachineProfile = DEFAULT_PROFILE
    flops_per_saved_byte: int = 0
    adds_rounding: bool = True

    def price(self, operation: Operation) -> Price:
        """The price of one operation; the price of a plan is the sum over its operations."""
        if self.name == "time":
            known = self.profile.measured_seconds(operation)
            if known is not None:
                return known
        weights = self._weights
        price: Price = 0
        for term, amount in operation.cost.items():  # a loop, for it is the search's innermost
            price += weights[term] * amount
        return price

    @property
    def seconds_per_saved_byte(self) -> float:
        """What it may take to compute a byte again rather than to hold it [s]."""
        return self.flops_per_saved_byte * self.profile.seconds_per_flop

    @cached_property
    def _weights(self) -> Mapping[str, Price]:
        """The price of one unit of each term."""
        if self.name == "time":
            worth = self.seconds_per_saved_byte
            return {
                name: seconds if TERMS[name].is_timed else seconds + worth
                for name, seconds in self.profile.seconds_per.items()
            }
        held = self.flops_per_saved_byte
        exact = {"flops": _BYTES, "bytes": 1, "kernels": 0, "saved": held * _BYTES + 1, None: 0}
        return {name: exact[term.total] for name, term in TERMS.items()}

    def total(self, operations: Iterable[Operation]) -> Price:
        """The price of a plan."""
        return sum(map(self.price, operations))

    def holds_less(self, before: Cost, after: Cost) -> bool:
        """True if a plan that ties in FLOPs holds less from the forward to the backward."""
        is_tie = self.name == "flops" and not self.margin and before.flops == after.flops
        return is_tie and after.saved < before.saved and after.bytes <= before.bytes

    def is_less(self, one: Price, other: Price) -> bool:
        """True if a price is less than another: the rule for ties, wherever plans are compared.

        Equal FLOPs are a tie, whatever else differs, and so are times that differ by rounding.
        """
        if self.name == "flops":
            return int(one) // _BYTES < int(other) // _BYTES
        return saves(other, one, 0.0)

    def worthwhile(self, before: Price, after: Price) -> bool:
        """True if a plan saves enough. A tie never justifies a change."""
        if self.name == "flops":
            before, after = int(before) // _BYTES, int(after) // _BYTES
        return saves(before, after, self.margin)


def saves(before: float, after: float, share: float) -> bool:
    """True if ``after`` is less than ``before`` by a share of it, and by more than rounding."""
    is_less = after < before if isinstance(after, int) else after < before * (1 - _ROUNDING)
    return is_less and after <= before * (1 - share)
