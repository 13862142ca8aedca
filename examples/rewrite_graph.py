"""Rewrite one graph: a LoRA layer that is written without a library.

Run it with ``python examples/rewrite_graph.py``.
"""

import torch
from torch import Tensor, nn

import runlora_fx


class LoraLinear(nn.Module):
    """``Y = X W' + s (X A') B'``, written literally."""

    def __init__(self, features_in: int, features_out: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.base = nn.Linear(features_in, features_out)
        self.down = nn.Linear(features_in, rank, bias=False)
        self.up = nn.Linear(rank, features_out, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        return self.base(x) + self.scaling * self.up(self.down(x))


def main() -> None:
    """Rewrite the layer and print what changed."""
    torch.manual_seed(0)
    layer = LoraLinear(256, 256, rank=16, scaling=2.0)
    x = torch.randn(4, 128, 256)

    # The forward alone. 512 tokens are more than 256 * 256 / (256 + 256), so the weight is merged.
    traced = torch.fx.symbolic_trace(layer)
    rewritten = runlora_fx.rewrite(traced, (x,))
    print(rewritten.code)
    print(runlora_fx.last_report())
    torch.testing.assert_close(rewritten(x), layer(x), rtol=1e-4, atol=1e-4)

    # Forward and backward together: what `torch.compile(layer, backend="runlora")` would run.
    joint = runlora_fx.joint_graph(layer, (x,))
    print(joint.code)
    print(runlora_fx.last_report())


if __name__ == "__main__":
    main()
