"""ResLoRA: shortcuts between the adapters of successive layers.

Shi et al., "ResLoRA: Identity Residual Mapping in Low-Rank Adaption", arXiv 2402.18039, section
3.2; ``prev`` is the adapted layer of the same kind in the block before:

    input shortcut    y = W x + s B A (x + x_prev)
    block shortcut    y = W x + s (B A x + sum over prev of B_prev A_prev x)
    middle shortcut   y = W x + s B (A x + sum over prev of A_prev x_prev)

The first layer has no ``prev``; there the input shortcut adds x to itself, as in the authors' code.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Shortcut = Literal["input", "block", "middle"]


class ResLoraLinear(nn.Module):
    """A linear layer with an adapter that knows the one before.

    Args:
        base: The layer to adapt; it is frozen.
        rank: Rank r of the adapter.
        shortcut: Where the shortcut is.
        before: The adapted layer of the same kind and widths in the block before, if any.
        reach: How many layers before take part in block and middle shortcuts.
        scaling: Factor of the adapter, alpha / r.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        shortcut: Shortcut,
        before: "ResLoraLinear | None" = None,
        reach: int = 2,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.shortcut, self.scaling = shortcut, scaling
        # In a list: the layers before are not submodules of this one.
        self.before = [before, *before.before][:reach] if before is not None else []
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``; layers run in the order of their blocks."""
        if self.shortcut == "input":
            delta = (x + (self.before[0].seen if self.before else x)) @ self.a.t() @ self.b.t()
            self.seen = x
        elif self.shortcut == "block":
            delta = x @ self.a.t() @ self.b.t()
            for layer in self.before:
                delta = delta + x @ layer.a.t() @ layer.b.t()
        else:
            self.seen = inner = x @ self.a.t()
            for layer in self.before:
                inner = inner + layer.seen
            delta = inner @ self.b.t()
        return self.base(x) + self.scaling * delta
