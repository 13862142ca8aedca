"""Allowance: how much time plans that save less for the backward may take in a graph.

Under ``memory="low"`` every byte may take a fixed time. Together they may take a share of the
graph's time:

    plans that save less, dear for each byte      ->      the quickest plans, once the time is spent

Invariant: the predicted time of all products is at most the incoming graph's, and the share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.decide import Decision, decide, price_of

#: What ``memory="low"`` may take beyond the time of the incoming graph, as a share of it.
SHARE = 0.03


class _Offer(NamedTuple):
    """A decision that saves less than the quickest one of its problem."""

    position: int
    seconds: float
    fewer_bytes: float

    @property
    def rate(self) -> float:
        """The time for each byte that is not saved [s/B]."""
        return self.seconds / max(self.fewer_bytes, 1.0)


def within_allowance(
    problems: Sequence[Problem], objectives: Sequence[Objective], decisions: Sequence[Decision]
) -> list[Decision]:
    """The decisions, some of them replaced by the quickest ones.

    Args:
        problems: The problems of a graph.
        objectives: The objectives that rank their plans by time, and by bytes that are saved.
        decisions: The decisions by these objectives.
    """
    known: dict[int, tuple[Decision, float, float, float]] = {}  # equal problems have one decision
    chosen: list[Decision] = []
    offers: list[_Offer] = []
    allowance = 0.0
    for i, (problem, objective, low) in enumerate(
        zip(problems, objectives, decisions, strict=True)
    ):
        if id(low) not in known:
            timed = replace(objective, flops_per_saved_byte=0)
            quick = decide(problem, timed)
            ways = (replace(quick, changed=False), quick, low)
            came, quickest, lowest = (float(price_of(way, problem, timed)) for way in ways)
            known[id(low)] = quick, came, quickest, lowest
        quick, came, quickest, lowest = known[id(low)]
        allowance += (1 + SHARE) * came - quickest
        offers.append(_Offer(i, lowest - quickest, float(quick.after.saved - low.after.saved)))
        chosen.append(quick)
    for offer in sorted(offers, key=lambda offer: offer.rate):
        if offer.seconds <= allowance:
            allowance -= max(offer.seconds, 0.0)
            chosen[offer.position] = decisions[offer.position]
    return chosen
