"""PEFT's DoRA, as Dynamo can trace it.

``type(module.weight).__module__.startswith("torchao.")`` in PEFT's ``dequantize_module_weight``
breaks the graph three times a layer -> ``module.weight`` for weights that are plain parameters.
All parts of a layer are then in one graph, and share ``W + s B A``.

Invariant: eager mode runs PEFT's own function, and other backends trace it.
"""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from runlora_fx._torch_names import FakeTensor
from runlora_fx.integrations.own_compile import is_own_compilation

#: Parameters that are not quantised; a model without data has fake ones.
_PLAIN = (nn.Parameter, FakeTensor)

_FUNCTION = "dequantize_module_weight"


def substitute(module: ModuleType) -> None:
    """Register the substitute of a function of ``peft.utils.integrations``."""
    original: Any = getattr(module, _FUNCTION, None)
    if not isinstance(original, FunctionType):
        return
    outside_the_graph = torch.compiler.disable(original)  # type: ignore[no-untyped-call]
    # A copy: Dynamo would replace a call of the original by a call of its substitute.
    original_copy = FunctionType(
        original.__code__,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )

    @torch.compiler.substitute_in_graph(original, skip_signature_check=True)
    def dequantized(module: nn.Module) -> Any:
        if not is_own_compilation():
            return original_copy(module)
        if hasattr(module, "W_q"):  # HQQ's layers have no weight
            return module.dequantize()  # type: ignore[operator]
        if type(module.weight) in _PLAIN:
            return module.weight
        return outside_the_graph(module)
