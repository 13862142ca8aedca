"""Shares: how much of what adapters cost could be removed, counted without running.

    shares(task)   ->  {"flops": 0.93, "bytes": 0.41}

The cost of adapters is what a step needs beyond a step of the frozen model under Inductor.

Invariant: equal versions of torch, PEFT and this package give equal numbers for one profile.
"""

from __future__ import annotations

import torch

from measuring.counts import count_of
from measuring.steps import Task


def shares(task: Task) -> dict[str, float]:
    """By what is counted, the share of the adapters' cost that plans remove.

    Args:
        task: A training step.

    Returns:
        ``flops``: by the plan with fewest FLOPs. ``bytes``: moved, by the plan that is chosen.
    """
    torch._dynamo.reset()
    variants = {
        "frozen": (task.frozen, None),
        "PEFT": (task.adapted, None),
        "chosen": (task.adapted, {"strict": True}),
        "fewest": (task.adapted, {"strict": True, "objective": "flops"}),
    }
    counts = {
        name: count_of(model, task.inputs, options, autocast=task.autocast)
        for name, (model, options) in variants.items()
    }
    torch._dynamo.reset()
    frozen, peft = counts["frozen"], counts["PEFT"]
    return {
        "flops": (peft.flops - counts["fewest"].flops) / (peft.flops - frozen.flops),
        "bytes": (peft.moved - counts["chosen"].moved) / (peft.moved - frozen.moved),
    }
