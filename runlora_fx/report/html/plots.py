"""Plots: what plans take by the number of tokens, and their products under a roofline.

    Curve("before", 2*N*i*o + ...)    ->    Panel(curves=(Line("before", "M 60 210 L ..."), ...))

Invariant: a plot shows counts and predictions alone, and its labels say which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import sympy

from runlora_fx.report.figures.figures import Box, Drawing, Figures, Rates
from runlora_fx.report.html.axes import LogAxis, ShareAxis, Tick, crossings, path
from runlora_fx.report.units import quantity

#: The size of plots, and the frames of their panels: left, top, right, bottom [px].
WIDTH, HEIGHT = 480, 330
_WHOLE = (66.0, 16.0, 466.0, 284.0)
_UPPER, _LOWER = (66.0, 16.0, 466.0, 176.0), (66.0, 200.0, 466.0, 284.0)

#: At how many numbers of tokens a curve is computed.
_SAMPLES = 121

#: Amounts that differ by less than this share are equal.
_TIE = 1e-9

#: The ridge of a roofline is shown if it is at most this many times off the products.
_NEAR = 1000.0

#: Which plan a part of a plot belongs to.
Plan = Literal["before", "after"]


@dataclass(frozen=True)
class Line:
    """A curve of a plan."""

    plan: Plan
    path: str


@dataclass(frozen=True)
class Guide:
    """A vertical line: its place [px], its text, and True if plans cross there."""

    at: float
    text: str
    is_crossing: bool = False


@dataclass(frozen=True)
class Mark:
    """Products at one place of a plot."""

    plan: Plan
    x: float
    y: float
    text: str
    title: str


@dataclass(frozen=True)
class Panel:
    """A pair of axes and what is drawn between them; the frame is left, top, right, bottom."""

    frame: tuple[float, float, float, float]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    y_label: str
    x_label: str = ""
    lines: tuple[Line, ...] = ()
    guides: tuple[Guide, ...] = ()
    marks: tuple[Mark, ...] = ()
    roof: str = ""


@dataclass(frozen=True)
class BreakEven:
    """What two plans take by the number of tokens.

    Attributes:
        panels: The amounts, and below them the change from the first plan to the second.
        names: Of the curves.
        tokens: The site's own number of tokens.
        crossings: Where both plans take the same, in tokens.
        is_timed: True for predicted times, False for counted FLOPs.
    """

    panels: tuple[Panel, ...]
    names: tuple[str, ...]
    tokens: int
    crossings: tuple[int, ...]
    is_timed: bool


@dataclass(frozen=True)
class Row:
    """A product of a plan, as a row of a table and as a mark of the roofline."""

    plan: Plan
    key: str
    box: Box

    @property
    def intensity(self) -> float:
        """FLOPs for every byte that is moved [FLOP/B]."""
        return self.box.flops / self.box.bytes

    @property
    def rate(self) -> float | None:
        """The predicted rate [FLOP/s]; None if plans were ranked by FLOPs."""
        return self.box.flops / self.box.seconds if self.box.seconds else None


def break_even_plot(figures: Figures) -> BreakEven | None:
    """What two plans take by the number of tokens; None if there is nothing to plot."""
    tokens = dict(figures.sizes).get("N")
    found = [_function(curve.amount, figures) for curve in figures.curves]
    known = [function for function in found if function is not None]
    if tokens is None or not known or len(known) < len(found):
        return None
    x = LogAxis.around(1, 16 * max(tokens, 64), _UPPER[0], _UPPER[2])
    samples = x.samples(_SAMPLES)
    amounts = [function(n) for function in known for n in samples]
    if min(amounts) <= 0:
        return None
    y = LogAxis.around(min(amounts), max(amounts), _UPPER[3], _UPPER[1])
    pair = (known[0], known[-1])
    cross = crossings(lambda n: _less(*(function(n) for function in pair)), samples)
    plans: tuple[Plan, Plan] = ("before", "after")
    panel = Panel(
        _UPPER,
        x.ticks,
        y.ticks,
        "predicted time [s]" if figures.is_timed else "counted [FLOP]",
        lines=tuple(
            Line(plan, path([(x.at(n), y.at(function(n))) for n in samples]))
            for plan, function in zip(plans, known, strict=False)
        ),
        guides=(
            Guide(x.at(tokens), f"N = {tokens}"),
            *(Guide(x.at(n), f"equal at {round(n)}", is_crossing=True) for n in cross),
        ),
    )
    lower = _change(x, samples, pair, tokens, panel.guides) if len(known) > 1 else None
    panels = (replace(panel, x_label="tokens N"),) if lower is None else (panel, lower)
    names = tuple(curve.name for curve in figures.curves)
    return BreakEven(panels, names, tokens, tuple(map(round, cross)), figures.is_timed)


def _change(
    x: LogAxis,
    samples: Sequence[float],
    pair: tuple[Callable[[float], float], Callable[[float], float]],
    tokens: int,
    guides: tuple[Guide, ...],
) -> Panel | None:
    """The change from one plan to another; None if it is above 100% everywhere."""

    def change(n: float) -> float:
        return pair[1](n) / pair[0](n) - 1

    least = max(-min(map(change, samples)), abs(change(tokens)))
    y = ShareAxis.around(max(least, 0.01), _LOWER[3], _LOWER[1])
    points = [(n, change(n)) for n in samples]
    line = path([(x.at(n), y.at(c)) if abs(c) <= y.most else None for n, c in points])
    if not line:
        return None
    plain = tuple(Guide(g.at, "", g.is_crossing) for g in guides)
    return Panel(_LOWER, x.ticks, y.ticks, "change", "tokens N", (Line("after", line),), plain)


def _less(before: float, after: float) -> float:
    """By how much one amount is less than another; 0 if only rounding makes a difference."""
    return before - after if abs(before - after) > _TIE * abs(before) else 0.0


def _function(amount: sympy.Expr, figures: Figures) -> Callable[[float], float] | None:
    """An expression as a function of the tokens; None if it has symbols of unknown size."""
    sizes = {name: size for name, size in figures.sizes if name != "N"}
    known = {s: sizes[s.name] for s in amount.free_symbols if s.name in sizes}
    value = amount.subs(known)
    tokens = [symbol for symbol in value.free_symbols if symbol.name == "N"]
    if value.free_symbols - set(tokens):
        return None
    function = sympy.lambdify(tokens or [sympy.Symbol("N")], value, "math")
    return lambda n: float(function(n))


# -- the roofline ------------------------------------------------------------------------------


def products(figures: Figures) -> list[Row]:
    """The products of both plans, those of the graph as it came first."""
    return [*_rows("before", figures.before), *_rows("after", figures.after)]


def _rows(plan: Plan, drawing: Drawing | None) -> Iterator[Row]:
    """The products of one plan: 1, 2, ... before and a, b, ... after."""
    boxes = () if drawing is None else drawing.boxes
    found = [box for box in boxes if box.kind == "product" and box.flops and box.bytes]
    for i, box in enumerate(found):
        yield Row(plan, str(i + 1) if plan == "before" else _letters(i), box)


def _letters(i: int) -> str:
    """The letters a to z, then aa, ab, and so on."""
    head = _letters(i // 26 - 1) if i >= 26 else ""
    return head + chr(ord("a") + i % 26)


def roofline_plot(rows: Sequence[Row], rates: Rates) -> Panel | None:
    """Products by FLOPs for every byte and predicted rate, under what the device attains."""
    known = [(row, row.rate) for row in rows if row.rate]
    if not known:
        return None
    ridge = rates.flops / rates.bandwidth
    reach = [row.intensity for row, _ in known]
    if min(reach) / _NEAR < ridge < max(reach) * _NEAR:
        reach.append(2 * ridge)
    x = LogAxis.around(min(reach), max(reach), _WHOLE[0], _WHOLE[2])
    heights = [rate for _, rate in known]
    y = LogAxis.around(min(heights), 1.5 * max(rates.flops, *heights), _WHOLE[3], _WHOLE[1])
    (left, right), (low, _) = x.limits, y.limits
    start = max(left, low / rates.bandwidth)
    bends = [n for n in (start, min(max(ridge, start), right), right) if n <= right]
    roof = path([(x.at(n), y.at(min(rates.flops, n * rates.bandwidth))) for n in bends])
    marks = tuple(_marks(known, x, y))
    return Panel(
        _WHOLE,
        x.ticks,
        y.ticks,
        "predicted rate [FLOP/s]",
        "counted FLOP per byte moved [FLOP/B]",
        marks=marks,
        roof=roof,
    )


def _marks(known: Iterable[tuple[Row, float]], x: LogAxis, y: LogAxis) -> Iterator[Mark]:
    """A mark for each place; products of one plan at the same place share it."""
    places: dict[tuple[Plan, float, float], list[Row]] = {}
    for row, rate in known:
        place = (row.plan, round(x.at(row.intensity)), round(y.at(rate)))
        places.setdefault(place, []).append(row)
    for (plan, at_x, at_y), rows in places.items():
        text = ", ".join(row.key for row in rows)
        titles = (
            f"{row.key}: {row.box.text}, {row.box.sizes}, {row.intensity:.4g} FLOP/B, "
            f"{quantity(row.rate or 0, 'FLOP/s')} predicted"
            for row in rows
        )
        yield Mark(plan, at_x, at_y, text, "\n".join(titles))
