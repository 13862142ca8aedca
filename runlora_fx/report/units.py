"""Units: numbers with their units, as a person reads them.

    1024000    ->    "1.024 MFLOP", "1.024 MB"

Invariant: four digits at most.
"""

from __future__ import annotations

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


def duration(seconds: float) -> str:
    """A time with two digits, in seconds or a part of them."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 0.95:
            return f"{_two_digits(seconds * factor)} {unit}"
    return f"{_two_digits(seconds * 1e9)} ns"


def change(before: float, after: float) -> str:
    """A change in percent; empty if there was nothing before."""
    return f"{(after - before) / before:+.1%}" if before else ""


def count(n: int, name: str) -> str:
    """A number of things: ``1 layer``, ``2 layers``."""
    return f"{n} {name}" if n == 1 else f"{n} {name}s"


def _two_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 9.95 else f"{x:.1f}"
