"""Pretraining with low-rank updates: every few steps the adapters are merged and begin again.

Run it with ``python examples/relora.py [BACKEND]``; needs ``pip install '.[demo]'``.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695.
"""

import sys

import torch
from flavours.relora import merge_and_restart
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import runlora_fx


def main(backend: str = "runlora", restarts: int = 3, steps: int = 4) -> None:
    """Train, merge, begin again; nothing is compiled twice."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config), adapters)
    model.compile(backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(256, (4, 64))
    for restart in range(restarts):
        for _ in range(steps):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # In place, so the compiled code reads the new weights.
        merge_and_restart(model, optimizer)
        print(f"round {restart + 1}: loss {loss.item():.4f}")
    print(f"graphs compiled: {counters['stats']['unique_graphs']}")
    print(runlora_fx.report_of(model).verdict)


if __name__ == "__main__":
    main(*sys.argv[1:])
