"""LoRAFusion (arXiv 2510.00206): the fused operator of one projection, ``fused_linear_lora``.

It needs a GPU. Nobody has run this here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from measuring.libraries import Adapted

NEEDS = "lorafusion"


class Projection(nn.Module):
    """``X W' + s (X A') B' + b`` by LoRAFusion's operator."""

    def __init__(self, adapted: Adapted) -> None:
        """Take the numbers of a layer.

        Raises:
            ValueError: If it has dropout: the operator draws masks of its own.
        """
        from lorafusion.ops.lora_v1 import fused_linear_lora

        super().__init__()
        if adapted.dropout:
            raise ValueError("the operator draws other masks, so only layers without dropout run")
        self.function: Any = fused_linear_lora
        self.weight, self.bias = adapted.base.weight, adapted.base.bias
        self.lora_a, self.lora_b = nn.Parameter(adapted.a.clone()), nn.Parameter(adapted.b.clone())
        self.scaling = adapted.alpha / adapted.rank

    def forward(self, x: Tensor) -> Tensor:
        """``x (rows, length, in)`` to ``(rows, length, out)``."""
        result: Tensor = self.function(
            x=x,
            linear_w=self.weight,
            lora_a=self.lora_a,
            lora_b=self.lora_b,
            alpha=self.scaling,
            linear_bias=self.bias,
        )
        return result


layer = Projection
