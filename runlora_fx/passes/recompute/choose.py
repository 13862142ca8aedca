"""Choice: which chains the backward recomputes.

    memory="balanced"    all chains together may take the time that the plans save, as predicted
    memory="low"         in addition, every byte that is not saved may take a fixed time

Invariant: every chosen chain reduces the bytes that are saved.
"""

from __future__ import annotations

from collections.abc import Callable

from runlora_fx.cost_model.cost import Cost
from runlora_fx.passes.recompute.chains import Chain, Chains


def choose(
    chains: Chains, price: Callable[[Cost], float], budget: float, per_byte: float
) -> list[Chain]:
    """The chains to recompute, those that take least time for a byte first, and masks last.

    A mask takes a byte for an element, and drawing it takes longer than making what it masks.

    Args:
        chains: The chains of a graph. They take note of every chain that is chosen.
        price: The time of a cost [s]; negative if recomputing is faster than writing and reading.
        budget: The time for all chains that take longer than ``per_byte`` allows [s].
        per_byte: The time that a chain may always take for each byte that is not saved [s].
    """
    chosen: list[Chain] = []

    def take(offers: list[Chain], seconds_left: float) -> float:
        for chain in sorted(offers, key=lambda chain: price(chain.cost) / max(chain.size, 1)):
            seconds, gain = price(chain.cost), chains.gain(chain)
            is_cheap = seconds <= per_byte * gain
            if gain > 0 and (is_cheap or seconds <= seconds_left):
                seconds_left -= 0.0 if is_cheap else seconds
                chains.take(chain)
                chosen.append(chain)
        return seconds_left

    take(chains.masks(), 0.0)
    budget = take([*chains.tensors(), *chains.packed()], budget)
    take(chains.masks(), budget)
    return chosen
