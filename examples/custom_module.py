"""A LoRA layer of your own: no library is needed, the backend reads what the code computes.

Run it with ``python examples/custom_module.py``.
"""

import torch
from torch import Tensor, nn

import runlora_fx


class LoraLinear(nn.Module):
    """``Y = X W' + b + s (X A') B'``, as one of many ways to write it."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float = 2.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        update = torch.einsum("...i,ri,or->...o", x, self.a, self.b)
        return self.base(x) + self.scaling * update


def main() -> None:
    """Train two such layers eagerly and compiled, from the same weights."""
    losses = {}
    for backend in ("eager", "runlora"):
        torch.manual_seed(0)
        layers = (LoraLinear(nn.Linear(128, 128), rank=8) for _ in range(2))
        first, second = layers
        model = nn.Sequential(first, nn.GELU(), second)
        if backend != "eager":
            model.compile(backend=backend)
        x, target = torch.randn(4, 128, 128), torch.randn(4, 128, 128)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[backend] = []
        for _ in range(5):
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[backend].append(loss.item())
        print(backend, *(f"{loss:.4f}" for loss in losses[backend]))
    torch.testing.assert_close(losses["runlora"], losses["eager"], rtol=1e-4, atol=1e-5)
    print(runlora_fx.report_of(model))


if __name__ == "__main__":
    main()
