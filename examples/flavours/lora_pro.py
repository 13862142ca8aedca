"""LoRA-Pro: adapter gradients corrected towards the gradient of full fine-tuning.

Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242. With the
adapted weight ``W + s B A``, B (m, r), A (r, n), theorem 2.1 replaces the gradients by

    gA <- (B'B)^-1 gA / s^2 + X A
    gB <- [I - B (B'B)^-1 B'] gB (A A')^-1 / s^2 - B X

and theorem 2.3 chooses X (r, r) as the solution of ``B'B X + X A A' = -(B'B)^-1 gA A' / s^2``. The
functions multiply from left to right, as the formulas and the authors' code do: the projector
``I - B (B'B)^-1 B'`` is built as an (m, m) matrix. Right to left, O(m r^2) would do.
"""

import torch
from torch import Tensor

#: Added to the diagonals before they are inverted, as in the authors' code.
DELTA = 1e-8


def corrected(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float) -> list[Tensor]:
    """The corrected gradients of A and B, with X = 0.

    Args:
        a: A (r, n).
        b: B (m, r).
        grad_a: Gradient of A (r, n).
        grad_b: Gradient of B (m, r).
        scaling: s.
    """
    return _corrected(b, inverse(a @ a.T), inverse(b.T @ b), grad_a, grad_b, scaling)


def corrected_by_sylvester(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float
) -> list[Tensor]:
    """The corrected gradients of A and B, with X from theorem 2.3."""
    gram_a, gram_b = a @ a.T, b.T @ b
    inverse_a, inverse_b = inverse(gram_a), inverse(gram_b)
    x = solve_sylvester(gram_b, gram_a, -(inverse_b @ grad_a @ a.T) / scaling**2)
    grad_a, grad_b = _corrected(b, inverse_a, inverse_b, grad_a, grad_b, scaling)
    return [grad_a + x @ a, grad_b - b @ x]


def inverse(gram: Tensor) -> Tensor:
    """The inverse of ``A A'`` or ``B'B``."""
    shift = DELTA * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.inv(gram + shift)


def solve_sylvester(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """The X with ``P X + X Q = C``, for symmetric P and Q."""
    values_p, vectors_p = torch.linalg.eigh(p)
    values_q, vectors_q = torch.linalg.eigh(q)
    rotated = vectors_p.T @ c @ vectors_q
    return vectors_p @ (rotated / (values_p[:, None] + values_q[None, :])) @ vectors_q.T


def _corrected(
    b: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
) -> list[Tensor]:
    """Equations of theorem 2.1 without X, from left to right."""
    projector = torch.eye(b.shape[0], dtype=b.dtype, device=b.device) - b @ inverse_b @ b.T
    return [
        inverse_b @ grad_a / scaling**2,
        projector @ grad_b @ inverse_a / scaling**2,
    ]
