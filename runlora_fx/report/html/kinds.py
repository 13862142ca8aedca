"""Kinds: what the page shows of each row of a report: its cells, and a section with its figures.

    the query projections of 32 layers    ->    Kind(Row(1, "a", sites), rates)

Invariant: the rows are those of the text, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import sympy

from runlora_fx.report.figures.figures import Drawing, Figures, Rates
from runlora_fx.report.html import plots
from runlora_fx.report.html.numbers import change
from runlora_fx.report.html.sketch import Sketch, sketched
from runlora_fx.report.kinds import Row, rows_of
from runlora_fx.report.sites import Site
from runlora_fx.report.units import quantity

#: Why a figure is missing.
_FAILED = "the report has no data for it, because it was stored without or making it failed"
_LARGE = "the plan has too many steps to draw; the text has all of them"


@dataclass(frozen=True)
class PlanView:
    """One plan of a kind.

    Attributes:
        title: Which plan it is.
        drawing: Its boxes and edges; None if it is too large to draw.
        text: The plan as text.
        flops: Its products [FLOP].
        expression: Its products as an expression in the site's dimensions.
    """

    title: str
    drawing: Drawing | None
    text: str
    flops: int
    expression: sympy.Expr

    @cached_property
    def sketch(self) -> Sketch | None:
        """The drawing with positions."""
        return sketched(self.drawing) if self.drawing else None


@dataclass(frozen=True)
class Kind:
    """Sites with equal plans, sizes and reasons.

    Attributes:
        row: The sites, and their number in the report.
        rates: The rates that plans of its dtype were ranked by; None if FLOPs ranked them.
    """

    row: Row
    rates: Rates | None = None

    @property
    def key(self) -> int:
        """The end of its anchor in the page."""
        return self.row.number

    @property
    def site(self) -> Site:
        """A site that stands for all of them."""
        return self.row.site

    @cached_property
    def modules(self) -> list[str]:
        """The names of all modules, in graph order."""
        return list(dict.fromkeys(name for site in self.row.sites for name in site.modules))

    @cached_property
    def names(self) -> list[str]:
        """The names of the modules, those of equal layers as one."""
        return self.row.names

    def short_names(self, prefix: str) -> str:
        """The names in one line, without what all names of the page begin with."""
        return ", ".join(name.removeprefix(prefix) for name in self.names)

    @property
    def status(self) -> str:
        """``changed`` or ``left alone``."""
        return "changed" if self.site.changed else "left alone"

    @property
    def search(self) -> str:
        """What the filter of the table looks through."""
        site = self.site
        causes = [f"{cause.name} {cause.text} {cause.remedy}" for cause in site.causes]
        words = [*self.names, *self.modules, site.shapes, self.status, site.reason, *causes]
        return " ".join(words).lower()

    @property
    def change(self) -> str:
        """By how much the FLOPs change."""
        return change(self.site.flops_before, self.site.flops_after)

    @property
    def share(self) -> float:
        """The FLOPs after as a share of those before, to sort by."""
        before = self.site.flops_before
        return self.site.flops_after / before if before else 1.0

    @property
    def time_change(self) -> str:
        """By how much the predicted time changes; empty if plans were ranked by FLOPs."""
        return change(*self.site.seconds) if self.site.seconds else ""

    @property
    def time_share(self) -> float:
        """The predicted time after as a share of that before, to sort by."""
        before, after = self.site.seconds or (0.0, 0.0)
        return after / before if before else 1.0

    @property
    def saved_change(self) -> str:
        """By how much the bytes change that are saved for the backward."""
        before, after = self.site.saved
        return f"+{quantity(after, 'B')}" if after and not before else change(before, after)

    # -- figures -------------------------------------------------------------------------------

    @property
    def _figures(self) -> Figures | None:
        return self.site.figures

    @cached_property
    def plans(self) -> list[PlanView]:
        """The graph as it came, and the plan that will run if that is another."""
        site, figures = self.site, self._figures
        came = figures.before if figures else None
        title = "Before" if site.changed else "Runs as it came"
        found = [PlanView(title, came, site.before, site.flops_before, site.flops_before_expr)]
        if site.changed:
            runs = figures.after if figures else None
            after = (site.after, site.flops_after, site.flops_after_expr)
            found.append(PlanView("After", runs, *after))
        return found

    @property
    def no_drawing(self) -> str:
        """Why there is no drawing."""
        return _LARGE if self._figures else _FAILED

    @cached_property
    def break_even(self) -> plots.BreakEven | None:
        """What plans take by the number of tokens."""
        return plots.break_even_plot(self._figures) if self._figures else None

    @property
    def no_break_even(self) -> str:
        """Why there is no plot by the number of tokens."""
        if self._figures is None:
            return _FAILED
        if "N" not in dict(self._figures.sizes):
            return "no dimension of these matrices is a number of tokens"
        return "the plan has too many steps, or a size is not known"

    @cached_property
    def products(self) -> list[plots.Row]:
        """The products of both plans."""
        return plots.products(self._figures) if self._figures else []

    @cached_property
    def roofline(self) -> plots.Panel | None:
        """The products under what the device attains."""
        return plots.roofline_plot(self.products, self.rates) if self.rates else None

    @property
    def no_roofline(self) -> str:
        """Why there is no roofline."""
        if self._figures is None:
            return _FAILED
        if not self._figures.is_timed:
            return "plans were ranked by FLOPs, so no device's rates were used"
        if self.rates is None:
            return "the profile of the device has no rate for FLOPs or for bytes"
        return "no product of the plans was drawn"


def common_prefix(kinds: Sequence[Kind]) -> str:
    """The modules that all modules of some kinds lie in, with a dot at the end; "" if none.

    Example:
        ``model.layers.0.q, model.layers.1.q`` lie in ``model.``: a list stays with its numbers.
    """
    names = [name.split(".") for kind in kinds for name in kind.modules]
    levels = zip(*(name[:-1] for name in names), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    while common and any(part.isdigit() for name in names for part in name[: len(common) + 1]):
        common.pop()
    return "".join(f"{part}." for part in common)


def kinds_of(sites: Sequence[Site], rates: Sequence[Rates]) -> list[Kind]:
    """The rows of a report, each with the rates of its dtype.

    Args:
        sites: The sites, in graph order.
        rates: By dtype, the rates that plans were ranked by.
    """
    by_dtype = {one.dtype: one for one in reversed(rates)}
    return [Kind(row, by_dtype.get(_dtype(row.site))) for row in rows_of(sites)]


def _dtype(site: Site) -> str:
    return site.figures.dtype if site.figures else ""
