"""The report for a terminal: what ``rich.print(report)`` shows.

    rich.print(runlora_fx.explain(model, x))    ->    the verdict, what to do, and a table

Invariant: names are folded where they do not fit, and never cut. Nothing of the text is markup.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runlora_fx.report.kinds import Row, rows_of
from runlora_fx.report.sites import Refusal, Site
from runlora_fx.report.text import COLUMNS, HEADS, cells, refusal_text

#: The columns whose cells are aligned to the right.
_NUMBERS = frozenset(["row", "layers", "time", "saved"])


def as_rich(
    headline: str, summary: Sequence[str], sites: Sequence[Site], refusals: Sequence[Refusal]
) -> RenderableType:
    """A report for ``rich.print``.

    Args:
        headline: The first line.
        summary: What to do, and what else was done.
        sites: What was found, in graph order.
        refusals: What was left alone although it looks like LoRA.
    """
    parts: list[RenderableType] = [Text(headline, style="bold")]
    parts += [Text(line) for line in summary]
    if sites:
        parts += [_table(rows_of(sites)), Text(COLUMNS, style="dim")]
        parts.append(Text("print(report) shows the formulas of each order.", style="dim"))
    parts += [Text(f"left alone: {refusal_text(refusal)}") for refusal in refusals]
    return Group(*parts)


def _table(rows: Sequence[Row]) -> Table:
    """A row for each kind of site; a line for each gathered name."""
    table = Table(show_lines=False)
    cells_of = {row.number: (*cells(row), "\n".join(row.names)) for row in rows}
    shown = [i for i in range(len(HEADS)) if any(cell[i] for cell in cells_of.values())]
    for i in shown:
        justify = "right" if HEADS[i] in _NUMBERS else "left"
        table.add_column(HEADS[i], justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        style = "green" if row.site.changed else "yellow"
        cell = cells_of[row.number]
        table.add_row(*(Text(cell[i], style if HEADS[i] == "result" else "") for i in shown))
    return table
