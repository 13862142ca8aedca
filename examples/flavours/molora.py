"""MoLoRA: a mixture of adapters, weighted for every token by a router.

Zadouri et al., "Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for
Instruction Tuning", arXiv 2309.05444, section 2.3 (soft merging of the experts' outputs):

    y = W x + s sum_i g_i(x) B_i A_i x,    g(x) = softmax(G x)

The gates scale tokens: g_i (B_i A_i x) = B_i (g_i A_i x).
"""

from torch import Tensor, nn


class MoLoraLinear(nn.Module):
    """A linear layer with a mixture of adapters.

    Args:
        base: The layer to adapt; it is frozen.
        rank: Rank r of each adapter.
        experts: Their number.
        scaling: Factor of the adapters, alpha / r.
    """

    def __init__(self, base: nn.Linear, rank: int, experts: int, scaling: float = 1.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.router = nn.Linear(base.in_features, experts, bias=False)
        down = (nn.Linear(base.in_features, rank, bias=False) for _ in range(experts))
        up = (nn.Linear(rank, base.out_features, bias=False) for _ in range(experts))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        for expert in self.up:
            nn.init.zeros_(expert.weight)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        gates = self.router(x).softmax(dim=-1)
        y = self.base(x)
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + self.scaling * gates[..., i : i + 1] * up(down(x))
        return y
