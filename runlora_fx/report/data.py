"""Report: what the pass found, what it changed, and why, as data.

One graph -> one :class:`Report`. ``print(report)`` shows it as text, and its attributes are data.

Invariant: the FLOPs of a report are those of all matrix products that were read, also outside of
its sites.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runlora_fx.report.sites import Candidate, Refusal, Site
from runlora_fx.report.text import FROM_CACHE, lines, stacked_text

__all__ = ["Candidate", "Refusal", "Report", "Site", "combined"]


@dataclass(frozen=True)
class Report:
    """What one compilation or rewrite did.

    Attributes:
        graph: The kind of graph: ``"joint"``, ``"inference"``, ``"torch"``, or several.
        sites: Where low-rank algebra was found or something was changed, in graph order.
        refusals: What was left alone although it looks like LoRA.
        flops_before: All matrix products of the incoming graph [FLOP].
        flops_after: All matrix products that will run [FLOP].
        from_cache: True if the compiled code came from a cache, so that no graph was seen.
        planned_for: The device that was planned for, if another than the graph runs on.
        stacked: By stack, how many products run as one, because they read the same tensor or are
            added up.
    """

    graph: str
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    flops_before: int = 0
    flops_after: int = 0
    from_cache: bool = False
    planned_for: str = ""
    stacked: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Totals, a section for each kind of site, and what was left alone."""
        if self.from_cache:
            return FROM_CACHE
        text = lines(self.graph, self.sites, self.refusals, self.flops_before, self.flops_after)
        if self.stacked:
            text += f"{stacked_text(self.stacked)}\n"
        if not self.planned_for:
            return text
        return f"{text}Planned for {self.planned_for}; nothing was measured on it.\n"


def combined(reports: Iterable[Report]) -> Report:
    """One report for several graphs; FLOPs are added."""
    parts = list(reports)
    return Report(
        graph=" + ".join(dict.fromkeys(part.graph for part in parts)) or "no",
        sites=tuple(site for part in parts for site in part.sites),
        refusals=tuple(refusal for part in parts for refusal in part.refusals),
        flops_before=sum(part.flops_before for part in parts),
        flops_after=sum(part.flops_after for part in parts),
        from_cache=bool(parts) and all(part.from_cache for part in parts),
        planned_for=", ".join(dict.fromkeys(p.planned_for for p in parts if p.planned_for)),
        stacked=tuple(count for part in parts for count in part.stacked),
    )
