"""Fine-tune a PEFT model: the only change is the name of the backend.

Run it with ``python examples/train_peft.py``; needs ``pip install 'runlora-fx[demo]'``.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import runlora_fx


def main(backend: str = "runlora", steps: int = 3) -> list[float]:
    """Train for some steps on one batch; returns the losses."""
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

    # In place, which keeps the names in the state dict. `torch.compile(model, backend=backend)`
    # works as well, and returns a wrapper.
    model.compile(backend=backend)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    tokens = torch.randint(256, (4, 64))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"loss {loss.item():.4f}")
    if (report := runlora_fx.last_report()) is not None:
        print(report)
    return losses


if __name__ == "__main__":
    main()
