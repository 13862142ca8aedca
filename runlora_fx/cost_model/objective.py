"""The objective: how costs are ranked, and when a plan is worth changing a graph for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from runlora_fx.cost_model.cost import Cost
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile

ObjectiveName: TypeAlias = Literal["flops", "time"]

#: Prices add up and are compared, nothing else; integers where the ranking must be exact.
Price: TypeAlias = int | float

#: Larger than any byte count, so that ``flops * _BYTES + bytes`` ranks by FLOPs first, exactly.
_BYTES = 1 << 80


@dataclass(frozen=True)
class Objective:
    """Ranks plans.

    Attributes:
        name: ``"flops"`` ranks by the FLOPs of contractions and breaks ties by bytes moved;
            ``"time"`` ranks by the seconds that the machine profile predicts.
        margin: The share of the incoming graph's price that a plan must save to replace it.
        profile: The machine that ``"time"`` is predicted for.
    """

    name: ObjectiveName = "flops"
    margin: float = 0.0
    profile: MachineProfile = DEFAULT_PROFILE

    def price(self, cost: Cost) -> Price:
        """The price of one operation; the price of a plan is the sum over its operations."""
        if self.name == "flops":
            return int(cost.flops) * _BYTES + int(cost.bytes)
        return self.profile.seconds(cost)

    def worthwhile(self, before: Price, after: Price) -> bool:
        """Whether a plan saves enough. Equal FLOPs alone never justify a change."""
        if self.name == "flops":
            before, after = int(before) // _BYTES, int(after) // _BYTES
        return after < before and after <= before * (1 - self.margin)
