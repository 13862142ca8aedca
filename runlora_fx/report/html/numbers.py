"""Numbers as text, with their units.

    quantity(2.5e9, "FLOP")    ->    "2.5 GFLOP"

Invariant: no number is shown without its unit.
"""

from __future__ import annotations

from math import isfinite

#: By power of 1000, the prefix of a unit.
_PREFIXES = {-4: "p", -3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}


def quantity(x: float, unit: str, digits: int = 4) -> str:
    """A number with a unit and the prefix that suits its size."""
    power, size = 0, abs(x)
    while size >= 1000 and power < max(_PREFIXES):
        size, power = size / 1000, power + 1
    while 0 < size < 1 and power > min(_PREFIXES):
        size, power = size * 1000, power - 1
    return f"{x / 1000.0**power:.{digits}g} {_PREFIXES[power]}{unit}"


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
