"""Axes: numbers become places in a plot, and round numbers become ticks.

    LogAxis.around(3, 20_000, 60, 460).ticks    ->    1, 10, 100, 1k, 10k, 100k

Invariant: a tick lies on its axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10

from runlora_fx.report.html.numbers import compact

#: The most ticks of an axis, and the steps of a linear one.
_MOST_TICKS = 7
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: its place [px] and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis over whole powers of ten.

    Attributes:
        low: The power of ten at its start.
        high: The power of ten at its end.
        start: Where it starts [px].
        end: Where it ends [px].
    """

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def around(cls, least: float, most: float, start: float, end: float) -> LogAxis:
        """The shortest axis that has two positive numbers on it."""
        low, high = floor(log10(least) + 1e-9), ceil(log10(most) - 1e-9)
        return cls(low, max(high, low + 1), start, end)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest number on it."""
        return 10.0**self.low, 10.0**self.high

    def at(self, x: float) -> float:
        """The place of a positive number [px]."""
        share = (log10(x) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """A tick at every power of ten, or at every few of them."""
        every = ceil((self.high - self.low + 1) / _MOST_TICKS)
        powers = range(self.low, self.high + 1, every)
        return tuple(Tick(self.at(10.0**p), compact(10.0**p)) for p in powers)

    def samples(self, count: int) -> list[float]:
        """Numbers along the axis, evenly apart on it."""
        width = (self.high - self.low) / (count - 1)
        return [10.0 ** (self.low + i * width) for i in range(count)]


@dataclass(frozen=True)
class ShareAxis:
    """A linear axis of changes around 0, such as -20% to +20%.

    Attributes:
        most: The greatest change on it.
        start: Where it starts [px].
        end: Where it ends [px].
    """

    most: float
    start: float
    end: float

    @classmethod
    def around(cls, change: float, start: float, end: float) -> ShareAxis:
        """The axis of the least round limit that has a change on it; at most 100%."""
        most = next((step for step in _STEPS if step >= abs(change)), 1.0)
        return cls(most, start, end)

    def at(self, change: float) -> float:
        """The place of a change [px]."""
        return self.start + (change + self.most) / (2 * self.most) * (self.end - self.start)

    @property
    def ticks(self) -> tuple[Tick, ...]:
        """Its limits, zero, and the middle between them."""
        shares = (-self.most, -self.most / 2, 0.0, self.most / 2, self.most)
        return tuple(Tick(self.at(x), f"{100 * x:+.3g}%" if x else "0%") for x in shares)


def path(points: Sequence[tuple[float, float] | None]) -> str:
    """Straight lines through places in a plot; None interrupts them."""
    parts, draws = [], False
    for point in points:
        if point is not None:
            parts.append(f"{'L' if draws else 'M'} {point[0]:.1f} {point[1]:.1f}")
        draws = point is not None
    return " ".join(parts)


def crossings(difference: Callable[[float], float], samples: Sequence[float]) -> list[float]:
    """Where a function changes its sign, one number between any two samples.

    Args:
        difference: The function.
        samples: Positive numbers in order.
    """
    found = []
    known = [(x, y) for x, y in ((x, difference(x)) for x in samples) if y]
    for (low, before), (high, after) in pairwise(known):
        if (before > 0) == (after > 0):
            continue
        for _ in range(60):
            middle = (low + high) / 2
            if (difference(middle) > 0) == (before > 0):
                low = middle
            else:
                high = middle
        found.append(high)
    return found
