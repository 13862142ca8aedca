"""Fit: from the measured times of operations to the time of one unit of each cost term.

Example: the measured times of products in all layouts and of some sums become ::

    {"flops.nn": 7.1e-12, "flops.nt": 6.9e-12, ..., "launches": 2.4e-6}

Invariant: the result has exactly the timed terms that the operations mention. All times are
positive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations

import torch

from runlora_fx.cost_model.cost import TERMS
from runlora_fx.cost_model.ops import Operation
from runlora_fx.cost_model.profile import FREE


def fit(times: Mapping[Operation, float]) -> dict[str, float]:
    """The times of units that predict the operations with the least squared relative error.

    ``seconds = sum over terms of (time of a unit) * (amount)``. No time is negative, and a FLOP
    takes time. If the measurements are too noisy to tell the layouts apart, all FLOPs take the same
    time.

    Args:
        times: Times of operations of known size [s].

    Returns:
        By term that an operation mentions, the time of one unit [s].

    Raises:
        ValueError: If there are fewer operations than terms.
    """
    costs = [operation.cost for operation in times]
    terms = [
        name for name, term in TERMS.items() if term.is_timed and any(name in c for c in costs)
    ]
    if len(times) < len(terms):
        raise ValueError(f"needs {len(terms)} measurements or more, got {len(times)}")
    amounts = [[float(cost[name]) for name in terms] for cost in costs]
    features = torch.tensor(amounts, dtype=torch.float64)
    relative = features / torch.tensor(list(times.values()), dtype=torch.float64)[:, None]
    are_flops = [TERMS[name].total == "flops" for name in terms]
    columns = [[i] for i in range(len(terms))]
    solved = _solved(relative, are_flops)
    if solved is None:
        flops = [i for i, is_flops in enumerate(are_flops) if is_flops]
        columns = [flops, *([i] for i, is_flops in enumerate(are_flops) if not is_flops)]
        grouped = torch.stack([relative[:, own].sum(1) for own in columns], 1)
        first = [i == 0 for i in range(len(columns))]
        solved = _solved(grouped, first) or _solved(grouped, [False] * len(columns))
        assert solved is not None  # all times being zero is among what was tried
    found = {i: time for own, time in zip(columns, solved, strict=True) for i in own}
    return {name: max(found[i], FREE) for i, name in enumerate(terms)}


def _solved(relative: torch.Tensor, positive: Sequence[bool]) -> list[float] | None:
    """The times of units that bring every row closest to 1.

    Args:
        relative: By operation and term, the amount over the operation's time [1/s].
        positive: By term, True if a unit must take time.

    Returns:
        The times [s]; None if the best solution gives no time to a unit that must take some.
    """
    scale = relative.norm(dim=0)  # columns differ by many orders of magnitude
    scaled = relative / scale
    count = scaled.shape[1]
    ones = torch.ones(len(scaled), 1, dtype=scaled.dtype)
    always = [i for i in range(count) if positive[i]]
    free = [i for i in range(count) if not positive[i]]
    best, least = None, torch.inf
    # There are few terms, so every choice of the terms that are zero is tried.
    for others in chain.from_iterable(combinations(free, k) for k in range(len(free) + 1)):
        columns = [*always, *others]
        solved = torch.linalg.lstsq(scaled[:, columns], ones, driver="gelsd").solution[:, 0]
        error = (scaled[:, columns] @ solved - 1).norm().item()
        own = solved[: len(always)]
        if (solved >= 0).all() and (own > 0).all() and error < least:
            best, least = torch.zeros(count, dtype=scaled.dtype), error
            best[columns] = solved
    return None if best is None else (best / scale).tolist()
