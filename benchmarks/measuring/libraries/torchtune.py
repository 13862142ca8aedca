"""torchtune: ``LoRALinear``."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import torch
from torch import nn

from measuring.libraries import Adapted

NEEDS = "torchtune"

_BEFORE = "torchao.dtypes.nf4tensor"
_NOW = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"


def layer(adapted: Adapted) -> nn.Module:
    """The layer of torchtune's with the same numbers."""
    # torchtune 0.6 looks for NF4 where torchao had it before 0.18.
    if _BEFORE not in sys.modules and find_spec("torchao") is not None:
        sys.modules[_BEFORE] = importlib.import_module(_NOW)
    from torchtune.modules.peft import LoRALinear

    base = adapted.base
    with torch.device(base.weight.device):
        made = LoRALinear(
            base.in_features,
            base.out_features,
            adapted.rank,
            adapted.alpha,
            adapted.dropout,
            use_bias=base.bias is not None,
        )
    made.weight, made.bias = base.weight, base.bias
    made.lora_a.weight = nn.Parameter(adapted.a.clone())
    made.lora_b.weight = nn.Parameter(adapted.b.clone())
    return made
