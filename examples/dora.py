"""DoRA: magnitude and direction are trained apart, and still one product with one weight remains.

Run it with ``python examples/dora.py [BACKEND]``; needs ``pip install '.[demo]'``.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import runlora_fx


def main(backend: str = "runlora") -> None:
    """Train a small network with DoRA, and say what was saved."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    model = get_peft_model(layers, LoraConfig(r=8, target_modules=["0", "2"], use_dora=True))
    x, target = torch.randn(512, 128), torch.randn(512, 128)

    # PEFT's DoRA looks at the type of its weight, which breaks the graph under other backends.
    # Under runlora a substitute that computes the same is traced (docs/integrations.md).
    model.compile(backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.4f}")
    print(runlora_fx.report_of(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
