"""Models of the paper's tables, cut to some of their layers, with random weights.

    task_of(PAPER["llama-250m, rank 256, fp32"], device)

The first layer's input has a gradient, as it has in the middle of a deep model: with few layers, a
frozen embedding before them would leave out a larger share of the backward than in the whole model.

Invariant: widths, heads and ranks are the model's own. What is cut is in ``Cut.about``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.vit.modeling_vit import ViTLayer

from measuring.steps import Task, randomise
from runlora_fx.cli.without_weights import on_meta


@dataclass(frozen=True)
class Cut:
    """A model and what is left of it.

    Attributes:
        kind: Of the model.
        width: Of the residual stream.
        inner: Of the feed-forward part.
        heads: Of attention.
        depth: Layers of the whole model.
        rank: Of the adapters, which are on all linear layers.
        dtype: Of weights and activations.
        rows: Sequences.
        length: Tokens of each.
        layers: How many layers are left.
    """

    kind: str
    width: int
    inner: int
    heads: int
    depth: int
    rank: int
    dtype: torch.dtype
    rows: int
    length: int
    layers: int = 2

    @property
    def about(self) -> str:
        """What is run of it."""
        return (
            f"{self.layers} of {self.depth} layers, {self.rows} x {self.length} tokens, "
            "no embeddings and no head, no dropout"
        )

    def shortened(self, tokens: int) -> Cut:
        """One layer, and at most so many tokens, in one sequence if one has as many."""
        length = min(tokens, self.length)
        rows = min(self.rows, max(1, tokens // length))
        return replace(self, layers=1, rows=rows, length=length)


#: The six models of the paper's tables 2 to 5.
PAPER: dict[str, Cut] = {
    "llama-250m, rank 256, fp32": Cut(
        "llama", 768, 2560, 16, 24, 256, torch.float32, rows=2, length=1024
    ),
    "llama-250m, rank 128, bf16": Cut(
        "llama", 768, 2560, 16, 24, 128, torch.bfloat16, rows=4, length=1024
    ),
    "opt-350m, rank 128, bf16": Cut(
        "opt", 1024, 4096, 16, 24, 128, torch.bfloat16, rows=2, length=2048
    ),
    "roberta-base, rank 128, fp32": Cut(
        "roberta", 768, 3072, 12, 12, 128, torch.float32, rows=4, length=512
    ),
    "roberta-large, rank 128, bf16": Cut(
        "roberta", 1024, 4096, 16, 24, 128, torch.bfloat16, rows=8, length=512
    ),
    "ViT-base, rank 32, fp32": Cut(
        "vit", 768, 3072, 12, 12, 32, torch.float32, rows=10, length=197
    ),
    "llama h 1024, rank 16, bf16": Cut(
        "llama", 1024, 4096, 16, 24, 16, torch.bfloat16, rows=4, length=1024
    ),
}


class Layers(nn.Module):
    """Some layers of a model, from the residual stream to the residual stream."""

    def __init__(self, layers: list[nn.Module], rotary: nn.Module | None) -> None:
        """Take the layers, and what makes their rotary embeddings."""
        super().__init__()
        self.layers, self.rotary = nn.ModuleList(layers), rotary

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """The output for x (rows, length, width) at positions (1, length)."""
        given: dict[str, Any] = {}
        if self.rotary is not None:
            given["position_embeddings"] = self.rotary(x, positions)
        for layer in self.layers:
            made = layer(x, None, **given)
            x = made[0] if isinstance(made, tuple) else made
        return x


@dataclass(frozen=True)
class _Kind:
    """Classes of transformers, and what they call their settings."""

    config: Any
    layer: Any
    settings: dict[str, Any] = field(default_factory=dict)
    rotary: Any = None
    inner: str = "intermediate_size"
    is_numbered: bool = True

    def made(self, cut: Cut) -> Layers:
        """The layers that are left of a model."""
        config = self.config(
            hidden_size=cut.width,
            num_attention_heads=cut.heads,
            num_hidden_layers=cut.layers,
            **{self.inner: cut.inner},
            **self.settings,
        )
        config._attn_implementation = "sdpa"
        numbers: list[tuple[int, ...]] = [(at,) * self.is_numbered for at in range(cut.layers)]
        layers = [self.layer(config, *number) for number in numbers]
        return Layers(layers, self.rotary and self.rotary(config))


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_KINDS: dict[str, _Kind] = {
    "llama": _Kind(transformers.LlamaConfig, LlamaDecoderLayer, rotary=LlamaRotaryEmbedding),
    "opt": _Kind(
        transformers.OPTConfig,
        OPTDecoderLayer,
        {"dropout": 0.0, "do_layer_norm_before": False},
        inner="ffn_dim",
    ),
    "roberta": _Kind(transformers.RobertaConfig, RobertaLayer, _NO_DROPOUT),
    "vit": _Kind(transformers.ViTConfig, ViTLayer, _NO_DROPOUT, is_numbered=False),
}


def task_of(cut: Cut, device: torch.device) -> Task:
    """A training step of a cut model, at a fixed seed."""
    torch.manual_seed(0)
    with on_meta(cut.dtype, device):
        frozen, base = (_KINDS[cut.kind].made(cut).requires_grad_(False) for _ in range(2))
        config = LoraConfig(r=cut.rank, lora_alpha=2 * cut.rank, target_modules="all-linear")
        adapted = get_peft_model(base, config, autocast_adapter_dtype=False)
    randomise(adapted)
    size = (cut.rows, cut.length, cut.width)
    x, dy = (torch.randn(size, dtype=cut.dtype, device=device) for _ in range(2))
    positions = torch.arange(cut.length, device=device)[None]
    return Task(adapted.train(), frozen.train(), (x.requires_grad_(), positions), dy)
