"""Activations: the stage that has the backward recompute them, by price.

Goes in: a joint graph whose plans are written, and the time that they save. Comes out: tags, masks
that are saved as bits, and a count of both.

Invariant: under ``balanced`` a step is predicted to take no longer than the incoming graph's, and
under ``low`` at most a share of it longer. Only ``low`` recomputes products, and only with the time
that plans save.
"""

from __future__ import annotations

from collections import Counter
from math import inf

from runlora_fx.cost_model.objective import Objective
from runlora_fx.passes.context import NOTHING, Context, Recomputation
from runlora_fx.passes.emit.graph.packed_masks import MaskPacker
from runlora_fx.passes.emit.graph.recompute import recompute
from runlora_fx.passes.emit.graph.transaction import transaction
from runlora_fx.passes.recompute.chains import Chains
from runlora_fx.passes.recompute.choose import choose
from runlora_fx.passes.recompute.products import choose_products
from runlora_fx.passes.recompute.random_numbers import save_random_numbers
from runlora_fx.passes.search import allowance

#: The most that recomputing a product may take for each byte that is not saved [FLOP/B]. In 16 bits
#: it takes as many as its inner dimension has elements.
_FLOPS_PER_BYTE = 8192


def recompute_activations(
    context: Context, objective: Objective, seconds: tuple[float, float] | None
) -> Recomputation:
    """Tag the activations that the backward recomputes, and pack masks.

    Under ``objective="flops"`` pointwise operators cost nothing: ``low`` takes all of them.

    Args:
        context: The graph.
        objective: How plans were ranked.
        seconds: The predicted time of all products, before and after [s]; None if FLOPs rank plans.
    """
    is_low = context.options.memory == "low"
    budget, per_byte, limit = 0.0, inf, inf
    if seconds is not None:
        before, after = seconds
        budget, per_byte = max(before - after, 0.0), objective.seconds_per_saved_byte
        limit = max((1 + allowance.SHARE) * before - after, 0.0) if is_low else budget
    if not (budget or is_low):
        return NOTHING
    chains = Chains(context)
    price = objective.profile.of
    chosen = choose(chains, price, budget, per_byte, limit)
    if is_low and budget:
        left = budget - sum(price(chain.cost) for chain in chosen)
        most = _FLOPS_PER_BYTE * objective.profile.seconds_per_flop
        chosen += choose_products(chains, price, left, most)
    again = {node for chain in chosen for node in chain.nodes}
    masks = [chain.made for chain in chosen if chain.kind == "packed"]
    if masks:
        with transaction(context.graph):
            again -= MaskPacker(context.graph, chains.runs_backward).pack(masks, again)
    recompute(again)
    if chosen and not context.draws_again:
        # What is made again must not take a mask along that would come out otherwise.
        save_random_numbers(context)
    kinds = Counter(chain.kind for chain in chosen)
    return Recomputation(kinds["tensor"], kinds["drawn"], kinds["packed"], chains.fewer_bytes)
