"""Units: numbers with their units, as a person reads them.

    1024000    ->    "1.024 MFLOP", "1.024 MB"

Invariant: four digits at most.
"""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P")


def with_unit(x: float, unit: str) -> str:
    """A number of 1 or more with a prefix of its unit."""
    for prefix in _PREFIXES[:-1]:
        if abs(x) < 1000:
            return f"{x:.4g} {prefix}{unit}"
        x /= 1000
    return f"{x:.4g} {_PREFIXES[-1]}{unit}"


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
