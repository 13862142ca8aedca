"""The report as text: a table with a row for each kind of site, totals, and refusals.

224 equal layers -> one row that says "224 x".

Invariant: whatever was changed has a row; a text says nothing that the data do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

from runlora_fx.report.sites import Refusal, Site

#: The whole text where compiled code came from a cache.
FROM_CACHE = "runlora: compiled code came from a cache; it was planned when first compiled.\n"

#: Width of the text [characters].
_WIDTH = 120

#: How many alternatives a row shows.
_ALTERNATIVES = 4


def lines(
    graph: str,
    sites: Sequence[Site],
    refusals: Sequence[Refusal],
    flops_before: int,
    flops_after: int,
) -> str:
    """The text of a report.

    Args:
        graph: The kind of graph.
        sites: What was found, in graph order.
        refusals: What was left alone although it looks like LoRA.
        flops_before: FLOPs of all matrix products that came [FLOP].
        flops_after: FLOPs of all matrix products that will run [FLOP].
    """
    out = StringIO()
    # Without markup: W[k] is no style.
    console = Console(file=out, width=_WIDTH, highlight=False, markup=False)
    if not sites:
        console.print("runlora: NO low-rank site found in this graph; it runs as it came.")
    else:
        console.print(_table(sites))
        console.print(
            f"{graph} graph: matrix products {_si(flops_before)}FLOP -> "
            f"{_si(flops_after)}FLOP ({_change(flops_before, flops_after)})"
        )
    for refusal in refusals:
        console.print(f"left alone: {refusal.reason}: {_names(refusal.nodes, 4)}")
    return out.getvalue()


def _table(sites: Iterable[Site]) -> Table:
    """A row for each kind of site."""
    table = Table(title="runlora", show_lines=True, expand=True)
    for name, ratio in (("sites", 3), ("before", 3), ("after", 4), ("FLOPs and why", 4)):
        table.add_column(name, overflow="fold", ratio=ratio)
    kinds: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        kinds.setdefault((site.before, site.after, site.shapes, site.reason), []).append(site)
    for equal in kinds.values():
        first, modules = equal[0], [name for site in equal for name in site.modules]
        table.add_row(
            f"{len(equal)} x\n{_names(modules, 3)}\n{first.shapes}",
            first.before,
            first.after if first.changed else "as it came",
            _costs_and_reason(first),
        )
    return table


def _costs_and_reason(site: Site) -> str:
    """FLOPs as numbers and as formulas, the reason, and what else was considered."""
    parts = [
        f"{_si(site.flops_before)}FLOP -> {_si(site.flops_after)}FLOP",
        str(site.flops_before_expr),
        f"-> {site.flops_after_expr}",
        site.reason,
    ]
    if site.break_even:
        parts.append(site.break_even)
    if site.considered:
        parts.append("considered:")
    parts += [f"{c.form}: {_si(c.flops)}FLOP" for c in site.considered[:_ALTERNATIVES]]
    return "\n".join(parts)


def _names(names: Iterable[str], limit: int) -> str:
    listed = list(dict.fromkeys(names))
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _si(x: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(x) < 1000:
            return f"{x:.4g} {unit}"
        x /= 1000
    return f"{x:.4g} P"


def _change(before: int, after: int) -> str:
    return f"{(after - before) / before:+.1%}" if before else "nothing to do"
