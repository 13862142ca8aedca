"""Figures: what the drawings and plots of a report are made of, as plain data.

``Z = X A'`` -> ``Box("Z", "X A'", "product", "1024x384 · 384x32", ...)``, and an edge from each of
``X`` and ``A`` to it.

Invariant: a drawing has no cycle, and its edges name boxes by their position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import sympy

#: What a box stands for: a matrix that is given, or a step that makes one.
Kind: TypeAlias = Literal["input", "product", "sum", "other"]


@dataclass(frozen=True)
class Box:
    """A matrix of a plan: one that is given, or one that a step makes.

    Attributes:
        name: Its letter, such as ``Z``; empty if the plan's text gives it no line of its own.
        formula: What makes it; empty for a matrix that is given.
        kind: What it stands for.
        sizes: Of the operands of a product, ``1024x384 · 384x32``; else its own.
        is_backward: True if the backward reads or makes it.
        is_result: True if the region has to compute it.
        is_again: True if the forward computes it as well.
        flops: What its step computes, counted [FLOP].
        bytes: What its step moves, counted [B].
        seconds: What its step takes, as predicted [s]; None if plans were ranked by FLOPs.
    """

    name: str
    formula: str
    kind: Kind
    sizes: str
    is_backward: bool = False
    is_result: bool = False
    is_again: bool = False
    flops: int = 0
    bytes: int = 0
    seconds: float | None = None

    @property
    def text(self) -> str:
        """Its name and what makes it: ``Z = X A'``."""
        return " = ".join(filter(None, (self.name, self.formula)))


@dataclass(frozen=True)
class Edge:
    """A step reads a matrix.

    Attributes:
        source: The position of the matrix among the boxes.
        target: The position of the step.
        is_saved: True if the forward saves the matrix for the backward.
    """

    source: int
    target: int
    is_saved: bool = False


@dataclass(frozen=True)
class Drawing:
    """A plan as a graph: boxes, and edges from what is read to what reads it."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Curve:
    """What a plan takes, by the number of tokens.

    Attributes:
        name: Which plan it is.
        amount: FLOPs or seconds as an expression in the site's dimensions.
    """

    name: str
    amount: sympy.Expr


@dataclass(frozen=True)
class Figures:
    """What the drawings and plots of one site are made of.

    Attributes:
        dtype: The dtype of its matrices.
        sizes: Its dimensions while tracing, by letter.
        before: The plan of the graph as it came; None if it is too large to draw.
        after: The plan that will run; None if nothing was changed, or if it is too large to draw.
        is_timed: True if the curves are predicted times [s], False if they are FLOPs.
        curves: The graph as it came first. Then the plan that will run, or the cheapest other plan
            if nothing was changed. Empty if the site has no dimension of tokens.
    """

    dtype: str
    sizes: tuple[tuple[str, int], ...]
    before: Drawing | None = None
    after: Drawing | None = None
    is_timed: bool = False
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class Rates:
    """The rates by which plans were ranked, for one dtype.

    Attributes:
        device: The device.
        dtype: The dtype.
        flops: The rate of products in the fastest layout [FLOP/s].
        bandwidth: The rate at which operands are read or results written [B/s].
        source: Where the rates come from: published, estimated or measured.
    """

    device: str
    dtype: str
    flops: float
    bandwidth: float
    source: str
