"""One batch, many adapters: every sample picks its own low-rank pair from stacked tables.

The gathered batched products of multi-adapter serving: Chen et al., "Punica: Multi-Tenant LoRA
Serving", arXiv 2310.18547, and Sheng et al., "S-LoRA", arXiv 2311.03285; in training, Wen and
Chaudhuri, "Batched Low-Rank Adaptation of Foundation Models" (FLoRA), arXiv 2312.05677.

    Y[b] = X[b] W' + s (X[b] A[k(b)]') B[k(b)]'
"""

import torch
from torch import Tensor, nn


class PerSampleLora(nn.Module):
    """A linear layer with a table of adapters."""

    def __init__(self, linear: nn.Linear, adapters: int, rank: int, scaling: float = 2.0) -> None:
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(adapters, rank, linear.in_features) / rank)
        self.lora_B = nn.Parameter(torch.randn(adapters, linear.out_features, rank) * 0.02)
        self.scaling = scaling

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """``x (batch, tokens, in)`` with ``chosen (batch,)`` to ``(batch, tokens, out)``."""
        down, up = self.lora_A[chosen], self.lora_B[chosen]
        return self.base(x) + self.scaling * torch.bmm(torch.bmm(x, down.mT), up.mT)


class PerSampleLoraByEinsum(PerSampleLora):
    """The same, written with einsum."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """``x (batch, tokens, in)`` with ``chosen (batch,)`` to ``(batch, tokens, out)``."""
        low = torch.einsum("bti,bri->btr", x, self.lora_A[chosen])
        return self.base(x) + self.scaling * torch.einsum("btr,bor->bto", low, self.lora_B[chosen])
