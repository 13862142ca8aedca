"""Numbers as the page shows them, beside those of :mod:`runlora_fx.report.units`.

    compact(10000)    ->    "10k", for the tick of an axis that has a unit

Invariant: no number is shown without its unit.
"""

from __future__ import annotations

from math import isfinite

from runlora_fx.report.units import quantity


def compact(x: float) -> str:
    """A number without a unit, for the ticks of an axis that has one: ``10k``."""
    return quantity(x, "", 3).replace(" ", "")


def change(before: float, after: float) -> str:
    """By how much a number grows or shrinks: ``-4.2%``."""
    if not before or not isfinite(after / before):
        return "none"
    share = after / before - 1
    digits = 1 if abs(share) >= 0.001 or not share else 2
    return f"{share:+.{digits}%}" if share else "0%"
