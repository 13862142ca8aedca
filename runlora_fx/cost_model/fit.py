"""Calibration: from measured products to the rates of a machine profile."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, combinations

import torch

from runlora_fx.cost_model.ops import GemmShape, MatMul

#: Stands for "costs nothing" where the fit finds no cost for a byte or a launch.
_FREE = 1e-18


def fit_rates(products: Mapping[GemmShape, float], itemsize: int) -> dict[str, float]:
    """The rates that predict measured products best, in the sense of least squared relative error.

    ``seconds = c0 FLOPs + c1 bytes read + c2 bytes written + c3``, with no coefficient negative and
    a FLOP never free.

    Args:
        products: Times of products [s].
        itemsize: Element width [B].

    Returns:
        ``flops_per_s``, ``read_bytes_per_s``, ``write_bytes_per_s`` and ``launch_s``.

    Raises:
        ValueError: If there are fewer products than coefficients.
    """
    if len(products) < 4:
        raise ValueError(f"needs 4 products or more, got {len(products)}")
    matmuls = [MatMul(*shape[:4], itemsize) for shape in products]
    features = torch.tensor(
        [[float(x) for x in (m.cost.flops, m.read, m.written, 1)] for m in matmuls],
        dtype=torch.float64,
    )
    times = torch.tensor(list(products.values()), dtype=torch.float64)
    relative = features / times[:, None]
    # Sizes of features differ by many orders of magnitude.
    scale = relative.norm(dim=0)
    relative, ones = relative / scale, torch.ones(len(matmuls), 1, dtype=torch.float64)
    best, least = torch.zeros(4, dtype=torch.float64), torch.inf
    # So few coefficients that every choice of which are zero can be tried.
    for others in chain.from_iterable(combinations((1, 2, 3), k) for k in range(4)):
        columns = [0, *others]
        solved = torch.linalg.lstsq(relative[:, columns], ones, driver="gelsd").solution[:, 0]
        error = (relative[:, columns] @ solved - 1).norm().item()
        if (solved >= 0).all() and solved[0] > 0 and error < least:
            best, least = torch.zeros(4, dtype=torch.float64), error
            best[columns] = solved
    per_flop, per_read, per_written, launch = (best / scale).tolist()
    return {
        "flops_per_s": 1 / max(per_flop, _FREE),
        "read_bytes_per_s": 1 / max(per_read, _FREE),
        "write_bytes_per_s": 1 / max(per_written, _FREE),
        "launch_s": max(launch, _FREE),
    }
