"""The summary: what a report says first, in a line, and what a user can do.

    12 of 14 adapted layers rewritten: 4.1% less time of products predicted, 31.5 MB less saved ...
    2 layers are left alone: the adapter reads a dropped-out input ...; set lora_dropout=0 ...

Invariant: every number is counted or predicted from the graph, and is called so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runlora_fx.passes.context import Recomputation
from runlora_fx.report.sites import Cause, Site


def verdict(
    sites: Sequence[Site], seconds: tuple[float, float] | None, recomputation: Recomputation
) -> str:
    """What was gained, in one line.

    Args:
        sites: What was found.
        seconds: The predicted time of all products, before and after [s].
        recomputation: What the backward recomputes besides.
    """
    layers = _layers(sites)
    changed = layers & _layers([site for site in sites if site.changed])
    gains = []
    if seconds is not None and changed and seconds[0] > seconds[1]:
        share = (seconds[0] - seconds[1]) / seconds[0]
        gains.append(f"{share:.1%} less time of matrix products predicted")
    if recomputation.fewer_bytes > 0:
        gains.append(f"{_bytes(recomputation.fewer_bytes)} less saved for the backward")
    head = f"{len(changed)} of {_count(len(layers), 'adapted layer')} rewritten"
    return f"{head}: {', '.join(gains)}" if gains else head


def advised(sites: Sequence[Site], recomputation: Recomputation) -> Iterator[str]:
    """A sentence for each cause that leaves layers alone, and one on what is recomputed.

    Args:
        sites: What was found.
        recomputation: What the backward recomputes besides.
    """
    by_cause: dict[Cause, list[Site]] = {}
    for site in sites:
        for cause in site.causes:
            by_cause.setdefault(cause, []).append(site)
    for cause, of in by_cause.items():
        count = _count(len(_layers(of)), "layer")
        yield f"{count} left alone: {cause.text}; {cause.remedy}."
    parts = [
        (recomputation.tensors, "activation", "recomputed in the backward"),
        (recomputation.drawn, "dropout mask", "drawn again"),
        (recomputation.packed, "dropout mask", "saved as bits"),
    ]
    found = [f"{_count(n, name)} {done}" for n, name, done in parts if n]
    if found:
        yield f"{', '.join(found)}."


def _layers(sites: Sequence[Site]) -> set[str]:
    return {name for site in sites for name in site.modules}


def _count(n: int, name: str) -> str:
    return f"{n} {name}" if n == 1 else f"{n} {name}s"


def _bytes(x: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if x < 1000:
            return f"{x:.4g} {unit}"
        x /= 1000
    return f"{x:.4g} TB"
