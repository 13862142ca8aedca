"""Substitutes: functions of other libraries, as Dynamo can trace them.

PEFT's DoRA looks at the module of a weight's type by name, which Dynamo cannot trace: every layer
breaks the graph in three, and its parts cannot share ``W + s B A``. For weights that are plain
parameters the answer is known without looking.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn

_MODULE = "peft.utils.integrations"
_HELPER = "dequantize_module_weight"


def substitute_untraceable() -> None:
    """Register the substitutes: now, or as soon as their library is imported."""
    module = sys.modules.get(_MODULE)
    if module is None:
        sys.meta_path.insert(0, _WhenImported())
    else:
        _substitute_dequantization(module)


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: it waits for the import of one module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            # The loader is this module's own.
            spec.loader.exec_module = _followed(spec.loader.exec_module)  # type: ignore[assignment]
        return spec


def _followed(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def execute_and_substitute(module: ModuleType) -> None:
        execute(module)
        _substitute_dequantization(module)

    return execute_and_substitute


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
