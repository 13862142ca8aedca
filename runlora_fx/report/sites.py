"""Sites and refusals: what the pass found at one place of a graph.

A LoRA layer -> ``Site(("q_proj",), "N=1024, i=384, o=384, r=32", "Y = X W' + (X A') B'", ...)``

Invariant: sites and refusals are plain data, which programs can read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import sympy

from runlora_fx.report.figures.figures import Figures


@dataclass(frozen=True)
class Candidate:
    """The cheapest plan that begins with a given step.

    Attributes:
        form: The step that computes the first value, such as ``X (W' + A' B')``.
        flops: The matrix products of the whole plan [FLOP].
    """

    form: str
    flops: int


@dataclass(frozen=True)
class Cause:
    """What keeps a layer from being rewritten.

    Attributes:
        name: One word, such as ``"dropout"``; the modules ``causes`` and ``price_causes`` of
            :mod:`~runlora_fx.report.describe` have them all.
        text: What stands in the way, as a clause.
        remedy: What to do about it, as a clause; empty if nothing helps.
    """

    name: str
    text: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """What stands in the way and what to do about it, without a full stop."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


def _none() -> None:
    """No figures."""


@dataclass(frozen=True)
class Site:
    """A place where low-rank algebra was found, or where matrix products were changed.

    Attributes:
        modules: Dotted names of the modules that it comes from.
        shapes: The sizes of its dimensions, ``N`` tokens, ``i`` in, ``o`` out, ``r`` rank.
        before: How the graph computed it, a line for every value.
        after: How it will be computed; equal to ``before`` if nothing was changed.
        flops_before: The matrix products of the graph as it came [FLOP].
        flops_after: The matrix products that will run [FLOP].
        flops_before_expr: ``flops_before`` as an expression in the site's dimensions.
        flops_after_expr: ``flops_after`` as an expression in the site's dimensions.
        changed: True if the graph was changed here.
        reason: Why it was changed or left alone.
        considered: The cheapest plan for every first step, cheapest first.
        is_exact: True if all plans were compared, so that no cheaper one exists.
        find_break_even: Computes :attr:`break_even`.
        find_causes: Computes :attr:`causes`.
        base: The product of the layer's weight in the forward, ``Y0 = X0 W'``, if it is no part of
            the algebra above. It runs as it came, and its result is added to the adapter's.
        base_flops: What that product computes, counted [FLOP].
        seconds: The predicted time of its products, before and after [s]; None if plans were ranked
            by FLOPs.
        saved: What its values make the forward save for the backward, before and after, counted
            [B].
        find_figures: Computes :attr:`figures`.
    """

    modules: tuple[str, ...]
    shapes: str
    before: str
    after: str
    flops_before: int
    flops_after: int
    flops_before_expr: sympy.Expr
    flops_after_expr: sympy.Expr
    changed: bool
    reason: str
    considered: tuple[Candidate, ...] = ()
    is_exact: bool = True
    find_break_even: Callable[[], str] = field(default=str, repr=False, compare=False)
    find_causes: Callable[[], tuple[Cause, ...]] = field(default=tuple, repr=False, compare=False)
    base: str = ""
    base_flops: int = 0
    seconds: tuple[float, float] | None = None
    saved: tuple[int, int] = (0, 0)
    find_figures: Callable[[], Figures | None] = field(default=_none, repr=False, compare=False)

    @property
    def figures(self) -> Figures | None:
        """What drawings and plots are made of; None if there is nothing to draw."""
        return self.find_figures()

    @cached_property
    def break_even(self) -> str:
        """The numbers of tokens for which merging pays: ``"when N > 682"``, ``"never"``.

        Computed when it is first asked for: it takes searches at other sizes.
        """
        return self.find_break_even()

    @cached_property
    def causes(self) -> tuple[Cause, ...]:
        """If it was left alone, what keeps it from being rewritten, and what to do.

        Computed when it is first asked for: some causes take searches under other options.
        """
        return self.find_causes()


@dataclass(frozen=True)
class Refusal:
    """Something that looks like LoRA and was left alone.

    Attributes:
        reason: Why.
        nodes: Where: module or node names.
        cause: The same as data, with what to do about it.
    """

    reason: str
    nodes: tuple[str, ...]
    cause: Cause | None = None
