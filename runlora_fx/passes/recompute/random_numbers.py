"""Random numbers: where the backward would draw others, those of the forward are saved.

    mask = rand(...) < p; y = mask * x      ->      the mask is saved, whatever else is recomputed

With an activation memory budget below 1, torch runs the random operators of checkpoints again, with
other results. Their masks are saved as well, although the checkpoint asks to recompute them.

Invariant: without such a budget, only nodes without a tag are tagged.
"""

from __future__ import annotations

import logging

from runlora_fx._torch_compat import keeps_inputs_only, repeats_random_operators
from runlora_fx.passes.context import Context
from runlora_fx.passes.emit.graph.recompute import keep_random_numbers

_log = logging.getLogger("runlora_fx")


def save_random_numbers(context: Context) -> None:
    """Save the random numbers of the forward where the backward would draw others.

    Raises:
        RuntimeError: Under ``strict``, if the partitioner would ignore the tags. Otherwise a
            warning is logged.
    """
    is_repeated = repeats_random_operators()
    kept = keep_random_numbers(context.graph, context.effects(), in_checkpoints=is_repeated)
    if not kept or not keeps_inputs_only():
        return
    problem = (
        f"with activation_memory_budget = 0 the backward draws other random numbers than the "
        f"forward: the gradients of what {kept[0].name} is part of are wrong. Set "
        f"torch._functorch.config.activation_memory_budget to 0.01 or more"
    )
    if context.options.strict:
        raise RuntimeError(problem)
    _log.warning("runlora: %s", problem)
