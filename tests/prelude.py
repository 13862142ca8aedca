"""What the code blocks of the documentation take for granted: a small model and its data.

A page's blocks run after this file, in one process and in the page's order. What a block defines
itself replaces these names.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import runlora_fx  # noqa: F401

config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    use_cache=False,
)
base = LlamaForCausalLM(config)
peft_model = model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))

tokens = torch.randint(64, (2, 64))
batch = {"input_ids": tokens, "labels": tokens}

layer = torch.nn.Linear(64, 64)
x = torch.randn(8, 64)
example_inputs = (x,)
gm = torch.fx.symbolic_trace(layer)
