"""Flavours with base weights that are quantised, stacked into experts, or picked by each sample.

They inherit the suite of `flavours.FLAVOURS`.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from flavours import RANK, TARGETS, Block, base, randomised, replaced, tokens
from peft import LoraConfig, get_peft_model
from per_sample import PerSampleLora, PerSampleLoraByEinsum
from quantised import gptq_lora, hqq_lora
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula
from trainings import Batch, Flavour

NF4_MODULE = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
# Scales of NF4 blocks are quantised themselves, in groups; 64 x 96 weights have 96 blocks.
SCALERS = 32


def quantised_by_bitsandbytes(nested: bool) -> nn.Module:
    """PEFT's adapters on bitsandbytes' 4-bit layers: QLoRA as most people run it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    _count_flops_of_gemm_4bit()

    def quantised(linear: nn.Linear) -> nn.Module:
        settings = {"quant_type": "nf4", "compress_statistics": nested}
        layer = Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=torch.float32, **settings
        )
        layer.weight = Params4bit(linear.weight.detach(), requires_grad=False, **settings)
        layer.bias = linear.bias
        return layer.to("cpu")

    model = replaced(quantised)
    model.is_loaded_in_4bit = True
    return peft_on(model)


def quantised_by_torchtune() -> nn.Module:
    """torchtune's own QLoRA: `LoRALinear(quantize_base=True)`, whose weight is an NF4 tensor."""
    _torchtune_finds_nf4()
    from torchtune.modules import peft as torchtune

    model = replaced(
        lambda x: torchtune.LoRALinear(
            x.in_features,
            x.out_features,
            rank=RANK,
            alpha=16.0,
            quantize_base=True,
            scaler_block_size=SCALERS,
        )
    )
    torchtune.set_trainable_params(model, torchtune.get_adapter_params(model))
    return randomised(model, "lora_b.weight")


def quantised_by_torchao(kind: str) -> nn.Module:
    """PEFT's adapters on weights that are torchao's tensors."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = base().requires_grad_(False)
    if kind == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    else:
        to_nf4 = importlib.import_module(NF4_MODULE).to_nf4
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                weight = to_nf4(layer.weight.detach(), scaler_block_size=SCALERS)
                layer.weight = nn.Parameter(weight, requires_grad=False)
    return peft_on(model)


def peft_on(model: nn.Module) -> nn.Module:
    """The model with PEFT's adapters; B is not zero."""
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)
    model = get_peft_model(model, config)
    return randomised(model, "lora_B.default.weight").train()


def quantised_in_the_graph(make: Callable[[nn.Linear, int], nn.Module]) -> nn.Module:
    return replaced(lambda linear: make(linear, RANK))


class PerSample(nn.Module):
    """Two layers whose adapters every sample picks."""

    def __init__(self, kind: type[PerSampleLora]) -> None:
        super().__init__()
        block = Block()
        self.up, self.down = (kind(layer, 3, RANK) for layer in (block.up, block.down))

    def forward(self, input: Tensor, chosen: Tensor) -> Tensor:
        return input + self.down(nn.functional.gelu(self.up(input, chosen)), chosen)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train: NF4 tensors cannot all be cloned."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def chosen() -> Batch:
    return {**tokens(), "chosen": torch.tensor([2, 0])}


def _torchtune_finds_nf4() -> None:
    """torchtune 0.6 imports NF4 from where torchao had it before 0.18."""
    sys.modules.setdefault("torchao.dtypes.nf4tensor", importlib.import_module(NF4_MODULE))


def _count_flops_of_gemm_4bit() -> None:
    """Tell torch's FLOP counter what bitsandbytes' operator multiplies."""
    operator = torch.ops.bitsandbytes.gemm_4bit
    if operator not in flop_registry:

        @register_flop_formula(operator)
        def flops(x: Any, packed: Any, shape: Any, *_: Any, **__: Any) -> int:
            rows = 1
            for size in x[:-1]:
                rows *= size
            return 2 * rows * shape[0] * shape[1]


QUANTISED: dict[str, Flavour] = {
    "QLoRA, bitsandbytes NF4": Flavour(
        "PEFT and bitsandbytes; arXiv 2305.14314",
        partial(quantised_by_bitsandbytes, False),
        tokens,
        needs=("bitsandbytes",),
        kernels=True,
    ),
    "QLoRA, bitsandbytes NF4, quantised scales": Flavour(
        "PEFT and bitsandbytes; arXiv 2305.14314",
        partial(quantised_by_bitsandbytes, True),
        tokens,
        needs=("bitsandbytes",),
    ),
    "QLoRA, torchtune": Flavour(
        "torchtune and torchao; arXiv 2305.14314",
        quantised_by_torchtune,
        tokens,
        compared=trained,
        needs=("torchtune", "torchao"),
    ),
    "QLoRA, torchao NF4": Flavour(
        "PEFT and torchao",
        partial(quantised_by_torchao, "nf4"),
        tokens,
        compared=trained,
        needs=("torchao",),
    ),
    "LoRA on torchao int8": Flavour(
        "PEFT and torchao",
        partial(quantised_by_torchao, "int8"),
        tokens,
        compared=trained,
        needs=("torchao",),
    ),
    "QLoRA, dequantised as HQQ": Flavour(
        "examples/flavours/quantised.py",
        partial(quantised_in_the_graph, hqq_lora),
        tokens,
    ),
    "QLoRA, dequantised as GPTQ": Flavour(
        "examples/flavours/quantised.py; arXiv 2210.17323",
        partial(quantised_in_the_graph, gptq_lora),
        tokens,
    ),
    **{
        f"adapters per sample, {how}": Flavour(
            "examples/flavours/per_sample.py; arXiv 2312.05677",
            partial(PerSample, kind),
            chosen,
            expects="alone",
            why="the base product is one for the batch, the adapters are one for each sample",
        )
        for how, kind in (("bmm", PerSampleLora), ("einsum", PerSampleLoraByEinsum))
    },
}
