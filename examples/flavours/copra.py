"""CopRA and CoTo: whole adapters are dropped at random, fewer as training goes on.

Zhuang et al., "CopRA: A Progressive LoRA Training Strategy", arXiv 2410.22911, section 3, and
"Come Together, But Not Right Now", arXiv 2506.05713, equation (2): in layer l, at every step,

    y = W x + d_l s B A x,    d_l ~ Bernoulli(p),   p rises linearly from p0 to 1

The drop d can be a tensor: a training step stays one graph. Or a Python flag, as in the authors'
code: a dropped adapter costs nothing, and the compiler makes one graph for every combination of
flags that it meets in one graph.
"""

import torch
from torch import Tensor, nn


class CopraLinear(nn.Module):
    """A linear layer whose adapter can be dropped.

    Args:
        base: The layer to adapt; it is frozen.
        rank: Rank r of the adapter.
        as_flag: Whether the drop is a Python flag; a tensor otherwise.
        scaling: Factor of the adapter, alpha / r.
    """

    def __init__(
        self, base: nn.Linear, rank: int, *, as_flag: bool = False, scaling: float = 1.0
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.as_flag, self.scaling = as_flag, scaling
        self.active = True
        self.register_buffer("gate", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        if self.as_flag:
            if not self.active:
                return self.base(x)
            return self.base(x) + self.scaling * (x @ self.a.t() @ self.b.t())
        return self.base(x) + (self.gate * self.scaling) * (x @ self.a.t() @ self.b.t())


def draw(model: nn.Module, p: float, generator: torch.Generator) -> None:
    """Draw the drops of the next step: every adapter stays with probability p.

    At least one stays, as in the authors' code.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CopraLinear)]
    stays = torch.rand(len(layers), generator=generator) < p
    while not stays.any():
        stays = torch.rand(len(layers), generator=generator) < p
    for layer, active in zip(layers, stays.tolist(), strict=True):
        layer.active = active
        layer.gate.fill_(float(active))
