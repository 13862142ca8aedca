"""The page: a report as one HTML file, with its style, script, drawings and plots in it.

    as_html(report, advice)    ->    "<!doctype html> ..."

Invariant: the page loads nothing, and names from the model are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined

from runlora_fx import __version__
from runlora_fx.passes.context import Recomputation
from runlora_fx.report.figures.figures import Rates
from runlora_fx.report.gathered import gathered
from runlora_fx.report.html import numbers, plots
from runlora_fx.report.html.kinds import Kind, common_prefix, kinds_of
from runlora_fx.report.sites import Refusal, Site
from runlora_fx.report.units import duration, quantity

#: What letters of plans and sizes stand for.
_LETTERS = {
    "X": "input of the layer",
    "Y": "output of the layer",
    "W": "weight of the layer",
    "A": "adapter, down",
    "B": "adapter, up",
    "M": "computed from weights alone, such as a merged weight",
    "Z": "any other intermediate result",
    "dY": "gradient of Y; dX, dA, dB, dW likewise",
    "b": "bias",
    "g": "vector that scales rows or columns",
    "dg": "gradient of g",
    "G": "any other gradient",
    "L": "any other matrix",
    "s": "scaling that is known at run time",
    "N": "tokens",
    "i": "inputs of the layer",
    "o": "outputs of the layer",
    "r": "rank of the adapter",
    "E": "experts",
    "k": "the experts of the tokens",
    "d": "any other size",
}


class Reported(Protocol):
    """What a page needs of a report."""

    @property
    def verdict(self) -> str:
        """What was gained, in one line."""

    @property
    def graph(self) -> str:
        """The kind of graph."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """What was found."""

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What was left alone although it looks like LoRA."""

    @property
    def flops_before(self) -> int:
        """All products that came [FLOP]."""

    @property
    def flops_after(self) -> int:
        """All products that will run [FLOP]."""

    @property
    def from_cache(self) -> bool:
        """True if the compiled code came from a cache."""

    @property
    def of_other_sizes(self) -> bool:
        """True if that code was compiled for other sizes."""

    @property
    def planned_for(self) -> str:
        """The device that was planned for, if another than the graph runs on."""

    @property
    def stacked(self) -> tuple[int, ...]:
        """By stack, how many products run as one."""

    @property
    def upcast(self) -> int:
        """How many products of 16-bit matrices run in float32."""

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The predicted time of all products, before and after [s]."""

    @property
    def recomputation(self) -> Recomputation:
        """What the backward recomputes besides."""

    @property
    def rates(self) -> tuple[Rates, ...]:
        """The rates that plans were ranked by."""


def as_html(report: Reported, advice: Sequence[str]) -> str:
    """A report as a page.

    Args:
        report: The report.
        advice: What a user can do, a sentence each.
    """
    kinds = kinds_of(report.sites, report.rates)
    figures = [site.figures for site in report.sites if site.figures is not None]
    used = {kind.rates for kind in kinds if kind.rates is not None}
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            advice=advice,
            kinds=kinds,
            layers=len({name for site in report.sites for name in site.modules}),
            rates=[one for one in report.rates if one in used],
            is_timed=any(one.is_timed for one in figures),
            is_priced=any(site.seconds is not None for site in report.sites),
            letters=_letters(kinds),
            prefix=common_prefix(kinds),
            version=__version__,
        )
    )


@cache
def _environment() -> Environment:
    """The templates and what they may call."""
    made = Environment(
        loader=PackageLoader("runlora_fx.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(
        quantity=quantity,
        duration=duration,
        change=numbers.change,
        gathered=gathered,
        plot_width=plots.WIDTH,
        plot_height=plots.HEIGHT,
    )
    return made


def _letters(kinds: Sequence[Kind]) -> dict[str, str]:
    """The letters that a page uses, and what they stand for."""
    texts = (f"{kind.site.before} {kind.site.after} {kind.site.shapes}" for kind in kinds)
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    has_gradient = any(word.startswith("d") and word != "diag" for word in words)
    used = words | ({"dY"} if has_gradient else set())
    return {letter: meaning for letter, meaning in _LETTERS.items() if letter in used}
