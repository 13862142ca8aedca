"""The choice of what the backward makes again, by price.

    balanced    what the plans of the graph save, in predicted time, is spent on it
    low         and every byte that is not kept may take a stated time

Invariant: every chain that is chosen has less kept than before.
"""

from __future__ import annotations

from collections.abc import Callable

from runlora_fx.cost_model.cost import Cost
from runlora_fx.passes.recompute.chains import Chain, Chains


def choose(
    chains: Chains, price: Callable[[Cost], float], budget: float, per_byte: float
) -> list[Chain]:
    """The chains to make again: masks first, then those that cost least for a byte.

    A tensor that dropout masked is made of its mask, so masks are decided about before it.

    Args:
        chains: The chains of a graph; what is chosen is taken from what they count as kept.
        price: The time that a cost takes [s]; negative where not keeping a tensor saves more.
        budget: The time for all chains that take longer than ``per_byte`` allows [s].
        per_byte: The time that a chain may always take for each byte that is not kept [s].
    """
    chosen: list[Chain] = []
    for offer in (chains.masks, chains.tensors):
        for chain in sorted(offer(), key=lambda chain: price(chain.cost) / max(chain.size, 1)):
            seconds, gain = price(chain.cost), chains.gain(chain)
            is_cheap = seconds <= per_byte * gain
            if gain > 0 and (is_cheap or seconds <= budget):
                budget -= 0.0 if is_cheap else seconds
                chains.take(chain)
                chosen.append(chain)
    return chosen
