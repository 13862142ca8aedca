"""The report: what the pass saw, what it did, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO

import sympy
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Candidate:
    """A plan that was considered.

    Attributes:
        form: How it begins, in algebra.
        flops: FLOPs of its matrix products [FLOP].
    """

    form: str
    flops: int


@dataclass(frozen=True)
class Site:
    """One place where low-rank algebra was found, or where matrix products were changed.

    Attributes:
        modules: Dotted names of the modules it comes from.
        shapes: The sizes of its dimensions, ``N`` tokens, ``i`` in, ``o`` out, ``r`` rank.
        before: The algebra as it came, a line for every value.
        after: The algebra as it will run; equal to ``before`` where nothing was changed.
        flops_before: FLOPs of the matrix products that came [FLOP].
        flops_after: FLOPs of the matrix products that will run [FLOP].
        flops_before_expr: The same as an expression in the site's dimensions.
        flops_after_expr: The same as an expression in the site's dimensions.
        changed: Whether the graph was changed here.
        reason: Why it was changed or left alone.
        considered: The alternatives, cheapest first.
        break_even: For how many tokens it pays to merge the adapter into the base weight.
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
    break_even: str = ""


@dataclass(frozen=True)
class Refusal:
    """Something that looks like LoRA and was left alone.

    Attributes:
        reason: Why.
        nodes: Where: module or node names.
    """

    reason: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What one compilation or rewrite did.

    Attributes:
        graph: The kind of graph: ``"joint"``, ``"inference"``, ``"torch"``, or several.
        sites: Where low-rank algebra was found or something was changed, in graph order.
        refusals: What was left alone although it looks like LoRA.
        flops_before: FLOPs of all matrix products of the graph as it came [FLOP].
        flops_after: FLOPs of all matrix products that will run [FLOP].
        from_cache: Whether the compiled code came from a cache, so that no graph was seen.
    """

    graph: str
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    flops_before: int = 0
    flops_after: int = 0
    from_cache: bool = False

    def __str__(self) -> str:
        """A table of kinds of site, and what follows from it."""
        out = StringIO()
        console = Console(file=out, width=120, highlight=False)
        if self.from_cache:
            console.print(
                "runlora: compiled code came from a cache; it was planned when first compiled."
            )
            return out.getvalue()
        if not self.sites:
            console.print("runlora: NO low-rank site found in this graph; it runs as it came.")
        else:
            console.print(self._table())
            console.print(
                f"{self.graph} graph: matrix products {_si(self.flops_before)}FLOP -> "
                f"{_si(self.flops_after)}FLOP ({_change(self.flops_before, self.flops_after)})"
            )
        for refusal in self.refusals:
            console.print(f"left alone: {refusal.reason}: {_names(refusal.nodes, 4)}")
        return out.getvalue()

    def _table(self) -> Table:
        table = Table(title="runlora", show_lines=True, expand=True)
        for name, ratio in (("sites", 3), ("before", 3), ("after", 4), ("FLOPs and why", 4)):
            table.add_column(name, overflow="fold", ratio=ratio)
        kinds: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            kinds.setdefault((site.before, site.after, site.shapes, site.reason), []).append(site)
        for (before, after, shapes, reason), sites in kinds.items():
            site, names = sites[0], [name for site in sites for name in site.modules]
            considered = "".join(f"\n{c.form}: {_si(c.flops)}FLOP" for c in site.considered[:4])
            table.add_row(
                f"{len(sites)} x\n{_names(names, 3)}\n{shapes}",
                before,
                after if site.changed else "as it came",
                f"{_si(site.flops_before)}FLOP -> {_si(site.flops_after)}FLOP\n"
                f"{site.flops_before_expr}\n-> {site.flops_after_expr}\n{reason}"
                + (f"\n{site.break_even}" if site.break_even else "")
                + (f"\nconsidered:{considered}" if considered else ""),
            )
        return table


def merged(reports: Iterable[Report]) -> Report:
    """One report for several graphs."""
    parts = list(reports)
    return Report(
        graph=" + ".join(dict.fromkeys(part.graph for part in parts)) or "no",
        sites=tuple(site for part in parts for site in part.sites),
        refusals=tuple(refusal for part in parts for refusal in part.refusals),
        flops_before=sum(part.flops_before for part in parts),
        flops_after=sum(part.flops_after for part in parts),
        from_cache=bool(parts) and all(part.from_cache for part in parts),
    )


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
