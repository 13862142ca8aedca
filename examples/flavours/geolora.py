"""GeoLoRA: three factors whose rank follows the gradient.

Schotthöfer et al., "GeoLoRA: Geometric integration for parameter efficient fine-tuning", arXiv
2410.18720, Algorithm 1: the adapter is ``U S V'`` with orthonormal U and V,

    y = W x + s V S' U' x,    U (in, r),  S (r, r),  V (out, r)

and one step, from the gradients of U, S and V at the same point,

1. divides the gradients of U and V by S: these are the gradients of ``K = U S`` and ``L = V S'``;
2. augments the bases by them: U^ = orth[U | gK], V^ = orth[V | gL], of rank 2 r;
3. takes the gradient step in the augmented bases:

        S^ = [ S - h gS         (L - h gL)' V~ ]     with U~, V~ the new columns,
             [ U~' (K - h gK)         0        ]

4. truncates: the SVD ``S^ = P D Q'`` is cut where its tail falls below ``tau |D|``.

S is diagonal after every step, so dividing by it costs nothing.
"""

import torch
from torch import Tensor, nn


class GeoLoraLinear(nn.Module):
    """A linear layer with a rank-adaptive adapter.

    Args:
        base: The layer to adapt; it is frozen.
        rank: Rank to start from.
        scaling: Factor of the adapter.
        start: The singular values to start from.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scaling: float = 1.0, start: float = 0.1
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.u = nn.Parameter(torch.linalg.qr(torch.randn(base.in_features, rank))[0])
        self.v = nn.Parameter(torch.linalg.qr(torch.randn(base.out_features, rank))[0])
        self.s = nn.Parameter(start * torch.eye(rank))
        self.scaling = scaling

    @property
    def rank(self) -> int:
        """The present rank of the adapter."""
        return self.s.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        return self.base(x) + self.scaling * (x @ self.u @ self.s @ self.v.t())

    @torch.no_grad()
    def step(self, lr: float, tau: float, max_rank: int | None = None) -> None:
        """One step of Algorithm 1, in place of an optimizer's.

        Args:
            lr: Learning rate h.
            tau: The share of the singular values' norm that may be cut away.
            max_rank: The rank that truncation leaves at most; the smaller width by default.
        """
        if self.u.grad is None or self.v.grad is None or self.s.grad is None:
            raise RuntimeError("GeoLoRA's step needs the gradients of U, S and V")
        u, s, v, r = self.u, self.s, self.v, self.rank
        grad_k = torch.linalg.solve(s, self.u.grad, left=False)  # gU = gK S', and S is diagonal
        grad_l = torch.linalg.solve(s, self.v.grad, left=False)
        new_u = torch.linalg.qr(torch.cat((u, grad_k), dim=1))[0][:, r:]
        new_v = torch.linalg.qr(torch.cat((v, grad_l), dim=1))[0][:, r:]
        step_k, step_l = u @ s - lr * grad_k, v @ s.t() - lr * grad_l
        corner = s.new_zeros(new_u.shape[1], new_v.shape[1])
        upper = torch.cat((s - lr * self.s.grad, step_l.t() @ new_v), dim=1)
        lower = torch.cat((new_u.t() @ step_k, corner), dim=1)
        left, values, right = torch.linalg.svd(torch.cat((upper, lower)), full_matrices=False)

        tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
        kept = int((tails > tau * tails[0]).sum())
        kept = max(1, min(kept, max_rank or kept))
        self.u = nn.Parameter(torch.cat((u, new_u), dim=1) @ left[:, :kept])
        self.v = nn.Parameter(torch.cat((v, new_v), dim=1) @ right[:kept].t())
        self.s = nn.Parameter(torch.diag(values[:kept]))
