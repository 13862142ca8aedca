"""Objective: the price of operations, and the rule that says if a plan replaces a graph.

Example: two small products have fewer FLOPs than one large product, but one launch more. Under
``"flops"`` they are cheaper. Under ``"time"`` they may be dearer.

Invariant: the price of an operation is the sum over its terms of amount times weight. Under
``"flops"`` it is an exact integer. One exception: under ``"time"``, a product that was measured has
its measured time as price.
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

#: Prices are added and compared. They are integers if the ranking must be exact.
Price: TypeAlias = int | float

#: More than any number of bytes, so that ``flops * _BYTES + bytes`` ranks exactly by FLOPs first.
_BYTES = 1 << 80

#: Predicted times that differ by less than this share are equal: sums of floats round differently.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Objective:
    """Ranks plans.

    Attributes:
        name: ``"time"`` ranks by the seconds that the machine profile predicts; ``"flops"`` by the
            FLOPs of contractions, and breaks ties by bytes moved and held.
        margin: The share of the incoming graph's price that a plan must save to replace it.
        profile: The machine that ``"time"`` is predicted for.
        flops_per_saved_byte: The most that recomputing a byte in the backward may cost, instead of
            holding it from the forward [FLOP/B].
        adds_rounding: True if, in dtypes of less than 32 bits, plans may materialise values that
            the incoming graph does not. Each is rounded once more.
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
        for term, amount in operation.cost.items():  # a loop: the innermost one of the search
            price += weights[term] * amount
        return price

    def has_times(self, operations: Iterable[Operation]) -> bool:
        """True if plans are ranked by time, and all of some operations were measured."""
        measured = self.profile.measured_seconds
        return self.name == "time" and all(measured(one) is not None for one in operations)

    @property
    def prices_picks(self) -> bool:
        """True if plans are ranked by time, and products do not read picked matrices in place."""
        return self.name == "time" and self.profile.writes_picks

    @property
    def seconds_per_saved_byte(self) -> float:
        """The most that recomputing a byte may take, instead of holding it [s]."""
        return self.flops_per_saved_byte * self.profile.seconds_per_flop

    @cached_property
    def _weights(self) -> Mapping[str, Price]:
        """By term, the price of one unit."""
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
        """True if two plans tie in FLOPs, and the second holds less memory for the backward."""
        is_tie = self.name == "flops" and not self.margin and before.flops == after.flops
        return is_tie and after.saved < before.saved and after.bytes <= before.bytes

    def is_less(self, one: Price, other: Price) -> bool:
        """True if a price is less than another, and not a tie. All comparisons of plans use it.

        Equal FLOPs are a tie under ``"flops"``. Times that differ by rounding are a tie under
        ``"time"``.
        """
        if self.name == "flops":
            return int(one) // _BYTES < int(other) // _BYTES
        return saves(other, one, 0.0)

    def worthwhile(self, before: Price, after: Price) -> bool:
        """True if a plan saves at least the margin. A tie is never worth a change."""
        if self.name == "flops":
            before, after = int(before) // _BYTES, int(after) // _BYTES
        return saves(before, after, self.margin)


def saves(before: float, after: float, share: float) -> bool:
    """True if ``after`` is less than ``before`` by a share of it, and by more than rounding."""
    is_less = after < before if isinstance(after, int) else after < before * (1 - _ROUNDING)
    return is_less and after <= before * (1 - share)
