"""The summary: what a report says first, in a line, and what a user can do.

    12 of 14 adapted layers rewritten: 4.1% less time of products predicted, 31.5 MB less saved ...
    2 layers left alone (dropout): the adapter reads a dropped-out input ...; set lora_dropout=0 ...

Invariant: every number is counted, predicted or measured, and is called so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from runlora_fx.passes.context import Recomputation
from runlora_fx.report.sites import Cause, Site
from runlora_fx.report.units import count, duration, quantity


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
        gains.append(f"{quantity(recomputation.fewer_bytes, 'B')} less saved for the backward")
    head = f"{len(changed)} of {count(len(layers), 'adapted layer')} rewritten"
    return f"{head}: {', '.join(gains)}" if gains else head


def advised(sites: Sequence[Site], recomputation: Recomputation) -> Iterator[str]:
    """A sentence for each cause that leaves layers alone, and one on what is recomputed.

    Args:
        sites: What was found.
        recomputation: What the backward recomputes besides.
    """
    by_text: dict[tuple[str, str], dict[Cause, list[Site]]] = {}
    for site in sites:
        for cause in site.causes:
            by_cause = by_text.setdefault((cause.name, cause.text), {})
            by_cause.setdefault(cause, []).append(site)
    for (name, text), by_cause in by_text.items():
        of = [site for found in by_cause.values() for site in found]
        said = f"{count(len(_layers(of)), 'layer')} left alone ({name}): {text}"
        remedies = {cause.remedy: found for cause, found in by_cause.items() if cause.remedy}
        if len(remedies) == 1:
            said += f"; {next(iter(remedies))}"
        elif remedies:
            parts = (f"{r} ({count(len(_layers(of)), 'layer')})" for r, of in remedies.items())
            said += f"; {', '.join(parts)}"
        yield f"{said}."
    kinds = [
        (recomputation.tensors, "activation", "recomputed in the backward"),
        (recomputation.drawn, "dropout mask", "drawn again"),
        (recomputation.packed, "dropout mask", "saved as bits"),
    ]
    found = [f"{count(n, name)} {done}" for n, name, done in kinds if n]
    if found:
        yield f"{', '.join(found)}."


def steps_to_pay_back(planning: float | None, seconds: tuple[float, float] | None) -> int | None:
    """After how many steps planning has paid back; None if no gain is predicted.

    Args:
        planning: How long planning took, measured [s]; None if it was not measured.
        seconds: The predicted time of all products in a step, before and after [s].
    """
    if planning is None or seconds is None or seconds[0] <= seconds[1]:
        return None
    return max(1, ceil(planning / (seconds[0] - seconds[1])))


def pay_back(
    planning: float | None, seconds: tuple[float, float] | None, *, was_cached: bool
) -> str:
    """A sentence on when planning pays back; empty if no gain is predicted or nothing measured.

    Args:
        planning: How long planning took, measured [s]; None if it was not measured.
        seconds: The predicted time of all products in a step, before and after [s].
        was_cached: True if the compiled code came from a cache, so that nothing was planned.
    """
    steps = steps_to_pay_back(planning, seconds)
    if planning is None or seconds is None or steps is None:
        return ""
    when = " when this was first compiled" if was_cached else ""
    gain = duration(seconds[0] - seconds[1])
    after = f"about {_rounded(steps)} steps" if steps > 1 else "one step"
    return (
        f"Planning took {duration(planning)}{when} (measured); it pays back after {after} "
        f"(predicted gain of {gain} a step)."
    )


def _rounded(n: int) -> int:
    """A whole number with two digits that count: a prediction has no more."""
    unit: int = 10 ** max(0, len(str(n)) - 2)
    return round(n / unit) * unit


def _layers(sites: Sequence[Site]) -> set[str]:
    return {name for site in sites for name in site.modules}
