"""Substitutes: functions of other libraries, as Dynamo can trace them.

PEFT's DoRA looks at the module of a weight's type by name, which Dynamo cannot trace: every layer
breaks the graph in three, and its parts cannot share ``W + s B A``. For weights that are plain
parameters the answer is known without looking.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from runlora_fx.integrations.after_import import after_import

_PEFT = "peft.utils.integrations"
_HELPER = "dequantize_module_weight"


@cache
def substitute_untraceable() -> None:
    """Register the substitutes, whenever their library is imported."""
    after_import(_PEFT, _substitute_dequantization)


def _substitute_dequantization(module: ModuleType) -> None:
    original: Any = getattr(module, _HELPER, None)
    if original is None:
        return
    outside_the_graph = torch.compiler.disable(original)  # type: ignore[no-untyped-call]

    @torch.compiler.substitute_in_graph(original, skip_signature_check=True)
    def dequantized(module: nn.Module) -> Any:
        if hasattr(module, "W_q"):  # HQQ's layers have no weight
            return module.dequantize()  # type: ignore[operator]
        if type(module.weight) is nn.Parameter:
            return module.weight
        return outside_the_graph(module)
