"""Flora: gradients that are accumulated, and momenta that are kept, in a random subspace.

Hao et al., "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", arXiv 2402.03293. For a
weight W (m, n) with gradient ``G = dY' X`` and a random P (r, n):

    C <- C + G P'                    algorithm 1: accumulation
    W <- W - lr C P                  its update
    M <- M P_old P_new'              algorithm 2: momentum, where P is drawn anew
    M <- b M + (1 - b) G P'

The functions follow the algorithms from left to right: they build G, and ``M P_old``, both (m, n).
Where G's own backward is in the same graph, ``dY' (X P')`` and ``M (P_old P_new')`` would do.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def project(gradient: Tensor, projection: Tensor) -> Tensor:
    """``G P'`` (m, r): what is kept of a gradient."""
    return gradient @ projection.T


def update(weight: Tensor, compressed: Tensor, projection: Tensor, lr: float) -> Tensor:
    """``W - lr C P``: the decompressed step."""
    return weight - lr * (compressed @ projection)


def resample(momentum: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """``(M P_old) P_new'``: a momentum moved into another subspace."""
    return momentum @ old @ new.T


def momentum_step(momentum: Tensor, gradient: Tensor, projection: Tensor, beta: float) -> Tensor:
    """``b M + (1 - b) G P'``."""
    return beta * momentum + (1 - beta) * project(gradient, projection)


Loss = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]


def mlp_loss(weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
    """The loss of two linear layers with a GELU in between."""
    hidden = F.gelu(F.linear(x, weights["up"], weights["up_bias"]))
    return F.mse_loss(F.linear(hidden, weights["down"]), target)


def accumulate(
    weights: dict[str, Tensor],
    kept: dict[str, Tensor],
    projections: dict[str, Tensor],
    x: Tensor,
    target: Tensor,
    loss: Loss = mlp_loss,
) -> dict[str, Tensor]:
    """Forward, backward and projection of one micro-batch: algorithm 1, line 5.

    Args:
        weights: The model's weights.
        kept: C of every projected weight.
        projections: P of the same weights.
        x: Inputs.
        target: Targets.
        loss: The model and its loss.

    Returns:
        The new C of every projected weight.
    """
    gradients = torch.func.grad(loss)(weights, x, target)
    return {name: c + project(gradients[name], projections[name]) for name, c in kept.items()}
