"""Registration of all substitutes, once per process.

``peft`` is imported before or after this package -> its functions are substituted as soon as both
are there.

Invariant: nothing is imported here that the user has not imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from runlora_fx.integrations import loralib_merged, peft_dora, peft_experts

#: By module of another library, what is done to it.
_SUBSTITUTES: dict[str, Callable[[ModuleType], None]] = {
    "peft.utils.integrations": peft_dora.substitute,
    "peft.tuners.lora.layer": peft_experts.substitute,
    "loralib.layers": loralib_merged.substitute,
}


@cache
def make_traceable() -> None:
    """Let Dynamo trace functions of PEFT that it cannot trace unchanged, in our own compilations.

    A module that is not imported yet is changed right after its import.
    """
    for name, substitute in _SUBSTITUTES.items():
        if name in sys.modules:
            substitute(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, substitute))


class _AfterImport(MetaPathFinder):
    """Lets the other finders find a module, and calls a function once it has been executed."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self._action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
