"""Calibration: from measured products to the rates of a machine profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations

import torch

from runlora_fx.cost_model.ops import GemmShape, MatMul

#: Stands for "costs nothing" where the fit finds no cost for a byte or a launch.
_FREE = 1e-18


def fit_rates(products: Mapping[GemmShape, float], itemsize: int) -> dict[str, float]:
    """The rates that predict measured products best, in the sense of least squared relative error.

    ``seconds = c_layout FLOPs + c1 bytes read + c2 bytes written + c3``, with a coefficient for
    every layout that was measured, none negative, and a FLOP never free.

    Args:
        products: Times of products [s].
        itemsize: Element width [B].

    Returns:
        ``flops_per_s``, ``read_bytes_per_s``, ``write_bytes_per_s``, ``launch_s`` and, by layout,
        ``slower_nn``, ``slower_nt``, ``slower_tn``.

    Raises:
        ValueError: If there are fewer products than coefficients.
    """
    matmuls = [shape.product(itemsize) for shape in products]
    layouts = sorted({m.layout for m in matmuls})
    if len(products) < len(layouts) + 3:
        raise ValueError(f"needs {len(layouts) + 3} products or more, got {len(products)}")
    times = torch.tensor(list(products.values()), dtype=torch.float64)
    solved = _solved(_features(matmuls, layouts) / times[:, None], len(layouts))
    if solved is None:  # too noisy to tell layouts apart
        solved = _solved(_features(matmuls, []) / times[:, None], 1) or [_FREE, 0.0, 0.0, 0.0]
        solved = [*solved[:1] * len(layouts), *solved[1:]]
    *per_flop, per_read, per_written, launch = solved
    fastest = min(per_flop)
    slower = {layout: own / fastest for layout, own in zip(layouts, per_flop, strict=True)}
    return {
        "flops_per_s": 1 / fastest,
        "read_bytes_per_s": 1 / max(per_read, _FREE),
        "write_bytes_per_s": 1 / max(per_written, _FREE),
        "launch_s": max(launch, _FREE),
        **{f"slower_{layout}": slower.get(layout, 1.0) for layout in ("nn", "nt", "tn")},
    }


def _features(matmuls: Sequence[MatMul], layouts: Sequence[str]) -> torch.Tensor:
    """What the time of every product is a sum of: FLOPs (by layout, if any are given), the rest."""
    rows = []
    for m in matmuls:
        flops = float(m.cost.flops)
        apart = [flops * (m.layout == layout) for layout in layouts] or [flops]
        rows.append([*apart, float(m.read), float(m.written), 1.0])
    return torch.tensor(rows, dtype=torch.float64)


def _solved(relative: torch.Tensor, positive: int) -> list[float] | None:
    """The coefficients that bring every row closest to 1; None if the first ones would vanish."""
    scale = relative.norm(dim=0)  # sizes of features differ by many orders of magnitude
    relative = relative / scale
    count = relative.shape[1]
    ones = torch.ones(len(relative), 1, dtype=relative.dtype)
    best, least = None, torch.inf
    # So few coefficients that every choice of which are zero can be tried.
    for others in chain.from_iterable(combinations(range(positive, count), k) for k in range(4)):
        columns = [*range(positive), *others]
        solved = torch.linalg.lstsq(relative[:, columns], ones, driver="gelsd").solution[:, 0]
        error = (relative[:, columns] @ solved - 1).norm().item()
        if (solved >= 0).all() and (solved[:positive] > 0).all() and error < least:
            best, least = torch.zeros(count, dtype=relative.dtype), error
            best[columns] = solved
    if best is None:
        return None
    coefficients: list[float] = (best / scale).tolist()
    return [*(max(c, _FREE) for c in coefficients[:positive]), *coefficients[positive:]]
