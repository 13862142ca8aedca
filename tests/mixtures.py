"""Tiny mixtures of experts of transformers, with PEFT's adapters on their weights."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

HIDDEN, FFN, EXPERTS, RANK, VOCAB = 64, 128, 4, 4, 96

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(intermediate_size=FFN, num_local_experts=EXPERTS, **SMALL)
    return transformers.MixtralForCausalLM(config)


def _qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=FFN,
        **SMALL,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    """Weights as (experts, in, out), with biases."""
    config = transformers.GptOssConfig(
        intermediate_size=FFN,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=0,
        **SMALL,
    )
    return transformers.GptOssForCausalLM(config)


MODELS = {"mixtral": _mixtral, "qwen3-moe": _qwen, "gpt-oss": _gpt_oss}


def adapted(name: str, experts: str) -> nn.Module:
    """A model in training mode, with experts that are multiplied in a given way."""
    torch.manual_seed(0)
    base = MODELS[name]()
    base.set_experts_implementation(experts)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(base, config)
    for parameter, weight in model.named_parameters():
        if "lora_B" in parameter:
            nn.init.normal_(weight, std=0.05)
    return model.train()


def batch(tokens: int = 8) -> dict[str, Tensor]:
    """Two sequences of a number of tokens."""
    ids = torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}
