"""Plan for a device that you do not have: a large model without weights, an H100 or a 4090.

Run it with ``python examples/plan_for_a_device.py``; needs ``pip install '.[demo]'``.

Nothing is computed and nothing is measured: times are predicted from the rates that the makers of
the devices publish.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import runlora_fx


def build() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """One layer of the size of a Llama-3-8B's, and a batch; neither has data.

    `runlora explain examples/plan_for_a_device.py:build` takes what this returns.
    """
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
        adapters = LoraConfig(r=16, target_modules="all-linear")
        model = get_peft_model(base, adapters, autocast_adapter_dtype=False)
    tokens = torch.empty(4, 2048, dtype=torch.long, device="meta")
    return model, (), {"input_ids": tokens}


def main() -> None:
    """Explain the layer for two devices."""
    model, _, batch = build()
    for device in ("h100", "rtx4090"):
        print(f"{device}: {runlora_fx.explain(model, **batch, device=device).verdict}")


if __name__ == "__main__":
    main()
