"""A market of small PEFT models with random weights: what a rewritten graph is compared on.

A new model is one entry in `MODELS`; it inherits every test that runs over the registry. All have
two layers of hidden size 64, and more tokens than in * out / (in + out) of each adapted layer that
sees the whole sequence, so that merging W + s B A pays. Everything is made from seeds: two calls
with the same arguments return equal weights and equal inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

Batch = Mapping[str, Tensor]

HIDDEN, FFN, LAYERS, HEADS = 64, 128, 2, 4
VOCAB, LABELS = 96, 5
SEQUENCE = 48
# W ~ 1/sqrt(HIDDEN) keeps activations of order one through the layers; B is small, but not PEFT's
# zero, with which all gradients of A vanish.
WEIGHT_STD, LORA_B_STD = HIDDEN**-0.5, 0.02


@dataclass(frozen=True)
class Case:
    """One model of the market.

    Attributes:
        base: Builds the model without adapters; its weights come from torch's global seed.
        inputs: Makes one batch, labels included, from a generator.
        targets: Names of the adapted layers, as `LoraConfig.target_modules` takes them.
        conv1d: The adapted layers are GPT-2's `Conv1D`, which store W as [in, out].
    """

    base: Callable[[], PreTrainedModel]
    inputs: Callable[[torch.Generator], dict[str, Tensor]]
    targets: tuple[str, ...]
    conv1d: bool = False

    def model(
        self,
        rank: int,
        dtype: torch.dtype = torch.float32,
        *,
        adapter_dtype: torch.dtype | None = None,
        seed: int = 0,
        **lora: Any,
    ) -> PeftModel:
        """The model, in training mode, with LoRA adapters on all `targets`.

        Args:
            rank: LoRA rank r.
            dtype: Element type of the weights; buffers stay in fp32.
            adapter_dtype: Element type of the adapters, `dtype` by default.
            seed: Seed of the weights.
            **lora: Further options of `LoraConfig`.
        """
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=16,
            target_modules=list(self.targets),
            fan_in_fan_out=self.conv1d,
            **lora,
        )
        model = get_peft_model(self.base(), config)
        randomise_lora_b(model)
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(adapter_dtype or dtype if "lora_" in name else dtype)
        if dtype == torch.float64:
            _without_float_casts(model)
        return model.train()

    def batch(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, Tensor]:
        """One batch with labels; floating inputs (images) in `dtype`."""
        batch = self.inputs(torch.Generator().manual_seed(seed))
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Dotted name -> adapted layer (`Linear` or `Conv1D` base)."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and m.lora_A}


def randomise_lora_b(model: nn.Module) -> None:
    """Replace PEFT's zero B of every adapter by N(0, LORA_B_STD^2)."""
    for layer in lora_layers(model).values():
        for up in layer.lora_B.values():
            nn.init.normal_(up.weight, std=LORA_B_STD)


def _without_float_casts(model: PeftModel) -> None:
    """Remove the casts to fp32 that transformers has in Llama's norm and in the causal loss.

    With them a double-precision model rounds to single precision on its way, and two evaluations
    that differ by 1e-16 may end up 1e-7 apart.
    """
    base = model.get_base_model()
    if type(base).__name__.endswith("ForCausalLM") or isinstance(base, GPT2LMHeadModel):
        base.loss_function = _causal_loss
    for parent in list(base.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)


def _causal_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _tokens(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCAB, (batch, SEQUENCE), generator=generator)


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(2, generator)
    return {"input_ids": tokens, "labels": tokens}


def _labelled_text(generator: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(0, LABELS, (3,), generator=generator)
    return {"input_ids": _tokens(3, generator), "labels": labels}


def _images(generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 48, 48, generator=generator)  # 6 x 6 patches and one class token
    return {"pixel_values": pixels, "labels": torch.randint(0, LABELS, (3,), generator=generator)}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=SEQUENCE,
            initializer_range=WEIGHT_STD,
            use_cache=False,
        )
    )


def _gpt2() -> PreTrainedModel:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_inner=FFN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=SEQUENCE,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=WEIGHT_STD,
            use_cache=False,
        )
    )
    model.loss_type = "ForCausalLM"  # else a warning is logged, which breaks the graph
    return model


def _roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=SEQUENCE + 2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=WEIGHT_STD,
            num_labels=LABELS,
            problem_type="single_label_classification",  # the first call would set it: a recompile
        )
    )


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=SEQUENCE,
            dropout=0.0,
            init_std=WEIGHT_STD,
            use_cache=False,
        )
    )


def _vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            image_size=48,
            patch_size=8,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=WEIGHT_STD,
            num_labels=LABELS,
            problem_type="single_label_classification",  # the first call would set it: a recompile
        )
    )


_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MODELS: dict[str, Case] = {
    "llama": Case(_llama, _text, _GATED),
    "gpt2": Case(_gpt2, _text, ("c_attn", "c_proj", "c_fc"), conv1d=True),
    # "dense" also adapts the classifier's first layer, which sees one token per sequence.
    "roberta": Case(_roberta, _labelled_text, ("query", "key", "value", "dense")),
    "opt": Case(_opt, _text, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "vit": Case(_vit, _images, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")),
}
