"""The report for a terminal: what ``rich.print(report)`` shows.

    rich.print(runlora_fx.explain(model, x))    ->    the verdict, what to do, and a table

Invariant: no name is cut. Where the table is too wide with them, names are listed below it. Nothing
of the text is markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from runlora_fx.report.kinds import Row, rows_of
from runlora_fx.report.sites import Refusal, Site
from runlora_fx.report.text.text import COLUMNS, HEADS, NUMBERS, cells, refusal_text


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
        parts += [_Rows(tuple(rows_of(sites))), Text(COLUMNS, style="dim")]
        parts.append(Text("print(report) shows the formulas of each order.", style="dim"))
    parts += [Text(f"left alone: {refusal_text(refusal)}") for refusal in refusals]
    return Group(*parts)


@dataclass(frozen=True)
class _Rows:
    """The rows as a table, with their names in it or below it."""

    rows: tuple[Row, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = self._table(has_names=True)
        if console.measure(whole, options=options.update(max_width=1 << 16)).maximum <= (
            options.max_width
        ):
            yield whole
            return
        yield self._table(has_names=False)
        for row in self.rows:
            yield Text(f"row {row.number}: {', '.join(row.names)}", overflow="fold")

    def _table(self, *, has_names: bool) -> Table:
        table = Table()
        found = [(*cells(row), "\n".join(row.names) if has_names else "") for row in self.rows]
        shown = [i for i in range(len(HEADS)) if any(cell[i] for cell in found)]
        for i in shown:
            is_number = HEADS[i] in NUMBERS
            table.add_column(HEADS[i], justify="right" if is_number else "left", no_wrap=is_number)
        for row, cell in zip(self.rows, found, strict=True):
            style = "green" if row.site.changed else "yellow"
            table.add_row(*(Text(cell[i], style if HEADS[i] == "result" else "") for i in shown))
        return table
