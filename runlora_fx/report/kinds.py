"""Kinds: the sites of a report, grouped by equal structure.

    32 layers x 7 projections    ->    five rows of a table, and two orders of evaluation

Sites of one *row* have equal sizes and were treated alike. Rows of one *order* came with the same
formulas, for other sizes or with other results. So no formula is printed twice, after graph breaks
either.

Invariant: every site is in one row, and every row in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from runlora_fx.report.gathered import gathered
from runlora_fx.report.sites import Site


@dataclass(frozen=True)
class Row:
    """Sites of equal structure.

    Attributes:
        number: The number of the row, from 1.
        order: The letter of the order that it came in.
        sites: The sites; all that a row shows is equal in them, but for their modules.
    """

    number: int
    order: str
    sites: tuple[Site, ...]

    @property
    def site(self) -> Site:
        """One of the sites."""
        return self.sites[0]

    @property
    def names(self) -> list[str]:
        """The modules, those of equal layers gathered."""
        return gathered(name for site in self.sites for name in site.modules)

    @property
    def layers(self) -> int:
        """How many modules there are."""
        return len({name for site in self.sites for name in site.modules})

    @property
    def result(self) -> str:
        """What was done: ``changed``, or ``left alone`` with the names of the causes."""
        if self.site.changed:
            return "changed"
        causes = ", ".join(dict.fromkeys(cause.name for cause in self.site.causes))
        return f"left alone: {causes}" if causes else "left alone"


def rows_of(sites: Sequence[Site]) -> list[Row]:
    """The sites by row, those of one order together."""
    orders: dict[object, dict[object, list[Site]]] = {}
    for site in sites:
        order = orders.setdefault((site.before, site.base, site.flops_before_expr), {})
        alike = (site.shapes, site.after, site.changed, site.reason, site.causes)
        order.setdefault(alike, []).append(site)
    rows: list[Row] = []
    for i, order in enumerate(orders.values()):
        for equal in order.values():
            rows.append(Row(len(rows) + 1, _letter(i), tuple(equal)))
    return rows


def _letter(i: int) -> str:
    """``a`` to ``z``, then ``aa``, ``ab``, ..."""
    before, last = divmod(i, len(ascii_lowercase))
    return (_letter(before - 1) if before else "") + ascii_lowercase[last]
