"""loralib's ``MergedLinear``, as Dynamo can trace it.

``result[self.lora_ind] = x`` assigns through a mask, whose number of rows Dynamo does not know, and
breaks the graph between ``X W'`` and ``X D'`` -> blocks of x and of zeros are put one below the
other. Then both products are in one graph, which multiplies by ``W + s D``.

Invariant: both compute the same. Eager mode runs loralib's own method, and other backends trace it.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from runlora_fx._torch_compat import never_compile_alone
from runlora_fx.integrations.own_compile import is_own_compilation

_CLASS = "MergedLinear"


def substitute(module: ModuleType) -> None:
    """Substitute a method of a class of ``loralib.layers``."""
    layer: Any = getattr(module, _CLASS, None)
    original = getattr(layer, "zero_pad", None)
    if original is None:
        return

    def zero_pad(self: Any, x: Tensor) -> Any:
        if is_own_compilation() and len(x) == sum(self.enable_lora) * _height(self):
            return _padded(self, x)
        return original(self, x)

    # For other backends this function adds no frame that Dynamo compiles.
    never_compile_alone(zero_pad.__code__)
    layer.zero_pad = wraps(original)(zero_pad)


def _height(layer: Any) -> int:
    """The rows of the weight of one of the layers that are merged."""
    return len(layer.lora_ind) // len(layer.enable_lora)


def _padded(layer: Any, x: Tensor) -> Tensor:
    """The rows of adapted layers, with zeros for the layers that have no adapter."""
    height = _height(layer)
    blocks = iter(torch.split(x, height))
    zeros = x.new_zeros((height, *x.shape[1:]))
    return torch.cat([next(blocks) if has_adapter else zeros for has_adapter in layer.enable_lora])
