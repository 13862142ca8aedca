"""loralib, Microsoft's original: ``Linear``."""

from __future__ import annotations

from torch import nn

from measuring.libraries import Adapted

NEEDS = "loralib"


def layer(adapted: Adapted) -> nn.Module:
    """The layer of loralib's with the same numbers."""
    from loralib import Linear

    base = adapted.base
    made = Linear(
        base.in_features,
        base.out_features,
        r=adapted.rank,
        lora_alpha=adapted.alpha,
        lora_dropout=adapted.dropout,
        merge_weights=False,
        bias=base.bias is not None,
        device="meta",
    )
    made.weight, made.bias = base.weight, base.bias
    made.lora_A = nn.Parameter(adapted.a.clone())
    made.lora_B = nn.Parameter(adapted.b.clone())
    return made
