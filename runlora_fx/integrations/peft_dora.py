"""PEFT's DoRA, as Dynamo can trace it.

``type(module.weight).__module__.startswith("torchao.")`` in PEFT's ``dequantize_module_weight``
breaks the graph three times a layer -> ``module.weight`` for weights that are plain parameters:
the parts of a layer are in one graph, and share ``W + s B A``.

Invariant: in eager mode PEFT's function runs, and other backends trace it as they would.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from runlora_fx.integrations.after_import import after_import
from runlora_fx.integrations.own_compile import is_own_compilation

_PEFT = "peft.utils.integrations"
_FUNCTION = "dequantize_module_weight"


@cache
def make_dora_traceable() -> None:
    """Register the substitute, as soon as PEFT is imported."""
    after_import(_PEFT, _substitute)


def _substitute(module: ModuleType) -> None:
    original: Any = getattr(module, _FUNCTION, None)
    if not isinstance(original, FunctionType):
        return
    outside_the_graph = torch.compiler.disable(original)  # type: ignore[no-untyped-call]
    # Dynamo would take a call of the original for a call of its substitute.
    as_it_came = _copy(original)

    @torch.compiler.substitute_in_graph(original, skip_signature_check=True)
    def dequantized(module: nn.Module) -> Any:
        if not is_own_compilation():
            return as_it_came(module)
        if hasattr(module, "W_q"):  # HQQ's layers have no weight
            return module.dequantize()  # type: ignore[operator]
        if type(module.weight) is nn.Parameter:
            return module.weight
        return outside_the_graph(module)


def _copy(function: FunctionType) -> FunctionType:
    """Another function with the same code."""
    return FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
