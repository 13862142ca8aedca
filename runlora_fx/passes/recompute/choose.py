"""Choice: which chains the backward recomputes.

    memory="balanced"    all chains together may take the time that the plans save, as predicted
    memory="low"         in addition, every byte that is not saved may take a fixed time, and all
                         together a share of the graph's

Invariant: every chosen chain reduces the bytes that are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from runlora_fx.cost_model.cost import Cost
from runlora_fx.passes.recompute.chains import Chain, Chains


def choose(
    chains: Chains,
    price: Callable[[Cost], float],
    budget: float,
    per_byte: float,
    limit: float = inf,
) -> list[Chain]:
    """The chains to recompute, those that take least time for a byte first.

    A mask is packed, or drawn again where that is quicker. Drawing a mask that cannot be packed
    takes longer than what is made of it, so it comes last.

    Args:
        chains: The chains of a graph. They take note of every chain that is chosen.
        price: The time of a cost [s]; negative if recomputing is faster than writing and reading.
        budget: The time for all chains that take longer than ``per_byte`` allows [s].
        per_byte: The time that a chain may always take for each byte that is not saved [s].
        limit: The time for all chains together [s].
    """
    chosen: list[Chain] = []

    def take(offers: list[Chain], budget: float, limit: float) -> tuple[float, float]:
        for chain in sorted(offers, key=lambda chain: price(chain.cost) / max(chain.size, 1)):
            seconds, gain = price(chain.cost), chains.gain(chain)
            is_cheap = seconds <= per_byte * gain
            if gain > 0 and seconds <= limit and (is_cheap or seconds <= budget):
                budget -= 0.0 if is_cheap else seconds
                limit -= seconds
                chains.take(chain)
                chosen.append(chain)
        return budget, limit

    packing = {chain.made: price(chain.cost) for chain in chains.packed()}
    drawn = [c for c in chains.masks() if price(c.cost) <= packing.get(c.made, -inf)]
    budget, limit = take(drawn, budget, limit)
    budget, limit = take([*chains.tensors(), *chains.packed()], budget, limit)
    take(chains.masks(), budget, limit)
    return chosen
