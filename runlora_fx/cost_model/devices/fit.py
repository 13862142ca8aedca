"""Calibration: from measured operations to the time of one unit of each term.

Example: products in all layouts and some sums, each with the time it took, become ::

    {"flops.nn": 7.1e-12, "flops.nt": 6.9e-12, ..., "launches": 2.4e-6}

Invariant: the terms of the result are exactly the timed ones that the operations mention. None of
the times is zero or negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations

import torch

from runlora_fx.cost_model.cost import TERMS
from runlora_fx.cost_model.ops import Operation

#: Stands for "costs nothing" where no time is found for a unit: a stored time is positive [s].
FREE = 1e-18


def fit(times: Mapping[Operation, float]) -> dict[str, float]:
    """The times of units that predict operations best: with the least squared relative error.

    ``seconds = sum over terms of (time of a unit) * (amount)``, no time negative, no FLOP free.

    Args:
        times: Times of operations of known size [s].

    Returns:
        The time of one unit [s] of every term that an operation mentions.

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
    if solved is None:  # too noisy to tell layouts apart
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
        positive: By term, whether a unit of it must take time.

    Returns:
        The times [s]; None if one that must be positive would not be.
    """
    scale = relative.norm(dim=0)  # sizes of features differ by many orders of magnitude
    scaled = relative / scale
    count = scaled.shape[1]
    ones = torch.ones(len(scaled), 1, dtype=scaled.dtype)
    always = [i for i in range(count) if positive[i]]
    free = [i for i in range(count) if not positive[i]]
    best, least = None, torch.inf
    # So few terms that every choice of which are zero can be tried.
    for others in chain.from_iterable(combinations(free, k) for k in range(len(free) + 1)):
        columns = [*always, *others]
        solved = torch.linalg.lstsq(scaled[:, columns], ones, driver="gelsd").solution[:, 0]
        error = (scaled[:, columns] @ solved - 1).norm().item()
        own = solved[: len(always)]
        if (solved >= 0).all() and (own > 0).all() and error < least:
            best, least = torch.zeros(count, dtype=scaled.dtype), error
            best[columns] = solved
    return None if best is None else (best / scale).tolist()
