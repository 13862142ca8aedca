"""Layers of real models with LoRA on all of their projections, for `runlora gain` and benchmarks.

    model_of(Recipe(dropout=0.05), SHAPES["Llama-3-8B"].scaled(4), META, is_adapted=True)

Invariant: data is random. Nothing is loaded, and nothing is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeRotaryEmbedding,
)
from transformers.models.vit.modeling_vit import ViTLayer

from runlora_fx.cli.without_weights import on_meta


@dataclass(frozen=True)
class Shape:
    """A layer of a real model.

    Attributes:
        width: Of the residual stream.
        inner: Of the feed-forward part.
        heads: Of attention.
        groups: Heads of keys and values.
        experts: Of the feed-forward part; 0 if it is dense.
        picked: How many experts a token picks.
    """

    width: int
    inner: int
    heads: int
    groups: int
    experts: int = 0
    picked: int = 2

    def scaled(self, by: int) -> Shape:
        """The same proportions, divided."""
        heads, groups = max(1, self.heads // by), max(1, self.groups // by)
        widths = {"width": self.width // by, "inner": self.inner // by}
        return replace(self, heads=heads, groups=groups, **widths)


SHAPES = {
    "Llama-3-8B": Shape(4096, 14336, 32, 8),
    "Qwen2.5-7B": Shape(3584, 18944, 28, 4),
    "ViT-L": Shape(1024, 4096, 16, 16),
    "Mixtral-8x7B": Shape(4096, 14336, 32, 8, experts=8),
    "Qwen3-30B-A3B": Shape(2048, 768, 32, 4, experts=128, picked=8),
    "SmolLM2-135M": Shape(576, 1536, 9, 3),
}


@dataclass(frozen=True)
class Recipe:
    """One way to train a layer.

    Attributes:
        shape: The layer.
        rank: Of the adapters.
        rows: Sequences.
        length: Tokens of each.
        dropout: Of the adapters' inputs.
        autocast: Whether the adapters are in float32, and the step runs under autocast.
        dora: Whether the weights are decomposed.
        checkpointed: Whether the layer is checkpointed.
        quantised: Whether base weights are 4-bit numbers that the graph dequantises.
    """

    shape: str = "Llama-3-8B"
    rank: int = 16
    rows: int = 4
    length: int = 2048
    dropout: float = 0.0
    autocast: bool = False
    dora: bool = False
    checkpointed: bool = False
    quantised: bool = False


class Layer(nn.Module):
    """One decoder layer, from the residual stream to the residual stream."""

    def __init__(self, name: str, shape: Shape, checkpointed: bool) -> None:
        """Make the layer of a model that transformers knows."""
        super().__init__()
        self.checkpointed = checkpointed
        self.rotary: nn.Module | None = None
        sizes = {
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": 1,
        }
        if name == "ViT-L":
            config: Any = transformers.ViTConfig(**sizes)
            config._attn_implementation = "sdpa"
            self.layer: nn.Module = ViTLayer(config)
            return
        sizes["num_key_value_heads"] = shape.groups
        made: Any = LlamaDecoderLayer, LlamaRotaryEmbedding
        if shape.experts:
            sizes["num_experts_per_tok"] = shape.picked
        if name.startswith("Qwen3"):
            sizes |= {"moe_intermediate_size": shape.inner, "head_dim": 128}
            config = transformers.Qwen3MoeConfig(num_experts=shape.experts, **sizes)
            made = Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding
        elif shape.experts:
            config = transformers.MixtralConfig(num_local_experts=shape.experts, **sizes)
            made = MixtralDecoderLayer, MixtralRotaryEmbedding
        elif name.startswith("Qwen"):
            config = transformers.Qwen2Config(**sizes)
            made = Qwen2DecoderLayer, Qwen2RotaryEmbedding
        else:
            config = transformers.LlamaConfig(**sizes)
        if shape.experts:
            config._experts_implementation = "grouped_mm"
        config._attn_implementation = "sdpa"
        self.layer, self.rotary = made[0](config, 0), made[1](config)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """The layer's output for x (rows, length, width)."""
        given: dict[str, Any] = {}
        if self.rotary is not None:
            given["position_embeddings"] = self.rotary(x, positions)
        if self.checkpointed:
            made = checkpoint(self.layer, x, use_reentrant=False, **given)
        else:
            made = self.layer(x, **given)
        result: Tensor = made[0] if isinstance(made, tuple) else made
        return result


class Quantised(nn.Module):
    """A linear layer of 4-bit numbers with a scale and a zero point for 64 of them, as HQQ's.

    It stands for QLoRA's layers. The graph dequantises the weight where it is used, so the bytes
    are those of any kernel that writes the weight before it multiplies.
    """

    GROUP = 64

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Take the shape of a layer; the numbers are random."""
        super().__init__()
        weight = linear.weight
        count = weight.numel()
        self.shape, self.bias = weight.shape, linear.bias
        packed = torch.randint(256, (count // 2 // self.GROUP, self.GROUP), device=weight.device)
        scale = torch.full((count // self.GROUP, 1), 0.1 / self.shape[1] ** 0.5).to(weight)
        self.register_buffer("packed", packed.to(torch.uint8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.full_like(scale, 7.5))

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        numbers = torch.cat([self.packed >> 4, self.packed & 15]).to(self.scale.dtype)
        weight = ((numbers - self.zero) * self.scale).reshape(self.shape)
        return nn.functional.linear(x, weight, self.bias)


def quantise(model: nn.Module) -> None:
    """Put 4-bit layers in the place of all linear layers but those of adapters."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and "lora_" not in name and name != "default":
                setattr(module, name, Quantised(child))


def adapters_of(recipe: Recipe, shape: Shape) -> LoraConfig:
    """PEFT's adapters on all projections, and on all experts."""
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if shape.experts:
        targets = {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        }
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=recipe.dropout,
        use_dora=recipe.dora,
        **targets,
    )


def model_of(recipe: Recipe, shape: Shape, device: torch.device, *, is_adapted: bool) -> nn.Module:
    """A layer in bfloat16, in training mode; on the meta device it has no data."""
    with on_meta(torch.bfloat16, device):
        layer = Layer(recipe.shape, shape, recipe.checkpointed).requires_grad_(False)
        if is_adapted:
            # PEFT leaves adapters in the weights' dtype or casts them to float32.
            config = adapters_of(recipe, shape)
            layer = get_peft_model(layer, config, autocast_adapter_dtype=recipe.autocast)
        if recipe.quantised:
            quantise(layer)
    return layer.train()
