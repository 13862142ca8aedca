"""axolotl's kernels: the autograd function of one projection, ``LoRA_O``. Nobody has run this here.

Newer versions take the dropped-out input, a bias, a bias of the adapter, and DoRA's magnitude too.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from measuring.libraries import Adapted

NEEDS = "axolotl"


class Projection(nn.Module):
    """``X W' + s (X A') B'`` by axolotl's function."""

    def __init__(self, adapted: Adapted) -> None:
        """Take the numbers of a layer.

        Raises:
            ValueError: If it has a bias or dropout: the older function knows neither.
        """
        from axolotl.kernels.lora import LoRA_O

        super().__init__()
        if adapted.base.bias is not None or adapted.dropout:
            raise ValueError("only layers without bias and dropout are compared")
        self.function: Any = LoRA_O
        self.names = list(inspect.signature(LoRA_O.forward).parameters)[1:]
        self.weight = adapted.base.weight
        self.lora_a, self.lora_b = nn.Parameter(adapted.a.clone()), nn.Parameter(adapted.b.clone())
        self.scaling = adapted.alpha / adapted.rank

    def forward(self, x: Tensor) -> Tensor:
        """``x (rows, length, in)`` to ``(rows, length, out)``."""
        known = {"x": x, "w": self.weight, "a": self.lora_a, "s": self.scaling}
        known["B"] = self.lora_b  # a small b is the bias
        given = (known.get(name, known.get(name.lower())) for name in self.names)
        result: Tensor = self.function.apply(*given)
        return result


layer = Projection
