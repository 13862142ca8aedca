"""The package of "Run LoRA Run" (arXiv 2312.03415), ``runlora``: its layer and its choice by FLOPs.

It ignores dropout and runs in eager mode, as its own benchmarks do.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch
from torch import nn

from measuring.libraries import Adapted

NEEDS = "runlora"

#: It computes X W + X U V, with U (in, rank) and V (rank, out).
IS_TURNED = True


def layer(adapted: Adapted) -> nn.Module:
    """The layer of the package's with the same numbers.

    Raises:
        ValueError: If the layer has dropout, which the package would ignore.
    """
    from runlora.modeling import RunLoRALinear
    from runlora.runlora import RunLoRACollection

    if adapted.dropout:
        raise ValueError("the package ignores dropout")
    base, rank = adapted.base, adapted.rank
    with torch.device("meta"), redirect_stdout(StringIO()):
        operator = RunLoRACollection().get_best(
            "flops",
            torch.empty(*adapted.inputs, base.in_features, requires_grad=True),
            torch.empty(base.in_features, base.out_features),
            torch.empty(base.in_features, rank, requires_grad=True),
            torch.empty(rank, base.out_features, requires_grad=True),
        )
    made = RunLoRALinear.from_linear(
        base,
        operator,
        quantization_config=None,
        lora_r=rank,
        lora_alpha=adapted.alpha,
        device=base.weight.device,
        dtype=adapted.a.dtype,
    )
    with torch.no_grad():
        made.lora_U.copy_(adapted.a.t())
        made.lora_V.copy_(adapted.b.t())
    return made
