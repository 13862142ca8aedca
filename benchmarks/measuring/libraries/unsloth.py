"""Unsloth: the autograd function of one projection, ``LoRA_W``.

It needs a GPU. Nobody has run this here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from measuring.libraries import Adapted

NEEDS = "unsloth"


class Projection(nn.Module):
    """``X W' + s (X A') B'`` by Unsloth's function."""

    def __init__(self, adapted: Adapted) -> None:
        """Take the numbers of a layer.

        Raises:
            ValueError: If it has a bias or dropout, which the function does not know.
        """
        from unsloth.kernels.fast_lora import LoRA_W

        super().__init__()
        if adapted.base.bias is not None or adapted.dropout:
            raise ValueError("LoRA_W knows neither bias nor dropout")
        self.function: Any = LoRA_W
        self.weight = adapted.base.weight
        self.lora_a, self.lora_b = nn.Parameter(adapted.a.clone()), nn.Parameter(adapted.b.clone())
        self.scaling = adapted.alpha / adapted.rank

    def forward(self, x: Tensor) -> Tensor:
        """``x (rows, length, in)`` to ``(rows, length, out)``."""
        given = (x, self.weight, None, self.lora_a, self.lora_b, self.scaling)
        result: Tensor = self.function.apply(*given)
        return result


layer = Projection
