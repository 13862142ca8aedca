"""QLoRA: adapters on weights that bitsandbytes keeps in 4 bits.

Run it with ``python examples/qlora.py [BACKEND]``; needs ``pip install '.[demo]' bitsandbytes``.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
"""

import sys

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn

import runlora_fx


def quantised(linear: nn.Linear) -> Linear4bit:
    """The layer with its weight in 4 bits (NF4)."""
    layer = Linear4bit(
        linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to("cpu")


def main(backend: str = "runlora") -> None:
    """Train adapters on two quantised layers."""
    torch.manual_seed(0)
    first, second = quantised(nn.Linear(128, 256)), quantised(nn.Linear(256, 128))
    base = nn.Sequential(first, nn.GELU(), second)
    base.is_loaded_in_4bit = True  # as transformers marks a model that it loads in 4 bits
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2"]))
    model.compile(backend=backend)
    x, target = torch.randn(1024, 128), torch.randn(1024, 128)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.4f}")
    # The search decides where a weight is unpacked, because unpacking has a price.
    print(runlora_fx.report_of(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
