"""Sketch: a drawing with positions: boxes, lines between them, and the bands of both phases.

    Drawing(boxes, edges)    ->    Sketch(940, 310, boxes at (x, y), paths "M 12 30 C ...")

Invariant: a text is as wide as its box allows, in a typeface of fixed width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten

from runlora_fx.report.figures.figures import Box, Drawing, Edge
from runlora_fx.report.html.layered import Layout, Node, layered

#: The width of a character, and the heights of boxes [px].
_CHARACTER, _TALL, _LOW = 7.0, 44.0, 38.0

#: The space around a text, between boxes of a column, between columns, above a band [px].
_PADDING, _APART, _BETWEEN, _HEAD = 8.0, 14.0, 34.0, 26.0

#: The longest text of a box [characters]. The whole one is in its title.
_WIDTH = 30


@dataclass(frozen=True)
class PlacedBox:
    """A box with its place and its texts."""

    x: float
    y: float
    width: float
    height: float
    title: str
    text: str
    box: Box


@dataclass(frozen=True)
class Sketch:
    """A drawing with positions.

    Attributes:
        width: Its width [px].
        height: Its height [px].
        boxes: Its boxes.
        lines: The path of each edge, and True if it is saved for the backward.
        bands: The name of a phase and where it begins [px]; empty if there is one phase.
    """

    width: float
    height: float
    boxes: tuple[PlacedBox, ...]
    lines: tuple[tuple[str, bool], ...]
    bands: tuple[tuple[str, float], ...]


def sketched(drawing: Drawing) -> Sketch:
    """Place the boxes and edges of a drawing."""
    boxes = drawing.boxes
    is_joint = len({box.is_backward for box in boxes}) > 1
    nodes = [
        Node(_height(box) + _APART, int(is_joint and box.is_backward), box.kind == "input")
        for box in boxes
    ]
    ends = list(dict.fromkeys((edge.source, edge.target) for edge in drawing.edges))
    layout = layered(nodes, ends, gap=_HEAD if is_joint else 0.0)
    count = max(layout.columns, default=-1) + 1
    widths = [
        max((_width(b) for b, at in zip(boxes, layout.columns, strict=True) if at == c), default=0)
        for c in range(count)
    ]
    lefts = [1 + sum(widths[:c]) + c * _BETWEEN for c in range(count)]
    placed = tuple(
        _placed(box, lefts[column], widths[column], middle)
        for box, column, middle in zip(boxes, layout.columns, layout.middles, strict=True)
    )
    ports = _ports(drawing, placed)
    lines = tuple(
        (_line(edge, placed, layout, lefts, widths, ports[edge]), edge.is_saved)
        for edge in drawing.edges
    )
    bands = tuple(zip(("forward", "backward"), layout.bands, strict=False)) if is_joint else ()
    return Sketch(lefts[-1] + widths[-1] + 1 if count else 0, layout.height, placed, lines, bands)


def _height(box: Box) -> float:
    return _LOW if box.kind == "input" else _TALL


def _label(box: Box) -> str:
    return shorten(box.text, _WIDTH, placeholder=" ...")


def _width(box: Box) -> float:
    note = len("again: ") if box.is_again else 0
    return max(len(_label(box)) + note, len(box.sizes)) * _CHARACTER + 2 * _PADDING


def _placed(box: Box, left: float, width: float, middle: float) -> PlacedBox:
    """A box in the middle of its column; a matrix that is given at the right."""
    own, height = _width(box), _height(box)
    x = left + (width - own if box.kind == "input" else (width - own) / 2)
    text = f"again: {_label(box)}" if box.is_again else _label(box)
    return PlacedBox(x, middle - height / 2, own, height, box.text, text, box)


def _ports(drawing: Drawing, placed: tuple[PlacedBox, ...]) -> Mapping[Edge, float]:
    """By edge, the height at which it ends: those of one box lie side by side."""
    found = {}
    for target, box in enumerate(placed):
        mine = [edge for edge in drawing.edges if edge.target == target]
        mine.sort(key=lambda edge: placed[edge.source].y)
        for i, edge in enumerate(mine):
            found[edge] = box.y + box.height * (i + 1) / (len(mine) + 1)
    return found


def _line(
    edge: Edge,
    placed: tuple[PlacedBox, ...],
    layout: Layout,
    lefts: list[float],
    widths: list[float],
    port: float,
) -> str:
    """The path of an edge: curves between boxes, straight where it crosses a column."""
    source, target = placed[edge.source], placed[edge.target]
    x, y = source.x + source.width, source.y + source.height / 2
    path = f"M {x:.1f} {y:.1f}"
    first = layout.columns[edge.source] + 1
    for column, middle in enumerate(layout.routes[edge.source, edge.target], first):
        path += _curve(x, y, lefts[column], middle) + f" H {lefts[column] + widths[column]:.1f}"
        x, y = lefts[column] + widths[column], middle
    return path + _curve(x, y, target.x - 1, port)


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    """A curve that leaves and arrives level."""
    half = (to_x - x) / 2
    return f" C {x + half:.1f} {y:.1f} {to_x - half:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
