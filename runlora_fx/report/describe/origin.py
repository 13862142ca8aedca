"""Origin: the modules of the model that nodes and regions belong to.

A node of ``model.layers.0.q_proj.lora_A.default`` -> ``model.layers.0.q_proj``.

Invariant: adapters are named by the layer that they adapt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import takewhile

from torch import fx

from runlora_fx.passes.read.regions import Region
from runlora_fx.report.sites import Cause, Refusal, Site

#: Names of modules inside of an adapted layer.
_ADAPTER_PARTS = re.compile(r"^(lora_.*|base_layer)$")

#: The name of the compiled module itself.
_ROOT = "(root)"


def modules_of(region: Region) -> tuple[str, ...]:
    """The modules that a region comes from, adapters by the layer that they adapt."""
    found = modules_of_nodes(made.node for made in region.incoming)
    return found or tuple(dict.fromkeys(root.node.name for root, _ in region.demands))


def modules_of_nodes(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The modules that nodes come from, adapters by the layer that they adapt."""
    paths = list(dict.fromkeys(filter(None, map(_path, nodes))))
    adapted: list[str] = []
    for path in paths:
        parts = path.split(".")
        inside = next((i for i, part in enumerate(parts) if _ADAPTER_PARTS.match(part)), None)
        if inside is not None:
            adapted.append(".".join(parts[:inside]) or _ROOT)
    if adapted:
        return tuple(dict.fromkeys(adapted))
    levels = zip(*(path.split(".") for path in paths), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    return (".".join(common),) if common else ()


def unmatched(nodes: Iterable[fx.Node], sites: Iterable[Site]) -> Iterator[Refusal]:
    """The adapted layers of a graph that no site covers, with the operators that they run."""
    covered = {name for site in sites for name in site.modules}
    missed: dict[str, set[str]] = {}
    for node in nodes:
        path = _path(node)
        name = _adapted(path) if path else None
        if name is not None and name not in covered and node.op != "placeholder":
            missed.setdefault(name, set()).add(str(node.target).removesuffix(".default"))
    by_reason: dict[str, list[str]] = {}
    for name, targets in missed.items():
        reason = (
            "no low-rank product of matrices was read "
            f"(the layer runs {', '.join(sorted(targets))})"
        )
        by_reason.setdefault(reason, []).append(name)
    return (
        Refusal(reason, tuple(names), Cause("operators", reason))
        for reason, names in by_reason.items()
    )


@lru_cache(maxsize=1 << 14)
def _adapted(path: str) -> str | None:
    """The layer that a module is a part of an adapter of; None if it is none."""
    parts = path.split(".")
    adapted = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
    return None if adapted is None else ".".join(parts[:adapted]) or _ROOT


def _path(node: fx.Node) -> str:
    """The dotted name of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    innermost: object = next(reversed(stack.values()))
    return _named(innermost[0] if isinstance(innermost, tuple) else str(innermost))


@lru_cache(maxsize=1 << 14)
def _named(path: str) -> str:
    """The dotted name in an entry of a module stack."""
    parts = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path).split(".")
    # Dynamo's name of the compiled module or function is not part of the path. If its forward is
    # wrapped (accelerate, autocast), the module is the first of the wrapper's arguments.
    if parts[:3] == ["L", "args", "0"]:
        del parts[:3]
    while parts and parts[0] in ("", "L", "self", "L__self__", "fn"):
        del parts[0]
    return ".".join(part for part in parts if part not in ("", "__dict__", "_modules"))
