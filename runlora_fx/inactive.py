"""Inactive adapters: why a model with adapters has none in a graph.

    model.merge_adapter()       ->      "adapters are merged into the weights, ..."
    model.disable_adapter()     ->      "adapters are disabled, ..."

After ``merge_and_unload()`` nothing is left of the adapters, and nothing says that there were any.

Invariant: only what PEFT says of its own layers is said. PEFT is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from runlora_fx.report.sites import Refusal

#: The module of PEFT that has the class of adapted layers. Who uses PEFT has imported it.
_PEFT, _LAYER = "peft.tuners.tuners_utils", "BaseTunerLayer"

_MERGED = (
    "adapters are merged into the weights, so that nothing is left to reorder "
    "(model.unmerge_adapter() undoes merge_adapter())"
)
_DISABLED = "adapters are disabled (model.enable_adapter_layers() enables them)"


def inactive(modules: Iterable[nn.Module]) -> Iterator[Refusal]:
    """What PEFT's layers inside some modules say about adapters that take no part.

    Args:
        modules: The modules that are compiled.
    """
    kind = getattr(sys.modules.get(_PEFT), _LAYER, None)
    if not isinstance(kind, type):
        return
    found: dict[str, list[str]] = {}
    for module in modules:
        for name, layer in module.named_modules():
            reason = _reason(layer) if isinstance(layer, kind) else None
            if reason is not None:
                found.setdefault(reason, []).append(name or "(root)")
    for reason, names in found.items():
        yield Refusal(reason, tuple(dict.fromkeys(names)))


def _reason(layer: Any) -> str | None:
    """Why the adapters of a layer take no part; None if they do."""
    if getattr(layer, "merged", False) is True:
        return _MERGED
    return _DISABLED if getattr(layer, "disable_adapters", False) is True else None
