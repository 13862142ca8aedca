"""LoRA-XS: only an r x r matrix trains, between frozen factors from the SVD of W.

Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
arXiv 2405.17604, equation (1) and section 3: with the truncated SVD ``W = U S V'`` (rank r)

    y = W x + A R B x,    A = U_r S_r (out, r),   B = V_r' (r, in),   R (r, r) trains

R starts from a Gaussian with standard deviation 1e-5.
"""

import torch
from torch import Tensor, nn


class LoraXsLinear(nn.Module):
    """A linear layer with a LoRA-XS adapter.

    Args:
        base: The layer to adapt; it is frozen.
        rank: Rank r of the adapter.
        scaling: Factor of the adapter, alpha / r.
        std: Standard deviation that R starts with.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float = 1.0, std: float = 1e-5) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        left, singular, right = torch.linalg.svd(base.weight.detach(), full_matrices=False)
        self.register_buffer("left", (left[:, :rank] * singular[:rank]).contiguous())
        self.register_buffer("right", right[:rank].contiguous())
        self.core = nn.Parameter(std * torch.randn(rank, rank))
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        return self.base(x) + self.scaling * (x @ self.right.t() @ self.core.t() @ self.left.t())
